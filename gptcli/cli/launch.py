"""`--nproc N`: the same command in N processes of this machine, joined by torch.distributed.

Processes are started directly rather than through torch.distributed.run: that imports torch in the parent too,
and answers a signal by killing its workers, where ours must finish their step, save, and report 130 or 143.
Under torchrun or a cluster's own launcher WORLD_SIZE is set already and nothing is started here.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from types import FrameType

from gptcli.errors import UserError

GRACE_SECONDS = 60.0


def is_worker() -> bool:
    return "WORLD_SIZE" in os.environ


def processes(nproc: int) -> int:
    """How many take part: this one may be a worker of several."""
    return int(os.environ.get("WORLD_SIZE", nproc))


def launch(nproc: int) -> int:
    """Run this very command line in `nproc` processes; the exit status of the first that failed, else 0."""
    if nproc < 1:
        raise UserError(f"--nproc {nproc}: must be at least 1")
    shared = {
        "WORLD_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "GPT_PARENT": str(os.getpid()),
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // nproc)),
    }
    workers = []
    for rank in range(nproc):
        env = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        # A session of their own, so that Ctrl-C reaches them once, through us.
        workers.append(
            subprocess.Popen(
                [sys.executable, "-m", "gptcli", *sys.argv[1:]],
                env=env,
                start_new_session=True,
                stdout=None if rank == 0 else subprocess.DEVNULL,
            )
        )

    def forward(signum: int, frame: FrameType | None) -> None:
        for worker in workers:
            if worker.poll() is None:
                worker.send_signal(signum)

    from gptcli.train.stop import stop_signals

    for signum in stop_signals():
        signal.signal(signum, forward)
    return _wait(workers)


def _wait(workers: list[subprocess.Popen[bytes]]) -> int:
    """Wait for all; once one has failed, the others get a moment and are then ended."""
    failed_at: float | None = None
    status = 0
    while any(worker.poll() is None for worker in workers):
        codes = [worker.returncode for worker in workers if worker.returncode]
        if codes and failed_at is None:
            failed_at, status = time.monotonic(), codes[0]
            killed = [rank for rank, worker in enumerate(workers) if worker.returncode == -signal.SIGKILL]
            for rank in killed:
                print(f"gpt: process {rank} was killed (out of memory?)", file=sys.stderr)
        if failed_at is not None and time.monotonic() - failed_at > GRACE_SECONDS:
            for worker in workers:
                worker.kill()
        time.sleep(0.05)
    status = status or next((w.returncode for w in workers if w.returncode), 0)
    return 128 - status if status < 0 else status


def end_with_parent() -> None:
    """A worker whose launcher was killed must not train on alone (Linux)."""
    if "GPT_PARENT" not in os.environ or not sys.platform.startswith("linux"):
        return
    import ctypes

    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(os.environ["GPT_PARENT"]):
        os.kill(os.getpid(), signal.SIGKILL)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

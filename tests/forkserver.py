"""`gpt` without the seconds that its imports take: a process that has done them all forks a child for each command.

The child has the arguments, folder, environment and files of its own command and runs the real entry point. What is
read while Python or a library starts (PYTHON*, OMP_NUM_THREADS) is as the server found it.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import pkgutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

WITH_EXTRAS = ("gptcli.serve.", "gptcli.eval.harness")  # import libraries that few commands need
LATE = ("torch._dynamo", "matplotlib.figure")  # what every training run imports on its way
MESSAGE_BYTES = 100_000  # a datagram of a socket pair holds twice that


class Forkserver:
    """Runs one command at a time."""

    def __init__(self) -> None:
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = [sys.executable, __file__, str(theirs.fileno())]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            self._process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], env=environment, stdin=subprocess.DEVNULL
            )

    def run(
        self, arguments: Sequence[str], *, cwd: Path | None, environment: dict[str, str], stdin: bytes, timeout: float
    ) -> tuple[int, bytes, bytes]:
        """The exit status, what was written to stdout, and to stderr."""
        request = json.dumps([list(arguments), str(cwd or Path.cwd()), environment]).encode()
        with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            given.write(stdin)
            given.seek(0)
            self._channel.settimeout(timeout)
            socket.send_fds(self._channel, [request], [file.fileno() for file in (given, out, err)])
            try:
                answer = self._channel.recv(64)
            except TimeoutError:
                self.close()
                raise
            for file in (out, err):
                file.seek(0)
            return int(answer), out.read(), err.read()

    def close(self) -> None:
        self._channel.close()
        self._process.kill()
        self._process.wait()


def serve(channel: socket.socket) -> None:
    import gptcli
    from gptcli.cli.main import main

    ours = (module.name for module in pkgutil.walk_packages(gptcli.__path__, "gptcli."))
    for name in (*ours, *LATE):
        if not name.startswith(WITH_EXTRAS) and not name.endswith("__main__"):
            importlib.import_module(name)
    gc.freeze()
    while request := socket.recv_fds(channel, 2 * MESSAGE_BYTES, 3):
        message, files, _, _ = request
        if not message:
            return
        if child := os.fork():
            for file in files:
                os.close(file)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            channel.send(str(status).encode())
            continue
        arguments, cwd, environment = json.loads(message)
        channel.close()
        for target, file in enumerate(files):
            os.dup2(file, target)
            os.close(file)
        os.chdir(cwd)
        os.environ.clear()
        os.environ.update(environment)
        sys.argv = ["gpt", *arguments]
        main()


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    serve(socket.socket(fileno=int(sys.argv[1])))

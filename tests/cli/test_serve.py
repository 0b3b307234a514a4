"""gpt serve as its users start and stop it."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.conftest import Finished, gpt

pytest.importorskip("fastapi")
httpx = pytest.importorskip("httpx")

from tests.serve.clients import Streamed, gpt_serve, make_engine, save_engine, stream  # noqa: E402


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_engine(make_engine(context_length=16384), tmp_path_factory.mktemp("served") / "runs" / "mine")


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_let_answers_end(model: Path, signum: int, status: int) -> None:
    with gpt_serve("-c", model) as (port, process):
        assert httpx.get(f"http://127.0.0.1:{port}/v1/models").json()["data"][0]["id"] == "mine"
        got: list[Streamed] = []

        def client() -> None:
            got.append(asyncio.run(stream(port, "/v1/completions", {"prompt": "a", "max_tokens": 150, "seed": 1})))

        thread = threading.Thread(target=client)
        thread.start()
        while httpx.get(f"http://127.0.0.1:{port}/health").json()["running"] == 0 and not got:
            pass
        process.send_signal(signum)
        _, err = process.communicate(timeout=30)
        thread.join()
        assert process.returncode == status
        assert err == "gpt: stopped serving\n"
        assert got[0].done


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_one_thread_computes(tmp_path: Path) -> None:
    """Two would have helpers each, which together outnumber the cores and so take turns asleep."""
    wide = save_engine(make_engine(n_embd=512, context_length=512), tmp_path / "wide")
    threads = []
    for team in ("1", "3"):
        with gpt_serve("-c", wide, OMP_NUM_THREADS=team) as (port, process):
            answer = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json={"prompt": "a " * 200, "max_tokens": 2})
            assert answer.status_code == 200
            threads.append(len(list(Path(f"/proc/{process.pid}/task").iterdir())))
    assert threads[1] - threads[0] == 2


def test_an_answer_that_does_not_end_is_cut_after_a_while(model: Path) -> None:
    body = {"prompt": "a", "max_tokens": 16000, "n": 4, "logit_bias": {"256": -100}}
    with gpt_serve("-c", model) as (port, process):

        async def endless() -> Streamed:
            asking = asyncio.create_task(stream(port, "/v1/completions", body))
            await asyncio.sleep(1)
            process.terminate()
            return await asking

        assert not asyncio.run(endless()).done
        assert process.wait(30) == 143


def test_mistakes_are_one_line(model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = gpt("serve", "-c", model, "--port", port)
    assert done.code == 2
    taken_ = f"gpt: cannot listen on 127.0.0.1 port {port}: Address already in use; try another --port or --host\n"
    assert done.err == taken_
    assert "no tokenizer" in gpt("serve", "-c", without_tokenizer(model), "--port", "0").err


def test_int8_serves_what_gpt_generate_writes(model: Path) -> None:
    def offline(*options: str) -> Finished:
        return gpt(
            "generate", "-c", model, "ab", "--max-new-tokens", "9", "--seed", "3", "--logprobs", "--json", *options
        )

    body = {"prompt": "ab", "max_tokens": 9, "seed": 3, "logprobs": 0}
    with gpt_serve("-c", model, "--int8") as (port, _):
        choice = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body).json()["choices"][0]
    packed, full = offline("--int8").json(), offline().json()
    assert choice["text"] == packed["text"]
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(packed["logprobs"], abs=1e-5)
    assert packed["logprobs"] != pytest.approx(full["logprobs"], abs=1e-4)


def without_tokenizer(model: Path) -> Path:
    engine = make_engine()
    engine.tokenizer = None
    return save_engine(engine, model.parent / "dumb")


def test_a_missing_extra_is_named() -> None:
    code = (
        "import sys; sys.modules['uvicorn'] = None; sys.argv = ['gpt', 'serve']\n"
        "from gptcli.cli.main import main\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "gpt: gpt serve needs uvicorn: pip install 'gptcli[serve]'\n"


def test_the_key_from_the_environment_and_a_warning_for_an_open_door(model: Path) -> None:
    with gpt_serve("-c", model, "--name", "x", GPT_API_KEY="secret") as (port, process):
        assert httpx.get(f"http://127.0.0.1:{port}/v1/models").status_code == 401
        assert httpx.get(f"http://127.0.0.1:{port}/v1/models", headers={"Authorization": "Bearer secret"}).is_success
    with gpt_serve("-c", model, "--host", "0.0.0.0") as (_, process):
        assert process.stderr is not None
        assert "--api-key" in process.stderr.readline()

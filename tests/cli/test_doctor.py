"""`gpt doctor` as its users see it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer

from gptcli.cli.doctor import doctor
from tests.conftest import gpt
from tests.doctor.faults import FAULTS

CHECKS = ("cached", "saved", "causal")
SOME = [word for name in CHECKS for word in ("--check", name)]


def test_a_table_and_an_object(tmp_path: Path) -> None:
    done = gpt("doctor", "--device", "cpu", *SOME, cwd=tmp_path)
    assert done.code == 0, done.err
    assert [line.split()[:2] for line in done.out.splitlines()] == [["pass", name] for name in CHECKS]
    assert "small random model" in done.err

    row = gpt("doctor", "--random", "--json", "--device", "cpu", *SOME, cwd=tmp_path).json()
    assert row["passed"] is True
    assert [check["check"] for check in row["checks"]] == list(CHECKS)
    assert all(check["figure"] <= check["tolerance"] for check in row["checks"])


def test_a_failed_check_ends_with_1(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    FAULTS["causal"](monkeypatch)
    with pytest.raises(typer.Exit) as end:
        doctor(random=True, check=["causal", "saved"], json=True, device="cpu")
    assert end.value.exit_code == 1
    out, err = capsys.readouterr()
    row = json.loads(out)
    assert row["passed"] is False
    assert {check["check"]: check["passed"] for check in row["checks"]} == {"saved": True, "causal": False}
    assert err == "gpt: 1 of 2 failed: causal\n"


def test_mistakes_take_one_line(tmp_path: Path) -> None:
    for arguments, words in [
        (["--check", "cashed"], "no such check; did you mean 'cached'"),
        (["-c", "nowhere"], "no such checkpoint"),
        (["-c", "nowhere", "--random"], "leave out -c"),
        (["--device", "abacus"], "expected auto, cpu"),
    ]:
        done = gpt("doctor", *arguments, cwd=tmp_path)
        assert done.code == 2
        assert words in done.err
        assert len(done.err.splitlines()) == 1

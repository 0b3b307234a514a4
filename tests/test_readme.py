"""Every command of README.md is run, in its order, in a folder like the reader's."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

README = (REPOSITORY / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[str]:
    return [line for block in blocks("sh") for line in block.splitlines() if line]


def environment(tmp_path: Path) -> dict[str, str]:
    """`gpt` of this environment first on the PATH."""
    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
    }


def test_the_gpt_commands_and_the_notebook_run(tmp_path: Path) -> None:
    for name in ("README.md", "gptcli"):
        source = REPOSITORY / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    run = [c for c in commands() if not c.startswith(("make", "pip"))]
    assert len(run) >= 8
    for command in run:
        done = subprocess.run(
            ["bash", "-o", "pipefail", "-c", command],
            cwd=tmp_path,
            env=environment(tmp_path),
            capture_output=True,
            text=True,
            timeout=500,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        assert "Traceback" not in done.stderr
        assert (done.stdout + done.stderr).strip(), command
    for code in blocks("python"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert len(done.stdout.splitlines()) >= 2


def test_a_make_rule_trains_once(tmp_path: Path) -> None:
    if shutil.which("make") is None:
        pytest.skip("no make here")
    from tests.conftest import make_tiny

    make_tiny(tmp_path, steps=2).recipe.rename(tmp_path / "mine.yaml")
    rule = blocks("make")[0]
    (tmp_path / "Makefile").write_text(rule)
    for expected in ("gpt pretrain", "up to date"):
        done = subprocess.run(
            ["make", "runs/mine/latest"],
            cwd=tmp_path,
            env=environment(tmp_path),
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert expected in done.stdout


def test_the_make_targets_exist() -> None:
    makes = [c for c in commands() if c.startswith("make")]
    assert makes == ["make quickstart", "make test", "make tour"]
    for command in makes:
        done = subprocess.run([*command.split(), "-n"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_the_wheel_carries_the_recipes(tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    assert "gptcli/serve/page.html" in names
    assert {f"gptcli/recipes/{p.name}" for p in (REPOSITORY / "recipes").glob("*.yaml")} <= set(names)


def test_the_folders_named_are_the_folders_there() -> None:
    listed = set(re.findall(r"^\| `(\w+)/` \|", README, re.MULTILINE))
    tracked = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    there = {line.split("/")[0] for line in tracked.stdout.splitlines() if "/" in line and line[0] != "."}
    assert listed == there

"""Files and folders appear whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gptcli.files import publish_folder, publish_text, read_object


def test_a_folder_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "sub" / "folder"
    publish_folder(target, lambda work: (work / "a").write_text("first"))

    def fail(work: Path) -> None:
        (work / "a").write_text("second")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        publish_folder(target, fail)
    assert [p.name for p in target.parent.iterdir()] == ["folder"]
    assert (target / "a").read_text() == "first"
    publish_folder(target, lambda work: (work / "b").write_text("third"))
    assert [p.name for p in target.iterdir()] == ["b"]


def test_files_may_be_read_by_whom_the_umask_lets(tmp_path: Path) -> None:
    def fill(work: Path) -> None:
        (work / "private").touch(0o600)

    for umask, mode in ((0o022, 0o644), (0o077, 0o600)):
        before = os.umask(umask)
        try:
            publish_folder(tmp_path / "folder", fill)
        finally:
            os.umask(before)
        assert (tmp_path / "folder" / "private").stat().st_mode & 0o777 == mode


def test_a_text_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    publish_text(file, "été")
    with pytest.raises(UnicodeEncodeError):
        publish_text(file, "\ud800")
    assert file.read_text("utf-8") == "été"
    publish_text(file, "new")
    assert file.read_text("utf-8") == "new"


def test_an_object_is_read_or_it_is_said_why_not(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    with pytest.raises(FileNotFoundError):
        read_object(file)
    for content, words in ((b"{", "Expecting"), (b"[1]", "not a JSON object"), (b"\xff", "utf-8")):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=words):
            read_object(file)
    file.write_text('{"a": 1}')
    assert read_object(file) == {"a": 1}

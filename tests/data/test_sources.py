"""Documents from everywhere, and one line for whatever cannot be read."""

from __future__ import annotations

import gzip
import io
import json
import sys
import sysconfig
import types

import pyarrow as pa
import pyarrow.parquet
import pytest

from gptcli import hub
from gptcli.data.sources import SourceReader, list_files, stdlib_files
from gptcli.errors import UserError

ROWS = [{"text": "one", "n": 1}, {"text": "zwei\nZeilen", "n": 2}, {"text": "三", "n": 3}]
TEXTS = [row["text"] for row in ROWS]
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode() + b"\n"


def read(*specs, **options):
    return list(SourceReader([str(s) for s in specs], **options).documents())


def refusal(*specs, **options):
    with pytest.raises(UserError) as caught:
        read(*specs, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def skipped(spec):
    reader = SourceReader([str(spec)], skip_bad=True)
    return list(reader.documents()), reader.skipped.reasons


def pack(path, data):
    kind = {".gz": "gzip", ".zst": "zstd"}[path.suffix]
    with pa.output_stream(str(path), compression=kind) as stream:
        stream.write(data)
    return path


# ---- kinds of files ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.py", "a", "a.log"])
def test_a_plain_file_is_one_document(tmp_path, name):
    (tmp_path / name).write_bytes("é\r\nb\n".encode())
    assert read(tmp_path / name) == ["é\r\nb\n"]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_packed_files_are_unpacked(tmp_path, suffix):
    assert read(pack(tmp_path / f"a.txt{suffix}", "hé".encode())) == ["hé"]
    assert read(pack(tmp_path / f"a.jsonl{suffix}", LINES)) == TEXTS


def test_jsonl(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"\n" + LINES + b"  \n")
    assert read(file) == TEXTS
    file.write_text('{"body": "b", "text": "t"}')
    assert read(file, text_key="body") == ["b"]


def test_parquet(tmp_path):
    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pa.table({"text": [*TEXTS, None], "n": [1, 2, 3, 4]}), file)
    assert read(file) == TEXTS


def test_documents_of_white_space_are_left_out(tmp_path):
    (tmp_path / "a.txt").write_text(" \n\t")
    (tmp_path / "b.jsonl").write_text('{"text": ""}\n{"text": "x"}\n{"text": "  "}\n')
    assert read(tmp_path / "a.txt", tmp_path / "b.jsonl") == ["x"]


# ---- places --------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    for name in ("b.txt", "a.md", "sub/c.py", "skip.csv", "sub/d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    pack(tmp_path / "sub" / "z.jsonl.zst", LINES)
    return tmp_path


def test_a_folder_is_read_whole_and_in_order(folder):
    assert read(folder) == ["a.md", "b.txt", "sub/c.py", "sub/d.txt", *TEXTS]
    assert read(folder / "b.txt", folder / "a.md") == ["b.txt", "a.md"]


def test_globs(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert read("*.txt") == ["b.txt"]
    assert read("**/*.txt") == ["b.txt", "sub/d.txt"]
    (folder / "[odd].txt").write_text("odd")
    assert read("[odd].txt") == ["odd"]  # a name that exists is that file


def test_home_is_expanded(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    assert read("~/b.txt") == ["b.txt"]


def test_stdin_is_one_document_and_can_be_read_twice(monkeypatch):
    stdin = types.SimpleNamespace(buffer=io.BytesIO("hé\n".encode()))
    monkeypatch.setattr(sys, "stdin", stdin)
    reader = SourceReader(["-"])
    assert list(reader.documents()) == list(reader.documents()) == ["hé\n"]
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(b"a\n\xff")))
    assert refusal("-").startswith("<stdin>:2: not UTF-8 (byte 0xff at offset 2)")


def test_the_standard_library():
    files = list_files("python-stdlib")
    assert files == stdlib_files() == sorted(files)
    assert sum(f.stat().st_size for f in files) > 5_000_000
    names = {f.name for f in files}
    assert {"argparse.py", "decimal.py", "base_events.py"} <= names
    for file in files:
        folders = file.parent.relative_to(sysconfig.get_paths()["stdlib"]).parts
        assert not {"test", "tests", "idle_test", "encodings", "site-packages"}.intersection(folders)
        assert not file.name.startswith("test_")


def test_the_standard_library_is_all_readable():
    assert len(read("python-stdlib")) > 400


def test_missing_places(tmp_path):
    assert refusal(tmp_path / "none.txt") == f"{tmp_path}/none.txt: no such file"
    assert "no such file" in refusal(tmp_path / "*.txt")
    assert "did you mean 'python-stdlib'?" in refusal("python-stdlb")
    (tmp_path / "empty").mkdir()
    assert "in this folder" in refusal(tmp_path / "empty")


# ---- bad content ---------------------------------------------------------------------------------


def test_bytes_that_are_not_utf8(tmp_path):
    file = tmp_path / "bad.txt"
    file.write_bytes(b"ab\ncd\nef\xe9gh")
    assert refusal(file).startswith(f"{file}:3: not UTF-8 (byte 0xe9 at offset 8)")
    assert skipped(file)[0] == []
    assert len(skipped(file)[1]) == 1


BAD_LINES = [
    (b'{"text": "a"', "not JSON"),
    (b"[1]", "expected one JSON object"),
    (b'"text"', "expected one JSON object"),
    (b'{"text": "\xff"}', "not UTF-8"),
    (b'{"txet": "a", "n": 1}', "no text column 'text'; did you mean 'txet'?"),
    (b'{"n": 1, "m": 2}', "no text column 'text'; its columns: n, m"),
    (b"{}", "no text column 'text'; its columns: none"),
    (b'{"text": 3}', "3"),
    (b'{"text": null}', "null"),
]


@pytest.mark.parametrize(("line", "complaint"), BAD_LINES)
def test_bad_line_is_named_by_file_and_line(tmp_path, line, complaint):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "ok"}\n\n' + line + b"\n")
    message = refusal(file)
    assert message.startswith(f"{file}:3: ")
    if complaint in ("3", "null"):  # the column is there, and what it holds is no text
        assert "did you mean" not in message
    else:
        assert complaint in message


def test_skip_bad_counts_and_goes_on(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"".join(line + b'\n{"text": "ok"}\n' for line, _ in BAD_LINES))
    texts, reasons = skipped(file)
    assert texts == ["ok"] * len(BAD_LINES)
    assert [r.split(":")[1] for r in reasons] == [str(2 * i + 1) for i in range(len(BAD_LINES))]
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    assert len(skipped(tmp_path)[1]) == len(BAD_LINES) + 1


def test_reading_again_counts_anew(tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    reader = SourceReader([str(tmp_path)], skip_bad=True)
    assert list(reader.documents()) == list(reader.documents()) == []
    assert len(reader.skipped.reasons) == 1


def test_missing_column_of_a_parquet_file(tmp_path):
    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pa.table({"content": ["x"], "texts": ["y"]}), file)
    assert refusal(file) == f"{file}: no text column 'text'; did you mean 'texts'?"
    assert "its columns: content, texts" in refusal(file, text_key="zzz")


def test_parquet_column_that_is_no_text(tmp_path):
    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pa.table({"text": [1, 2]}), file)
    assert str(file) in refusal(file)


@pytest.mark.parametrize("name", ["a.parquet", "a.txt.gz", "a.jsonl.gz", "a.txt.zst", "a.jsonl.zst"])
def test_broken_file_is_named_and_can_be_skipped(tmp_path, name):
    (tmp_path / name).write_bytes(b"no such format")
    (tmp_path / "z.txt").write_text("fine")
    assert str(tmp_path / name) in refusal(tmp_path)
    texts, reasons = skipped(tmp_path)
    assert texts == ["fine"]
    assert len(reasons) == 1


def test_truncated_archive_is_named(tmp_path):
    packed = gzip.compress(LINES * 500)
    (tmp_path / "a.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    assert "a.jsonl.gz" in refusal(tmp_path / "a.jsonl.gz")


# ---- the hub -------------------------------------------------------------------------------------


def test_hub_name_without_a_hub(monkeypatch):
    monkeypatch.setattr(hub, "answers", lambda: False)
    message = refusal("hf:someone/something:config")
    assert "data.source hf:someone/something:config: names a data set on the hub" in message
    assert "python-stdlib" in message


def test_local_dataset_folder(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(hub, "answers", lambda: False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_bytes(LINES)
    (tmp_path / "set" / "test.jsonl").write_text('{"text": "held out"}\n')
    assert read(f"hf:{tmp_path}/set") == TEXTS
    assert read(f"hf:{tmp_path}/set::test") == ["held out"]
    assert "no text column 'texts'; did you mean 'text'?" in refusal(f"hf:{tmp_path}/set", text_key="texts")
    assert "nowhere" in refusal(f"hf:{tmp_path}/set::nowhere")


# ---- fingerprints --------------------------------------------------------------------------------


def test_fingerprint_changes_with_the_files(tmp_path):
    def fingerprint(**options):
        return SourceReader([str(tmp_path)], **options).fingerprint()

    (tmp_path / "a.txt").write_text("a")
    before = fingerprint()
    assert fingerprint() == before
    assert fingerprint(text_key="body") != before
    assert fingerprint(skip_bad=True) != before
    (tmp_path / "b.txt").write_text("b")
    assert fingerprint() != before


def test_fingerprint_of_a_local_dataset_changes_with_its_files(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(LINES)
    before = SourceReader([f"hf:{tmp_path}"]).fingerprint()
    (tmp_path / "train.jsonl").write_bytes(LINES * 2)
    assert SourceReader([f"hf:{tmp_path}"]).fingerprint() != before

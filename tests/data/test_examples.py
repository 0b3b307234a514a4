"""Examples come from every kind of file the same, and a bad one is known by its file, line and reason."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptcli.config.schema import DataBlock
from gptcli.data.examples import ExampleReader, Examples, open_examples, report_skipped
from gptcli.errors import UserError

ROWS = [{"text": f"row {i}", "label": i} for i in range(200)]


def parse(row: dict[str, Any]) -> str:
    if not isinstance(row.get("text"), str):
        raise UserError("no 'text'")
    return row["text"]


def read(path: Path | str, **options: Any) -> list[tuple[str, str]]:
    return [(e.place, e.value) for e in ExampleReader([str(path)], parse, **options)]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_every_kind_of_file_gives_the_same_examples(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    lines = write(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.read_bytes()))
    with pyarrow.CompressedOutputStream(str(tmp_path / "a.jsonl.zst"), "zstd") as stream:
        stream.write(lines.read_bytes())
    (tmp_path / "a.json").write_text(json.dumps(ROWS, indent=2))
    (tmp_path / "b.json").write_bytes(lines.read_bytes())
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    expected = [row["text"] for row in ROWS]
    for path in sorted(tmp_path.iterdir()):
        assert [value for _, value in read(path)] == expected, path
    folder = ExampleReader([str(tmp_path)], parse)
    assert len(list(folder)) == 6 * len(ROWS)


def test_a_hub_dataset_is_read_by_its_folder(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", ROWS[:3])
    assert read(f"hf:{tmp_path}") == [(f"hf:{tmp_path} row {n}", f"row {n - 1}") for n in (1, 2, 3)]


def test_stdin_is_a_source(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stdin:
        buffer = io.BytesIO(b'{"text": "a"}\n')

    monkeypatch.setattr("sys.stdin", Stdin())
    assert read("-") == [("<stdin>:1", "a")]


@given(st.lists(st.dictionaries(st.text(), st.text() | st.integers(), max_size=3)), st.sampled_from([None, 0, 3]))
def test_items_of_an_array_are_known_by_their_line(rows: list[dict[str, Any]], indent: int | None) -> None:
    import tempfile

    text = json.dumps(rows, indent=indent)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.json"
        path.write_text(text)
        examples = list(ExampleReader([str(path)], lambda row: row))
    assert [e.value for e in examples] == rows
    lines = text.split("\n")
    for example in examples:
        assert "{" in lines[int(example.place.rpartition(":")[2]) - 1]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not JSON"),
        ("[1]", "expected one JSON object a line"),
        ('{"label": 1}', "no 'text'"),
        ('{"text": "\\ud800"}', "half of a surrogate pair"),
    ],
)
def test_a_bad_line_is_named_or_skipped_and_counted(tmp_path: Path, line: str, reason: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "good"}}\n\n{line}\n{{"text": "too"}}\n')
    with pytest.raises(UserError, match=f"a.jsonl:3: .*{reason}"):
        read(path)
    said: list[str] = []
    examples = open_examples(DataBlock(train=[str(path)], skip_bad=True, val_fraction=0.0), parse)
    assert [e.value for e in examples.train] == ["good", "too"]
    report_skipped(examples.skipped, said.append)
    assert said[0] == "skipped 1 bad examples:"
    assert f"{path}:3: " in said[1]
    assert reason in said[1]


def test_a_broken_array_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[\n{"text": "a"},\n{"text": \n]')
    with pytest.raises(UserError, match=r"a.json:3: not JSON"):
        read(path)


def test_many_skipped_are_counted_and_the_first_listed() -> None:
    said: list[str] = []
    report_skipped([f"bad {i}" for i in range(9)], said.append)
    assert said == ["skipped 9 bad examples:", *(f"  bad {i}" for i in range(5)), "  and 4 more"]


def test_columns_of_other_names(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"body": "x"}])
    assert read(path, columns={"text": "body"}) == [(f"{path}:1", "x")]
    with pytest.raises(UserError, match=r"a.jsonl:1: no column 'bady' \(data.columns\); did you mean 'body'\?"):
        read(path, columns={"text": "bady"})


def opened(path: Path, **keys: Any) -> Examples[str]:
    return open_examples(DataBlock(source=[str(path)], **keys), parse)


def test_the_split_is_by_each_object_so_that_more_rows_move_none(tmp_path: Path) -> None:
    few = opened(write(tmp_path / "few.jsonl", ROWS[:100]), val_fraction=0.2)
    many = opened(write(tmp_path / "many.jsonl", ROWS[::-1]), val_fraction=0.2)
    assert {e.value for e in few.val} == {e.value for e in many.val} & {r["text"] for r in ROWS[:100]}
    assert 20 < len(many.val) < 60
    tail = opened(tmp_path / "few.jsonl", val_fraction=0.2, split="tail")
    assert [e.value for e in tail.val] == [f"row {i}" for i in range(80, 100)]


def test_train_and_val_files(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.jsonl", ROWS[:5]), write(tmp_path / "b.jsonl", ROWS[5:8])
    examples = open_examples(DataBlock(train=[str(a)], val=[str(b)]), parse)
    assert (len(examples.train), len(examples.val)) == (5, 3)
    other = open_examples(DataBlock(train=[str(a)], val=[str(a)]), parse)
    assert examples.hash != other.hash


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (DataBlock(), "nothing to train on"),
        (DataBlock(path="tokens"), "hold tokens"),
        (DataBlock(source=["empty.jsonl"]), "nothing to train on: it is empty"),
        (DataBlock(source=["nowhere.jsonl"]), "no such file"),
        (DataBlock(source=["bad.jsonl"], skip_bad=True), "nothing to train on: all of it is bad"),
    ],
)
def test_nothing_to_train_on_is_said(
    data: DataBlock, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "bad.jsonl").write_text("{\n")
    with pytest.raises(UserError, match=reason):
        open_examples(data, parse)

"""Files of prompts: a line's text is its own, rows keep the input's order, and a stopped file goes on as if never
stopped."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from gptcli.config.schema import ModelConfig, SamplingParams
from gptcli.errors import UserError
from gptcli.generate import Engine, complete, rowfile
from gptcli.generate.pipeline import WINDOW, complete_in_order, generate_rows, made_by
from gptcli.generate.prompts import read_jobs
from gptcli.generate.rowfile import RowFile, begun_with, meta_path
from gptcli.model import GPT
from gptcli.tokenizer.build import byte_tokenizer, char_tokenizer
from gptcli.tokenizer.chat_template import render_chat

PARAMS = SamplingParams(max_new_tokens=12, seed=3, logit_bias={"<|endoftext|>": 2.0})


def make_engine(seed: int = 3) -> Engine:
    model = GPT(ModelConfig(n_layer=2, n_head=2, n_embd=32, context_length=64, vocab_size=257, init_std=0.2))
    model.init_weights(seed)
    return Engine(model.eval(), byte_tokenizer())


@pytest.fixture(scope="module")
def engine() -> Engine:
    return make_engine()


def fail(error: UserError) -> None:
    raise error


def some_lines(count: int = 40) -> list[dict[str, Any]]:
    rng = random.Random(5)
    changes: list[dict[str, Any]] = [
        {}, {}, {}, {"max_new_tokens": 3}, {"temperature": 0.0}, {"seed": 9, "top_k": 5}, {"max_new_tokens": 40},
        {"stop": ["e"]}, {"repetition_penalty": 1.5}, {"best_of": 3}, {"num_beams": 2, "temperature": 1.0},
    ]  # fmt: skip
    return [{"id": f"q{i}", "prompt": f"line {rng.random()}", **rng.choice(changes)} for i in range(count)]


def write_lines(path: Path, lines: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def rows_of(engine: Engine, source: str, params: SamplingParams = PARAMS, **options: Any) -> list[dict[str, Any]]:
    written: list[bytes] = []
    options.setdefault("on_bad", fail)
    for _ in generate_rows(engine, source, params, written.append, **options):
        pass
    return [json.loads(line) for line in written]


# ---- what a line's text depends on ------------------------------------------------------------------------------


@pytest.mark.parametrize("max_rows", [1, 2, 7, 64])
@pytest.mark.parametrize("shuffle", [0, 1, 2])
def test_neither_batch_nor_place_change_a_text(engine: Engine, tmp_path: Path, max_rows: int, shuffle: int) -> None:
    lines = some_lines()
    expected = {row["id"]: row for row in rows_of(engine, write_lines(tmp_path / "a.jsonl", lines))}
    assert len({row["text"] for row in expected.values()}) > 30
    if shuffle:
        random.Random(shuffle).shuffle(lines)
    rows = rows_of(engine, write_lines(tmp_path / "b.jsonl", lines), max_rows=max_rows)
    assert [row["id"] for row in rows] == [line["id"] for line in lines]
    for row in rows:
        score = row.pop("score", None)
        assert score == pytest.approx(expected[row["id"]].get("score"))
        assert row == {k: v for k, v in expected[row["id"]].items() if k != "score"}


def test_a_line_gets_what_it_would_get_alone(engine: Engine, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", some_lines())
    rows = rows_of(engine, source, logprobs=True)
    tokenizer = engine.require_tokenizer()
    for row, job in zip(rows, read_jobs(source, PARAMS, tokenizer, on_bad=fail), strict=True):
        alone = complete(engine, [job.prompt], job.params, [job.stream])[0]
        assert (row["prompt"], row["text"], row["finish_reason"]) == (job.prompt, alone.text, alone.finish_reason)
        assert row["tokens"] == len(alone.ids)
        assert row["logprobs"] == pytest.approx(alone.logprobs, abs=1e-4)
        assert row.get("params", {}) == job.changes


def test_equal_prompts_of_different_ids_differ(engine: Engine, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", [{"prompt": "same", "id": i} for i in range(6)])
    assert len({row["text"] for row in rows_of(engine, source)}) > 4
    unnamed = write_lines(tmp_path / "b.jsonl", [{"prompt": "same"} for _ in range(6)])
    rows = rows_of(engine, unnamed)
    assert [row["id"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert len({row["text"] for row in rows}) > 4


def test_no_more_than_a_window_is_read_ahead(engine: Engine, tmp_path: Path) -> None:
    slow = {"prompt": "slow", "max_new_tokens": 200, "ignore_eos": True}
    lines = [slow, *({"prompt": "quick", "max_new_tokens": 1} for _ in range(99))]
    source = write_lines(tmp_path / "a.jsonl", lines)
    read = 0

    def counted():
        nonlocal read
        for job in read_jobs(source, PARAMS, engine.require_tokenizer(), on_bad=fail):
            read += 1
            yield job

    done = complete_in_order(engine, counted(), max_rows=3)
    assert next(done)[0].prompt == "slow"
    assert read == 3 * WINDOW
    assert len(list(done)) == 99


def test_lines_are_held_to_constraints_of_their_own(engine: Engine, tmp_path: Path) -> None:
    constraints = [{"choices": ["yes", "no"]}, {"regex": "[0-9]{3}"}, {"json_schema": {"enum": [["a"]]}}, {}]
    lines = [{"prompt": f"{i}", **constraints[i % 4]} for i in range(12)]
    rows = rows_of(engine, write_lines(tmp_path / "a.jsonl", lines), max_rows=5)
    assert {row["text"] for row in rows[0::4]} <= {"yes", "no"}
    assert all(row["text"].isdecimal() for row in rows[1::4])
    assert {row["text"] for row in rows[2::4]} == {'["a"]'}
    bad = write_lines(tmp_path / "b.jsonl", [{"prompt": "x", "regex": "a("}])
    with pytest.raises(UserError, match=r"b\.jsonl:1: regex: unclosed group"):
        rows_of(engine, bad)


# ---- kinds of input ---------------------------------------------------------------------------------------------


def test_compressed_and_plain_files_are_read_alike(engine: Engine, tmp_path: Path) -> None:
    import pyarrow

    plain = write_lines(tmp_path / "a.jsonl", some_lines(9))
    expected = rows_of(engine, plain)
    for codec, ending in (("gzip", "gz"), ("zstd", "zst")):
        packed = tmp_path / f"b.jsonl.{ending}"
        with pyarrow.output_stream(str(packed), compression=codec) as stream:
            stream.write(Path(plain).read_bytes())
        assert rows_of(engine, str(packed)) == expected


def test_lines_of_text_are_prompts(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("one\r\n\n {two\nünf".encode())
    rows = rows_of(engine, str(tmp_path / "a.txt"))
    assert [(row["id"], row["prompt"]) for row in rows] == [(1, "one"), (3, " {two"), (4, "ünf")]


# ---- bad lines --------------------------------------------------------------------------------------------------


def test_messages_are_written_in_the_chat_template(engine: Engine, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}]
    row = rows_of(engine, write_lines(tmp_path / "in.jsonl", [{"id": "a", "messages": messages}]))[0]
    assert row["prompt"] == render_chat(engine.require_tokenizer(), messages)
    assert "hi" in row["prompt"]
    assert row["tokens"] > 0


BAD = {
    '{"prompt": "x", "temprature": 1}': "unknown key 'temprature'; did you mean 'temperature'?",
    '{"prompt": "x", "zzz": 1}': "unknown key 'zzz'; expected id, prompt, messages or a key of sampling",
    '{"prompt": "x", "top_p": 2}': "top_p: must be at most 1, not 2",
    '{"prompt": "x", "top_k": "many"}': "top_k: expected a whole number, not 'many'",
    '{"prompt": "x", "min_new_tokens": 99}': "min_new_tokens: 99 is more than max_new_tokens 12",
    '{"prompt": "x", "logit_bias": {"ab": 1}}': "logit_bias: 'ab' is 2 tokens",
    '{"prompt": "x", "best_of": 2, "num_return": 2}': "num_return: each line gets one text",
    '{"prompt": "x", "on_overflow": "refuse", "max_new_tokens": 99}': "exceed the context of 64",
    '{"prompt": 7}': "prompt: expected text, not 7",
    '{"id": [1], "prompt": "x"}': "id: expected text or a whole number, not [1]",
    '{"id": true, "prompt": "x"}': "id: expected text or a whole number, not true",
    '{"id": "x"}': "give a prompt or messages",
    '{"prompt": "x", "messages": []}': "give a prompt or messages",
    '{"messages": []}': "messages: expected a list of {role, content}",
    '{"messages": [{"role": "user"}]}': "messages: expected a list of {role, content}",
    '{"prompt": "\\ud800"}': "half of a surrogate pair",
    '{"id": "\\ud800", "prompt": "x"}': "half of a surrogate pair",
    "[1]": "expected one JSON object a line",
    "{": "not JSON",
}


@pytest.mark.parametrize("line", BAD)
def test_a_bad_line_is_named_and_those_before_it_are_written(engine: Engine, tmp_path: Path, line: str) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text('{"prompt": "a"}\n\n{"prompt": "b"}\n' + line + '\n{"prompt": "c"}\n')
    written: list[bytes] = []
    with pytest.raises(UserError) as raised:
        list(generate_rows(engine, str(source), PARAMS, written.append, on_bad=fail))
    assert str(raised.value).startswith(f"{source}:4: ")
    assert BAD[line] in str(raised.value)
    assert "\n" not in str(raised.value)
    assert [json.loads(row)["prompt"] for row in written] == ["a", "b"]
    bad: list[UserError] = []
    assert [row["prompt"] for row in rows_of(engine, str(source), on_bad=bad.append)] == ["a", "b", "c"]
    assert [str(error) for error in bad] == [str(raised.value)]


def test_bytes_that_are_no_text_and_damaged_files(engine: Engine, tmp_path: Path) -> None:
    for name in ("a.txt", "a.jsonl"):
        (tmp_path / name).write_bytes(b'{"prompt": "a"}\n{"prompt": "\xff"}\n')
        with pytest.raises(UserError, match=rf"{name}:2: not UTF-8"):
            rows_of(engine, str(tmp_path / name))
    (tmp_path / "a.jsonl.gz").write_bytes(b"\x1f\x8b\x08\x00 no gzip")
    with pytest.raises(UserError, match=r"a\.jsonl\.gz: damaged or cut short"):
        rows_of(engine, str(tmp_path / "a.jsonl.gz"))
    with pytest.raises(UserError, match=r"nowhere\.jsonl"):
        rows_of(engine, str(tmp_path / "nowhere.jsonl"))


def test_a_character_that_the_tokenizer_lacks_is_a_bad_line(tmp_path: Path) -> None:
    model = GPT(ModelConfig(n_layer=1, n_head=1, n_embd=8, context_length=16, vocab_size=5))
    source = write_lines(tmp_path / "a.jsonl", [{"prompt": "abc"}, {"prompt": "abX"}])
    with pytest.raises(UserError, match=r"a\.jsonl:2: character 'X' is not in"):
        rows_of(Engine(model.eval(), char_tokenizer(["abcd"])), source, SamplingParams(max_new_tokens=2))


# ---- going on ---------------------------------------------------------------------------------------------------


def into_file(engine: Engine, source: str, out: Path, *, stop_after: int | None = None, **options: Any) -> int:
    """Rows into a file as the command does; how many were made, not found."""
    made, rows = 0, made_by(engine, PARAMS, logprobs=False)
    with RowFile(out, rows, **options) as file:
        for done in generate_rows(engine, source, PARAMS, file.write, on_bad=fail, resume=file, max_rows=4):
            made += done is not None
            if made == stop_after:
                break
    return made


def test_cut_anywhere_the_file_goes_on_to_the_same_bytes(engine: Engine, tmp_path: Path) -> None:
    source, whole, out = write_lines(tmp_path / "a.jsonl", some_lines(12)), tmp_path / "whole", tmp_path / "out"
    assert into_file(engine, source, whole) == 12
    expected = whole.read_bytes()
    for cut in random.Random(1).sample(range(len(expected)), 15):
        meta_path(out).write_bytes(meta_path(whole).read_bytes())
        out.write_bytes(expected[:cut])
        assert into_file(engine, source, out) == 12 - expected[:cut].count(b"\n")
        assert out.read_bytes() == expected
    assert into_file(engine, source, out) == 0


def test_lines_mended_or_added_after_those_done_go_on(engine: Engine, tmp_path: Path) -> None:
    lines, out = some_lines(8), tmp_path / "out"
    into_file(engine, write_lines(tmp_path / "a.jsonl", lines[:5]), out)
    assert into_file(engine, write_lines(tmp_path / "a.jsonl", lines), out) == 3
    assert [json.loads(row)["id"] for row in out.read_text().splitlines()] == [line["id"] for line in lines]


@pytest.mark.parametrize("change", [{"prompt": "other"}, {"id": "other"}, {"temperature": 0.25}])
def test_rows_of_another_input_are_refused(engine: Engine, tmp_path: Path, change: dict[str, Any]) -> None:
    lines, out = some_lines(6), tmp_path / "out"
    into_file(engine, write_lines(tmp_path / "a.jsonl", lines), out, stop_after=4)
    before = out.read_bytes()
    lines[2] = {"id": lines[2]["id"], "prompt": lines[2]["prompt"], **change}
    changed = write_lines(tmp_path / "a.jsonl", lines)
    with pytest.raises(UserError, match=r"out:3: its row is of another input than .*a\.jsonl:3; .*--overwrite"):
        into_file(engine, changed, out)
    with pytest.raises(UserError, match=r"out:3: its row is of another input than the input's end"):
        into_file(engine, write_lines(tmp_path / "b.jsonl", some_lines(2)), out)
    assert out.read_bytes() == before
    assert into_file(engine, changed, out, overwrite=True) == 6


def test_another_model_or_parameter_is_refused(engine: Engine, tmp_path: Path) -> None:
    source, out = write_lines(tmp_path / "a.jsonl", some_lines(4)), tmp_path / "out"
    into_file(engine, source, out)
    assert begun_with(out, "seed") == 3
    with pytest.raises(UserError, match='out: was begun with checkpoint "'):
        into_file(make_engine(seed=4), source, out)
    with pytest.raises(UserError, match="out: was begun with logprobs false, now it is true"):
        RowFile(out, made_by(engine, PARAMS, logprobs=True))
    meta_path(out).write_text("{")
    with pytest.raises(UserError, match=r"out\.meta\.json: damaged"):
        into_file(engine, source, out)
    meta_path(out).unlink()
    with pytest.raises(UserError, match=r"out: exists, and no out\.meta\.json says what made it"):
        into_file(engine, source, out)


def test_only_one_process_writes_a_file(tmp_path: Path) -> None:
    with RowFile(tmp_path / "out", {}), pytest.raises(UserError, match="out: another process is writing it"):
        RowFile(tmp_path / "out", {})
    with pytest.raises(UserError, match="is a folder"):
        RowFile(tmp_path, {})
    with pytest.raises(UserError, match="the folder it should be in is missing"):
        RowFile(tmp_path / "no" / "out", {})


def test_beginning_anew_leaves_no_old_row_under_the_new_description(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever stops it between the two."""
    source, out = write_lines(tmp_path / "a.jsonl", some_lines(3)), tmp_path / "out"
    into_file(engine, source, out)
    monkeypatch.setattr(rowfile, "_write_meta", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        into_file(engine, write_lines(tmp_path / "b.jsonl", some_lines(2)), out, overwrite=True)
    assert out.read_bytes() == b""


def test_a_damaged_row_is_named(engine: Engine, tmp_path: Path) -> None:
    source, out = write_lines(tmp_path / "a.jsonl", some_lines(4)), tmp_path / "out"
    into_file(engine, source, out)
    rows = out.read_bytes().splitlines(keepends=True)
    for broken in (b"{]\n", b"[1]\n", b"\n"):
        out.write_bytes(rows[0] + broken + rows[2])
        with pytest.raises(UserError, match=r"out:2: damaged"):
            into_file(engine, source, out)

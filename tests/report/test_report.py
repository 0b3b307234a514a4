"""A run's page holds what the run does; results of the same questions share a line."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from gptcli.errors import UserError
from gptcli.eval.results import Aggregate, Result, write_results
from gptcli.report.chart import MOST_POINTS, chart, short, thin, ticks
from gptcli.report.page import Section, page, table
from gptcli.report.results import results_of_run, results_table
from gptcli.report.run import lineage_of, read_run, run_page, run_row, sections
from tests.conftest import Tiny, gpt, make_tiny


def make(checkpoint: str, value: float, *, task: str = "t", prompts: str = "p", **settings) -> Result:
    return Result(
        task, {"acc": value, "acc_norm": 0.5}, 1000, checkpoint, "h", prompts, stderr={"acc": 0.01},
        aggregates={"acc": Aggregate("acc")}, settings=settings,
    )  # fmt: skip


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A run, and one that began with its weights."""
    tiny = make_tiny(tmp_path_factory.mktemp("family"), steps=10)
    tiny.train("train.sample_every=5", "train.sample_prompt=<b>line</b>", "sampling.max_new_tokens=8")
    tiny.train("run.name=child", f"init_from={tiny.run_dir}", "model=null", "tokenizer=null", "train.max_steps=4")
    return tiny


def is_well_formed(html: str) -> bool:
    """Every tag that opens is closed, in order; nothing comes from a network."""
    open_tags: list[str] = []

    class Parser(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            assert not any(name in ("src", "href") for name, _ in attrs)
            if tag not in ("meta", "path"):
                open_tags.append(tag)

        def handle_endtag(self, tag: str) -> None:
            if tag != "path":
                assert open_tags.pop() == tag

    Parser().feed(html)
    return not open_tags and "http" not in html and "@import" not in html


def test_the_page_of_a_run(family: Tiny) -> None:
    run = read_run(family.run_dir, [make("c", 0.25)])
    html = run_page(run)
    assert is_well_formed(html)
    assert [s.title for s in sections(run)] == ["Overview", "Curves", "Evaluation", "Samples", "Lineage", "Recipe"]
    for words in (
        "10",
        "0.25 ± 0.01",
        "&lt;b&gt;line&lt;/b&gt;",
        "step 5",
        "learning rate",
        "gradient norm",
        "n_layer: 2",
    ):
        assert words in html
    assert "<b>line" not in html
    assert html.count("<svg") == 4  # and tokens per second, which every stage logs
    last = family.metrics()[-1]
    assert f"{last['loss']:.4f}" in html
    assert re.search(r"Data&#x27;s hash</th><td>\w{8}", html)


def test_the_row_for_scripts(family: Tiny) -> None:
    row = run_row(read_run(family.run_dir, []))
    assert row["last"]["step"] == 10
    assert row["samples"] == 2
    assert row["best_val_loss"] == min(r["val_loss"] for r in family.metrics() if "val_loss" in r)
    json.dumps(row)


def test_lineage_follows_parents(family: Tiny) -> None:
    chain = lineage_of(family.run_dir.parent / "child")
    assert [Path(link.checkpoint).parent.name for link in chain] == ["child", "tiny"]
    assert ("Started from", str((family.run_dir / "latest").resolve())) in chain[0].facts


def test_lineage_ends_where_a_parent_is_gone(family: Tiny, tmp_path: Path) -> None:
    moved = tmp_path / "child"
    shutil.copytree(family.run_dir.parent / "child", moved, symlinks=True)
    state = next(moved.glob("step-*/training/state.json"))
    state.write_text(json.dumps(json.loads(state.read_text()) | {"parent": "runs/gone"}))
    assert lineage_of(moved)[-1].facts == [("", "no longer here")]
    state.write_text(json.dumps(json.loads(state.read_text()) | {"parent": str(moved)}))
    assert len(lineage_of(moved)) == 1  # no circle


def test_results_that_lie_in_a_run_are_found(tmp_path: Path) -> None:
    (tmp_path / "eval").mkdir()
    write_results(tmp_path / "a.json", [make("c", 0.1)])
    write_results(tmp_path / "eval/b.json", [make("c", 0.2)])
    (tmp_path / "other.json").write_text("{}")
    assert [r.metrics["acc"] for r in results_of_run(tmp_path)] == [0.1, 0.2]


def test_only_the_same_questions_share_a_line() -> None:
    rows = results_table([make("a", 0.1), make("b", 0.2), make("b", 0.3, task="u")])
    assert rows == [
        ["task", "metric", "n", "a", "b"],
        ["t", "acc", "1,000", "0.1 ± 0.01", "0.2 ± 0.01"],
        ["u", "acc", "1,000", "", "0.3 ± 0.01"],
    ]
    shots = results_table([make("a", 0.1, num_fewshot=0), make("a", 0.2, prompts="q" * 64, num_fewshot=5)])
    assert [row[0] for row in shots[1:]] == ["t (0-shot)", "t (5-shot)"]
    hashes = results_table([make("a", 0.1, prompts="x" * 64), make("a", 0.2, prompts="q" * 64)])
    assert [row[0] for row in hashes[1:]] == ["t (xxxxxxxx)", "t (qqqqqqqq)"]
    assert [row[1] for row in results_table([make("a", 0.1)], main_only=False)[1:]] == ["acc", "acc_norm"]


@pytest.mark.parametrize(("low", "high"), [(0, 1), (2.3, 2.9), (0, 1_000_000), (1e-5, 3e-4), (5, 5), (-3, 2)])
def test_ticks_are_few_and_enclose(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 2 <= len(found) <= 8
    assert found[0] <= low
    assert found[-1] >= high


def test_charts() -> None:
    points = [(i * 100.0, 5 - i / 1000) for i in range(3000)]
    svg = chart("loss", {"loss": points, "val_loss": [], "nan": [(0, float("nan"))]}, xlabel="tokens")
    assert svg.count('<path class="s') == 1
    assert len(thin(points)) <= MOST_POINTS + 1
    assert thin(points)[-1] == points[-1]
    assert chart("one", {"a": [(1, 2)]}, xlabel="x") == ""
    assert [short(v) for v in (0, 0.00012, 12.5, 20_000, 1.5e6, -3e9)] == ["0", "0.00012", "12.5", "20k", "1.5M", "-3G"]


def test_pages_escape_and_leave_out_what_is_empty() -> None:
    html = page("<x>", [Section("A&B", table([["<i>", "1"]])), Section("none", "")])
    assert is_well_formed(html)
    assert "&lt;x&gt;" in html
    assert "<th>&lt;i&gt;</th><td>1</td>" in html
    assert "none</h2>" not in html


def test_the_verb(family: Tiny, tmp_path: Path) -> None:
    write_results(tmp_path / "r.json", [make("base", 0.25)])
    done = gpt("report", family.run_dir, tmp_path / "r.json", "-o", tmp_path / "x.html")
    assert done.code == 0, done.err
    assert done.out == f"{tmp_path / 'x.html'}\n"
    assert is_well_formed((tmp_path / "x.html").read_text())
    done = gpt("report", family.run_dir, tmp_path / "r.json")
    assert "Training loss" in done.out
    assert "0.25 ± 0.01" in done.out
    row = gpt("report", tmp_path / "r.json", "--json").json()
    assert row["results"][0]["acc"] == 0.25


def test_mistakes_take_one_line(family: Tiny, tmp_path: Path) -> None:
    for arguments, words in [
        ([tmp_path], "neither a run (no recipe.yaml)"),
        ([family.run_dir, "-o", tmp_path / "x.pdf"], "ends in .html"),
        ([family.run_dir, "-o", tmp_path / "no" / "x.html"], "in a folder that is there"),
        ([family.recipe], "not JSON"),
    ]:
        done = gpt("report", *arguments)
        assert done.code == 2
        assert words in done.err
        assert len(done.err.splitlines()) == 1


def test_read_run_refuses_other_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither a run"):
        read_run(tmp_path, [])

"""gpt inspect on the real command line: lines, JSON, pictures, and one line for each mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import gptcli
from tests.cli.test_main import complains
from tests.conftest import gpt


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ./runs/tiny in it: 2 layers, 2 heads, 16 tokens of context, bytes."""
    from tests.conftest import make_tiny

    tiny = make_tiny(tmp_path_factory.mktemp("trained"), steps=60)
    tiny.train()
    return tiny.folder


def row(*arguments: str, cwd: Path) -> dict:
    done = gpt("inspect", *arguments, "--json", "-q", cwd=cwd)
    assert (done.code, done.err) == (0, ""), done
    return json.loads(done.out)


def test_next_is_the_softmax_of_the_logits(trained: Path) -> None:
    found = row("next", "line 7: the squar", "--top", "3", "--top-k", "2", cwd=trained)
    model = gptcli.load(trained / "runs/tiny")
    ids = model.engine.encode_prompt("line 7: the squar")
    # 17 tokens in a context of 16: the model sees the last 9, as when it generates
    probabilities = model.forward(torch.tensor([ids[8:]])).logits[0, -1].softmax(-1)
    said = gpt("inspect", "next", "line 7: the squar", cwd=trained).err
    assert "of the text's 17 tokens the model sees the last 9" in said
    expected = probabilities.topk(3)
    assert [t["id"] for t in found["tokens"]] == expected.indices.tolist()
    assert [t["probability"] for t in found["tokens"]] == pytest.approx(expected.values.tolist(), rel=1e-4)
    assert found["tokens"][0]["text"] == "e"
    assert [t["sampled_probability"] > 0 for t in found["tokens"]] == [True, True, False]
    assert found["others"] == pytest.approx(1 - expected.values.sum().item(), abs=1e-5)


def test_next_in_a_pipe(trained: Path) -> None:
    done = gpt("inspect", "next", "--top", "4", "-q", cwd=trained, stdin=b"line 7: the\n", COLUMNS="60")
    lines = done.out.splitlines()
    assert lines[0].startswith("␣")
    assert "█" in lines[0]
    assert "\x1b" not in done.out
    assert len(lines) == 5
    assert max(map(len, lines[:-1])) <= 60
    assert lines[-1].startswith("the others ")


def test_attention_lines_and_json(trained: Path) -> None:
    found = row("attention", "line 7: the", "--layer", "1", cwd=trained)
    assert (found["layers"], found["heads"], found["token"]) == ([1], [0, 1], 10)
    weights = torch.tensor(found["weights"])
    assert weights.shape == (1, 2, 11, 11)
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 2, 11), atol=1e-4, rtol=0)
    assert "".join(t["text"] for t in found["tokens"]) == "line 7: the"
    assert row("attention", "line 7: the", "--word", "line", cwd=trained)["token"] == 3
    all_layers = gpt("inspect", "attention", "line 7: the", "--token", "4", "-q", cwd=trained).out
    assert all_layers.startswith("␣ (token 4) looks at\nmean of 2 heads\nlayer 0  ")
    assert "each head's first choice" in all_layers
    one = gpt("inspect", "attention", "line 7: the", "--layer", "0", "--head", "1", "-q", cwd=trained).out
    assert len(one.splitlines()) == 2 + 11


def test_layers_end_with_what_comes_next(trained: Path) -> None:
    found = row("layers", "line 7: the", cwd=trained)
    assert [r["layer"] for r in found["layers"]] == ["embedding", "layer 0", "layer 1"]
    expected = row("next", "line 7: the", "--top", "3", cwd=trained)
    for ours, theirs in zip(found["layers"][-1]["tokens"], expected["tokens"], strict=True):
        assert ours["id"] == theirs["id"]
        assert ours["probability"] == pytest.approx(theirs["probability"], rel=1e-4)
    assert found["layers"][-1]["entropy"] == pytest.approx(expected["entropy"], rel=1e-4)
    table = gpt("inspect", "layers", "line 7: the", "-q", cwd=trained).out.splitlines()
    assert [line.split("  ")[0] for line in table] == ["after", "embedding", "layer 0", "layer 1"]


def test_embedding_in_all_its_modes(trained: Path) -> None:
    near = row("embedding", "1", "1 - 2 + 3", "--top", "2", cwd=trained)["words"]
    assert [w["word"] for w in near] == ["1", "1 - 2 + 3"]
    assert all(len(w["neighbours"]) == 2 for w in near)
    assert not {"1", "2", "3"} & {t["text"] for t in near[1]["neighbours"]}
    projected = row("embedding", "--direction", "2 - 1", "2", "1", cwd=trained)["words"]
    assert projected[0]["projection"] > 0 > projected[1]["projection"]
    inside = row("embedding", "--in", "line 7: a", "7", "--top", "1", cwd=trained)
    assert inside["token"] == 5
    assert [r["layer"] for r in inside["layers"]] == ["embedding", "layer 0", "layer 1"]
    (trained / "q.txt").write_text(": digits\n1 2 3 4\n1 2 10 11\n")
    found = row("embedding", "--analogies", "q.txt", cwd=trained)
    assert (found["n"], found["skipped"]) == (1, 1)
    assert found["sections"][0]["name"] == "digits"
    table = gpt("inspect", "embedding", "--analogies", "q.txt", "-q", cwd=trained).out.splitlines()
    assert [line.split()[0] for line in table] == ["section", "digits", "total", "skipped:"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("next", "line 7", "-o", "x.png"),
        ("attention", "line 7", "-o", "x.html"),
        ("attention", "line 7", "-o", "x.png"),
        ("layers", "line 7", "-o", "x.png"),
        ("embedding", "1", "-o", "x.png"),
        ("embedding", "1", "2", "3", "4", "-o", "x.png"),
        ("embedding", "1", "2", "--direction", "1 - 2", "-o", "x.png"),
    ],
)
def test_pictures(trained: Path, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    done = gpt("inspect", *arguments, "-c", trained / "runs/tiny", cwd=tmp_path)
    assert (done.code, done.err, done.out) == (0, "", arguments[-1] + "\n")
    assert (tmp_path / arguments[-1]).stat().st_size > 2000
    assert row(*arguments, "-c", str(trained / "runs/tiny"), cwd=tmp_path)["path"] == arguments[-1]


def test_mistakes_are_one_line(trained: Path, tmp_path: Path) -> None:
    def refuses(*arguments: str, words: str) -> None:
        complains(["inspect", *arguments, "-q"], words, cwd=trained)

    refuses("next", "x", "--top-p", "1.5", words="top_p")
    refuses("next", "x", "-o", "x.jpg", words="-o x.jpg: expected a name that ends in .png")
    refuses("attention", "x", "-o", "no/x.html", words="no such folder: no")
    refuses("attention", "x", "--layer", "2", words="--layer 2: the model has 2, numbered 0 to 1")
    refuses("attention", "x", "--head", "7", words="--head 7: the model has 2")
    refuses("attention", "x", "--token", "1", words="--token 1: the text has 1")
    refuses("attention", "x", "--word", "y", words="'y' is not in the text 'x'")
    refuses("attention", "x", "--word", "x", "--token", "0", words="give one")
    refuses("attention", "x" * 17, words="the text has 17 tokens, this model looks at 16")
    refuses("layers", "x" * 17, words="the text has 17 tokens")
    refuses("embedding", words="no word given")
    refuses("embedding", "king", words="'king' is no single token of this model (k, i, n, g)")
    refuses("embedding", "a", "--in", "a b", "--direction", "a - b", words="--direction and --in: give one")
    refuses("embedding", "a", "--analogies", "q", words="give no others")
    refuses("embedding", "a", "b", "--in", "a b", words="one word of the text, not 2")
    refuses("embedding", "a", "--in", "a b", "-o", "x.png", words="--in: has no picture")
    refuses("embedding", "--analogies", "missing.txt", words="missing.txt: No such file")
    complains(["inspect", "next", "x"], "no checkpoint", cwd=tmp_path)


def test_a_model_without_a_tokenizer(trained: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(trained / "runs/tiny/latest", copy)
    (copy / "tokenizer.json").unlink()
    for arguments in (["next", "x"], ["attention", "x"], ["layers", "x"], ["embedding", "x"]):
        complains(["inspect", *arguments, "-c", copy], "has no tokenizer")


@pytest.mark.parametrize("verb", ["next", "attention", "embedding", "layers"])
def test_help(verb: str) -> None:
    done = gpt("inspect", verb, "--help")
    assert done.code == 0
    assert f"gpt inspect {verb}" in done.out

"""Each task's requests from rows of the documented shape, k-shot and normalisations, tasks of one's own, bad files."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptcli.config.schema import ModelConfig
from gptcli.errors import UserError
from gptcli.eval.own import read_task
from gptcli.eval.rows import Placed, Shots, read_items
from gptcli.eval.run import Options, Subject, run_perplexity, run_task
from gptcli.eval.scorer import Scorer
from gptcli.eval.task import Item, answer_item
from gptcli.eval.tasks import TASKS, find_task
from gptcli.eval.tasks_text import detokenize
from gptcli.eval.textmetrics import BLEU, ROUGE, exact_match, number_match
from gptcli.generate import Engine
from gptcli.model import GPT
from gptcli.tokenizer.build import byte_tokenizer, char_tokenizer
from tests.conftest import REPOSITORY


@pytest.fixture(scope="module")
def subject() -> Subject:
    model = GPT(ModelConfig(n_layer=1, n_head=2, n_embd=16, context_length=256, vocab_size=257, init_std=0.3))
    model.init_weights(0)
    return Subject(Scorer(Engine(model.eval(), byte_tokenizer())), "c", "t", {})


def write(folder: Path, rows: list[dict], name: str = "rows.jsonl") -> str:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


STORY = {f"input_sentence_{i}": f"S{i}." for i in range(1, 5)}
ARC = {"question": "Q?", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B"}
CASES = {
    "hellaswag": (
        {"activity_label": "Roof", "ctx_a": "A man sits.", "ctx_b": "he", "endings": ["is [x] up.", " runs [title] Go"],
         "label": "1"},
        [("Roof: A man sits. He", " is up."), ("Roof: A man sits. He", " runs. Go")], 1,
    ),
    "piqa": (
        {"goal": "Cut", "sol1": "a", "sol2": "b", "label": 1},
        [("Question: Cut\nAnswer:", " a"), ("Question: Cut\nAnswer:", " b")], 1,
    ),
    "arc_easy": (ARC, [("Question: Q?\nAnswer:", " x"), ("Question: Q?\nAnswer:", " y")], 1),
    "arc_challenge": (ARC, [("Question: Q?\nAnswer:", " x"), ("Question: Q?\nAnswer:", " y")], 1),
    "openbookqa": (
        {"question_stem": "Sun is", **{k: ARC[k] for k in ("choices", "answerKey")}},
        [("Sun is", " x"), ("Sun is", " y")], 1,
    ),
    "winogrande": (
        {"sentence": "He gave _ the cup.", "option1": "Ann", "option2": "Bo", "answer": "2"},
        [("He gave Ann", " the cup."), ("He gave Bo", " the cup.")], 1,
    ),
    "copa": (
        {"premise": "It rained.", "choice1": "I slept.", "choice2": "We ran.", "question": "effect", "label": 0},
        [("It rained therefore", " i slept."), ("It rained therefore", " we ran.")], 0,
    ),
    "boolq": (
        {"passage": "P.", "question": "is it", "label": 1},
        [("P.\nQuestion: is it?\nAnswer:", " no"), ("P.\nQuestion: is it?\nAnswer:", " yes")], 1,
    ),
    "storycloze": (
        {**STORY, "sentence_quiz1": "E1.", "sentence_quiz2": "E2.", "answer_right_ending": 2},
        [("S1. S2. S3. S4.", " E1."), ("S1. S2. S3. S4.", " E2.")], 1,
    ),
    "cbt_cn": (
        {"sentences": ["A b.", "C d."], "question": "The XXXXX ran .", "answer": "dog", "options": ["cat", "dog"]},
        [("A b. C d. The", " cat ran ."), ("A b. C d. The", " dog ran .")], 1,
    ),
    "blimp": ({"sentence_good": "He is.", "sentence_bad": "He are."}, [("", " He is."), ("", " He are.")], 0),
    "lambada": ({"text": "to be or not"}, [("to be or", " not")], 0),
    "gsm8k": ({"question": "2+2?", "answer": "so #### 4"}, [("Question: 2+2?\nAnswer:", "")], 0),
    "triviaqa": ({"question": "Who?", "answer": {"aliases": ["A", "B"]}}, [("Question: Who?\nAnswer:", "")], 0),
    "nq_open": ({"question": "who is it", "answer": ["A"]}, [("Q: who is it?\nA:", "")], 0),
    "webqs": ({"question": "Who?", "answers": ["A"]}, [("Question: Who?\nAnswer:", "")], 0),
    "translation": ({"source": "Hund", "target": "dog"}, [("Hund =", "")], 0),
    "summarization": ({"text": "Long.", "summary": "S"}, [("Long.\nTL;DR:", "")], 0),
    "wikitext": ({"page": "a @-@ b , c"}, [("a-b, c", "")], 0),
}  # fmt: skip
CASES["cbt_ne"], CASES["lambada_openai"], CASES["lambada_gpt2"] = CASES["cbt_cn"], CASES["lambada"], CASES["lambada"]


def test_every_task_has_a_case():
    assert {name for name in TASKS if not name.startswith("blimp_")} == CASES.keys()
    assert len([name for name in TASKS if name.startswith("blimp_")]) == 67 == len(TASKS["blimp"].sources)


@pytest.mark.parametrize("name", CASES)
def test_a_task_asks_and_answers(name, subject, tmp_path):
    row, pairs, gold = CASES[name]
    file = write(tmp_path, [row, row])
    first = read_items(TASKS[name], [file])[0].item
    assert (list(first.pairs), first.gold) == (pairs, gold)
    if TASKS[name].kind == "generate":
        assert first.solved.startswith(first.pairs[0][0] + " ")
    if name in ("translation", "summarization"):
        pytest.importorskip({"translation": "sacrebleu", "summarization": "rouge_score"}[name])
    result = run_task(TASKS[name], subject, Options(data=[file], num_fewshot=0, max_new_tokens=4))
    assert result.n == 2
    assert all(math.isfinite(value) for value in result.metrics.values())
    assert result.to_json()["task"] == name


def test_prepared_rows_do_as_well(tmp_path):
    file = write(tmp_path, [{"query": "Question: Q\n", "choices": ["a", "b"], "gold": "1"}])
    item = read_items(TASKS["piqa"], [file])[0].item
    assert item.pairs == (("Question: Q\nAnswer:", " a"), ("Question: Q\nAnswer:", " b"))
    word = read_items(TASKS["lambada"], [write(tmp_path, [{"context": "a b", "continuation": "c"}])])[0].item
    assert word.pairs == (("a b", " c"),)


def test_several_files_are_parts(subject, tmp_path):
    good, bad = CASES["blimp"][0], {"sentence_good": "x" * 40, "sentence_bad": "a"}
    write(tmp_path, [good] * 3, "one.jsonl")
    write(tmp_path, [bad] * 2, "two.jsonl")
    result = run_task(TASKS["blimp"], subject, Options(data=[str(tmp_path)], limit=2))
    assert result.groups.keys() == {"one", "two"}
    assert [item["id"] for item in result.items] == ["one/0", "one/1", "two/0", "two/1"]
    assert result.metrics["acc"] == statistics.mean(g["acc"] for g in result.groups.values())


# ---- figures ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", ["none", "chars", "bytes", "tokens", "answer-context"])
def test_normalisations(normalize, subject, tmp_path):
    rows = [{"query": f"q{i}", "choices": ["é" * 3, "abcd" * (i % 3 + 1), "z"], "gold": i % 3} for i in range(9)]
    result = run_task(TASKS["arc_easy"], subject, Options(data=[write(tmp_path, rows)], normalize=normalize))
    context = "Answer:"
    for row, item in zip(rows, result.items, strict=True):
        sums = np.array(item["logprobs"])
        assert item["acc"] == float(sums.argmax() == row["gold"])
        prior = [s.logprob for s in subject.scorer.loglikelihood([(context, " " + c) for c in row["choices"]])]
        normal = {
            "chars": sums / [len(c) for c in row["choices"]],
            "bytes": sums / [len(c.encode()) for c in row["choices"]],
            "tokens": sums / [len(c.encode()) + 1 for c in row["choices"]],
            "answer-context": sums - prior,
        }
        if normalize != "none":
            assert item["acc_norm"] == float(normal[normalize].argmax() == row["gold"])
    assert ("acc_norm" in result.metrics) == (normalize != "none")


def test_lambada_twice(subject, tmp_path):
    file = write(tmp_path, [{"text": f"the cat sat on mat{i}"} for i in range(5)])
    words = run_task(TASKS["lambada"], subject, Options(data=[file]))
    last = run_task(TASKS["lambada_gpt2"], subject, Options(data=[file]))
    assert words.metrics["perplexity"] == pytest.approx(math.exp(statistics.mean(i["nll"] for i in words.items)))
    assert {item["tokens"] for item in last.items} == {1}
    assert all(a["nll"] < b["nll"] for a, b in zip(last.items, words.items, strict=True))


def test_wikitext_counts_words_and_bytes_before_detokenizing(subject, tmp_path):
    page = " = A = \n b @-@ c ' d ' , ( e ) 1 @,@ 5 "
    assert detokenize(page) == " = A =\nb-c 'd', (e) 1,5 "
    result = run_task(TASKS["wikitext"], subject, Options(data=[write(tmp_path, [{"page": page}])]))
    (item,) = result.items
    assert (item["words"], item["bytes"]) == (len(page.split()) + 2, len(page))
    assert result.metrics["word_perplexity"] == pytest.approx(math.exp(item["nll"] / item["words"]))
    assert result.metrics["bits_per_byte"] == pytest.approx(item["nll"] / math.log(2) / len(page))
    with pytest.raises(UserError, match="takes no examples"):
        run_task(TASKS["wikitext"], subject, Options(data=[str(tmp_path)], instruction="Read."))


def test_perplexity_by_document_sums_to_the_stream(subject):
    texts = ["one two", "three", "four five six"]
    result = run_perplexity(texts, subject, Options(stride=16), lambda _: None)
    assert math.fsum(item["nll"] for item in result.items) == pytest.approx(result.metrics["nll"])
    assert result.metrics["tokens"] == sum(len(t) + 1 for t in texts)  # bytes, and an end-of-text each
    assert result.metrics["words"] == 6
    assert result.metrics["perplexity"] == pytest.approx(math.exp(result.metrics["nll"] / result.metrics["tokens"]))


def test_answers_are_judged():
    assert exact_match(" The Beatles!", ["beatles", "the beatles"]) == {"exact_match": 1.0}
    assert exact_match("Beatle", ["beatles"]) == {"exact_match": 0.0}
    assert number_match("so 1,200 then #### 1,200.", ["#### 1200"]) == {"exact_match": 1.0, "flexible": 1.0}
    assert number_match("it is $7.", ["x #### 7"]) == {"exact_match": 0.0, "flexible": 1.0}
    assert number_match("none", ["#### 7"]) == {"exact_match": 0.0, "flexible": 0.0}


def test_bleu_and_rouge():
    pytest.importorskip("sacrebleu")
    pytest.importorskip("rouge_score")
    text = "the cat sat on the mat"
    assert BLEU.corpus([text, text], [[text], ["x", text]]) == {"bleu": pytest.approx(100), "chrf": pytest.approx(100)}
    assert ROUGE.each(text, ["no", text])["rougeL"] == pytest.approx(100)
    assert ROUGE.each(text, ["a dog"])["rouge1"] == 0


# ---- examples ---------------------------------------------------------------------------------------------------


def placed(n: int) -> list[Placed]:
    return [Placed(str(i), "", Item((("", ""),), solved=f"<{i}>")) for i in range(n)]


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 20), st.data(), st.integers(0, 99))
def test_examples_are_distinct_others_decided_by_the_seed(n, data, seed):
    k = data.draw(st.integers(0, n - 1))
    shots = Shots(placed(n), k, seed, "|")
    for number in range(n):
        head = shots.before(number, placed(n)[number].item)
        drawn = head.split("|")[:-1]
        assert len(set(drawn)) == len(drawn) == k
        assert f"<{number}>" not in drawn
        assert head == Shots(placed(n), k, seed, "|").before(number, placed(n)[number].item)


def test_examples_change_the_hash_and_come_from_where_they_are_said_to(subject, tmp_path):
    file = write(tmp_path, [{"query": f"q{i}", "choices": ["a", "b"], "gold": 0} for i in range(6)])
    others = write(tmp_path, [{"query": "other", "choices": ["c", "d"], "gold": 1}], "others.jsonl")
    hashes = {
        run_task(TASKS["arc_easy"], subject, Options(data=[file], **more)).prompt_hash
        for more in ({}, {"num_fewshot": 2}, {"num_fewshot": 2, "seed": 1}, {"num_fewshot": 1, "examples": [others]},
                     {"instruction": "Think."}, {"limit": 5})
    }  # fmt: skip
    assert len(hashes) == 6
    again = run_task(TASKS["arc_easy"], subject, Options(data=[file], num_fewshot=2))
    assert again.prompt_hash in hashes
    assert again.settings["num_fewshot"] == 2
    with pytest.raises(UserError, match="--num-fewshot 6: there are only 5 examples"):
        run_task(TASKS["arc_easy"], subject, Options(data=[file], num_fewshot=6))
    shots = Shots(placed(1), 1, 0, "\n", instruction="Do it.")
    assert shots.before(0, placed(2)[1].item) == "Do it.\n<0>\n"


# ---- bad files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"goal": "x", "sol1": "a"}], r"rows.jsonl:1: --task piqa needs the columns goal, sol1, sol2, label or query"),
        ([CASES["piqa"][0], {"a": 1}], r"rows.jsonl:2: --task piqa needs .*; here are a"),
        ([{"goal": "x", "sol1": "a", "sol2": "b", "label": 2}], "the right choice is number 2 of 2"),
        (
            [{"goal": "x", "sol1": 3, "sol2": "b", "label": 0}],
            r"rows.jsonl:1: cannot be read as an item of --task piqa",
        ),
        ([], r"rows.jsonl: no rows for --task piqa"),
    ],
)
def test_bad_rows_are_one_line(rows, words, tmp_path):
    with pytest.raises(UserError, match=words) as caught:
        read_items(TASKS["piqa"], [write(tmp_path, rows)])
    assert "\n" not in str(caught.value)


def test_other_bad_data(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="has no data set of its own; give --data"):
        read_items(TASKS["translation"], [])
    (tmp_path / "rows.txt").write_text("x")
    with pytest.raises(UserError, match=r"rows.txt: a task's data is .jsonl"):
        read_items(TASKS["piqa"], [str(tmp_path / "rows.txt")])
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder, [CASES["piqa"][0]], "val.jsonl")
    with pytest.raises(UserError, match=r"x/val.jsonl, .*y/val.jsonl: files of one name would be one group"):
        read_items(TASKS["piqa"], [str(tmp_path / f"{folder}/val.jsonl") for folder in "xy"])
    monkeypatch.setattr("gptcli.hub.answers", lambda: False)
    with pytest.raises(UserError, match=r"--task piqa \(hf:baber/piqa::validation\): names a data set on the hub"):
        read_items(TASKS["piqa"], [])
    with pytest.raises(UserError, match=r"--task hellaswagg: no such task; did you mean 'hellaswag'"):
        find_task("hellaswagg")


def test_a_tokenizer_that_cannot_spell_a_choice(tmp_path):
    model = GPT(ModelConfig(n_layer=1, n_head=1, n_embd=8, context_length=64, vocab_size=30))
    letters = Subject(Scorer(Engine(model.eval(), char_tokenizer(["Question: q\nAnswer: ab"]))), "c", "t", {})
    file = write(tmp_path, [{"query": "Question: q", "choices": ["a", "zz"], "gold": 0}])
    with pytest.raises(UserError, match="character 'z' is not in this character tokenizer's vocabulary"):
        run_task(TASKS["arc_easy"], letters, Options(data=[file]))


# ---- one's own --------------------------------------------------------------------------------------------------


def test_the_example_in_recipes(subject):
    task = find_task(str(REPOSITORY / "recipes/tasks/months.yaml"))
    item = read_items(task, [])[0].item
    assert item.pairs[0] == ("Question: Which month comes after January?\nAnswer:", " February")
    assert run_task(task, subject, Options(num_fewshot=2)).n == 12


def test_a_limit_asks_the_same_of_fewer(subject, tmp_path):
    """Its examples come from all of the data; and an item is none of its own, wherever the examples are read from."""
    rows = [{"q": f"Q{i}", "a": f"w{i}"} for i in range(12)]
    write(tmp_path, rows)
    (tmp_path / "mine.yaml").write_text("name: mine\nkind: word\ndata: rows.jsonl\ncontext: '{q}'\ntarget: '{a}'\n")
    task = read_task(tmp_path / "mine.yaml")
    whole, part = (run_task(task, subject, Options(num_fewshot=3, limit=limit)) for limit in (None, 2))
    assert part.items == whole.items[:2]
    itself = Options(num_fewshot=11, limit=1, examples=[str(tmp_path / "rows.jsonl")])
    assert run_task(task, subject, itself).n == 1
    with pytest.raises(UserError, match="there are only 11 examples"):
        run_task(task, subject, dataclasses.replace(itself, num_fewshot=12))


@pytest.mark.parametrize(
    ("keys", "row", "words"),
    [
        ("choices_from: o\ngold: a\n", {"q": None, "o": ["x", "y"], "a": 0}, "q is null"),
        ("choices_from: o\ngold: a\n", {"q": "Q", "o": ["x"], "a": 0}, "o: expected a list of two choices"),
        ("choices_from: o\ngold: a\n", {"q": "Q", "o": "ab", "a": 0}, "o: expected a list of two choices"),
        ("choices_from: o\ngold: a\n", {"q": "Q", "o": ["x", "y"], "a": 0.7}, "0.7 is no number of a choice"),
    ],
)
def test_rows_of_own_tasks_that_mean_nothing(keys, row, words, tmp_path):
    write(tmp_path, [row])
    (tmp_path / "mine.yaml").write_text(f"name: mine\nkind: choice\ndata: rows.jsonl\ncontext: '{{q}}'\n{keys}")
    with pytest.raises(UserError, match=words):
        read_items(read_task(tmp_path / "mine.yaml"), [])


@pytest.mark.parametrize("text", ["1 / 0", "def (", "import sys; sys.exit(7)"])
def test_a_task_in_python_that_fails_is_named(text, tmp_path):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(UserError, match=r"mine\.py: cannot be run \("):
        read_task(tmp_path / "mine.py")


OWN = {
    "choice": ("context: '{q}'\nchoices_from: options\ngold: a\n", {"q": "Q", "options": ["x", "y"], "a": "B"}, 1),
    "choice by text": ("context: '{q}'\nchoices_from: o\ngold: a\n", {"q": "Q", "o": ["x", "y"], "a": "y"}, 1),
    "word": ("context: '{q}'\ntarget: '{a}'\n", {"q": "Q", "a": "w"}, 0),
    "text": ("context: '{q}'\n", {"q": "two words"}, 0),
    "generate": ("context: '{q}'\ntarget: '{a}'\nmetric: number\nmax_new_tokens: 3\n", {"q": "Q", "a": "4"}, 0),
    "generate from": ("context: '{q}'\ntarget_from: a\nmax_new_tokens: 3\n", {"q": "Q", "a": ["4", "5"]}, 0),
}


@pytest.mark.parametrize("name", OWN)
def test_own_tasks(name, subject, tmp_path):
    keys, row, gold = OWN[name]
    write(tmp_path, [row, row])
    (tmp_path / "mine.yaml").write_text(f"name: mine\nkind: {name.split()[0]}\ndata: rows.jsonl\n{keys}")
    task = read_task(tmp_path / "mine.yaml")
    assert read_items(task, [])[0].item.gold == gold
    assert run_task(task, subject, Options()).n == 2


def test_a_task_in_python(subject, tmp_path):
    file = write(tmp_path, [{"q": "Q", "a": "4"}])
    (tmp_path / "mine.py").write_text(
        "from gptcli.eval.task import Shape, Task, word_item\n"
        "task = Task('mine', '', 'word', (Shape(('q', 'a'), lambda row: word_item(row['q'], row['a'])),))\n"
    )
    assert run_task(find_task(str(tmp_path / "mine.py")), subject, Options(data=[file])).metrics.keys() == {
        "acc", "perplexity"
    }  # fmt: skip
    (tmp_path / "other.py").write_text("x = 1\n")
    with pytest.raises(UserError, match="must set `task`"):
        find_task(str(tmp_path / "other.py"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: m\nkind: choices\n", "kind"),
        ("name: m\nkind: choice\ncontxt: x\n", "contxt: unknown key; did you mean"),
        ("name: m\nkind: choice\ncontext: x\n", "gold: missing; kind choice needs it"),
        ("name: m\nkind: choice\ngold: a\n", "needs either choices or choices_from"),
        ("name: m\nkind: generate\ncontext: x\n", "needs either target or target_from"),
        ("name: m\nkind: text\ncontext: '{q'\n", "a brace itself is written twice"),
    ],
)
def test_bad_task_files_are_one_line(text, words, tmp_path):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(UserError, match=words) as caught:
        read_task(tmp_path / "mine.yaml")
    assert "mine.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_answer_must_exist():
    with pytest.raises(ValueError, match="no right answer"):
        answer_item("q", [])

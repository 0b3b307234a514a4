"""Prompts without training: GPT-3's layout, draws that a seed decides, and templates that fill in."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptcli.errors import UserError
from gptcli.generate.shots import (
    Prompter,
    PromptTemplate,
    Shot,
    draw_shots,
    load_template,
    read_shots,
    template_names,
)

SHOTS = [Shot("sea otter", "loutre de mer"), Shot("cheese", "fromage"), Shot("cat", "chat")]


def test_zero_one_and_few_shot_as_in_gpt3s_figure() -> None:
    arrow = load_template("arrow")
    instruction = "Translate English to French:"
    assert Prompter(arrow, (), instruction)("dog") == "Translate English to French:\ndog =>"
    assert (
        Prompter(arrow, SHOTS[:2], instruction)("dog")
        == "Translate English to French:\nsea otter => loutre de mer\ncheese => fromage\ndog =>"
    )
    assert Prompter(arrow, SHOTS[:1])("dog") == "sea otter => loutre de mer\ndog =>"


def test_every_kind_of_template_ships() -> None:
    expected = {
        "arrow", "summarize", "rewrite", "translate", "answer", "answer-context", "classify", "role-play", "docstring",
    }  # fmt: skip
    assert set(template_names()) == expected


@pytest.mark.parametrize("name", template_names())
def test_templates_fill_in_completely_and_end_without_a_space(name: str) -> None:
    template = load_template(name)
    prompt = Prompter(template, SHOTS)("the text")
    assert "{" not in prompt
    assert prompt.index("fromage") < prompt.index("the text")
    assert not prompt.endswith(" ")  # a space would be half of the answer's first token
    assert template.stop


@given(st.text(), st.text())
def test_braces_in_texts_stay_what_they_are(text: str, other: str) -> None:
    template = PromptTemplate(about="", prompt="<{input}>", response="{output}", separator="")
    assert Prompter(template, [Shot("{output}" + other, text)])(text) == f"<{{output}}{other}>{text}<{text}>"


def test_variables() -> None:
    translate = load_template("translate")
    prompt = Prompter(translate, variables={"to": "German"})("cat")
    assert prompt == "Translate English to German.\n\nEnglish: cat\nGerman:"
    with pytest.raises(UserError, match="--var too: not a variable of this template; it has from, to"):
        Prompter(translate, variables={"too": "German"})


@given(st.integers(0, 3), st.integers(0, 10))
def test_draws_depend_on_the_seed_alone_and_repeat_nothing(k: int, seed: int) -> None:
    drawn = draw_shots(SHOTS, k, seed)
    assert drawn == draw_shots(SHOTS, k, seed)
    assert len(drawn) == len(set(drawn)) == k


def test_draws_differ_between_seeds_and_items() -> None:
    shots = [Shot(str(i), "") for i in range(50)]
    draws = [draw_shots(shots, 5, *ids) for ids in ((0,), (1,), (0, 0), (0, 1))]
    assert len({tuple(draw) for draw in draws}) == 4
    assert draw_shots(shots, None, 0) == shots


def test_more_than_there_are() -> None:
    with pytest.raises(UserError, match="--k 4: there are only 3 examples"):
        draw_shots(SHOTS, 4, 0)


def test_files_of_shots_and_their_faults(tmp_path: Path) -> None:
    file = tmp_path / "shots.jsonl"
    file.write_text('{"prompt": "a", "response": "b"}\n{"input": "c", "output": "d"}\n{"text": "e", "label": 1}\n')
    assert read_shots(str(file)) == [Shot("a", "b"), Shot("c", "d"), Shot("e", "1")]
    file.write_text('{"prompt": "a", "response": "b"}\n{"prompt": "a"}\n')
    with pytest.raises(UserError, match=r"shots.jsonl:2: an example has prompt and response or .*; this has prompt"):
        read_shots(str(file))
    file.write_text("")
    with pytest.raises(UserError, match="holds no examples"):
        read_shots(str(file))


def test_unknown_templates_and_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--template summarise: no such template or file; did you mean 'summarize'"):
        load_template("summarise")
    file = tmp_path / "mine.yaml"
    file.write_text("about: x\nprompts: y\n")
    with pytest.raises(UserError, match=r"mine\.yaml: prompts: unknown key"):
        load_template(str(file))

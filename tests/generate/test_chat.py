"""A model in a conversation: it sees what the server would show it, draws repeat, what is left out is told."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from gptcli.config.schema import ModelConfig, SamplingParams
from gptcli.errors import UserError
from gptcli.generate import Engine
from gptcli.generate.chat import Chat
from gptcli.generate.conversation import Conversation
from gptcli.model import GPT
from gptcli.modeldir import save_model
from gptcli.tokenizer import Tokenizer
from gptcli.tokenizer.build import byte_tokenizer
from gptcli.tokenizer.chat_template import CHATML, CHATML_TOKENS, encode_chat, end_ids

LLAMA_LIKE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def speaker() -> Tokenizer:
    return byte_tokenizer().for_chat(CHATML, CHATML_TOKENS, CHATML_TOKENS[1])


def make_engine(tokenizer: Tokenizer | None = None, context_length: int = 256) -> Engine:
    tokenizer = tokenizer or speaker()
    config = ModelConfig(
        n_layer=1, n_head=2, n_embd=16, context_length=context_length, vocab_size=tokenizer.vocab_size, init_std=0.2
    )
    model = GPT(config)
    model.init_weights(1)
    return Engine(model.eval(), tokenizer)


def save_engine(engine: Engine, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_model(folder, engine.model.config, engine.model.state_dict(), engine.tokenizer)
    return folder


PARAMS = SamplingParams(max_new_tokens=12, seed=5)


def make_chat(system: str | None = None, context_length: int = 256, **changes: object) -> Chat:
    return Chat(make_engine(context_length=context_length), dataclasses.replace(PARAMS, **changes), system)


def never() -> bool:
    return False


def test_it_continues_what_the_template_writes() -> None:
    chat, engine = make_chat("Be brief."), make_engine()
    pieces: list[str] = []
    answer = chat.ask("Hello", pieces.append)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    [expected] = engine.generate([encode_chat(speaker(), messages)], PARAMS)
    assert (answer.text, answer.tokens, answer.finish_reason) == (
        expected.text,
        len(expected.ids),
        expected.finish_reason,
    )
    assert "".join(pieces) == answer.text
    assert chat.conversation.messages() == [*messages, {"role": "assistant", "content": answer.text}]
    second = chat.ask("And?")
    asked = [*chat.conversation.messages()[:-1]]
    assert second.text == engine.generate([encode_chat(speaker(), asked)], PARAMS, streams=[1 << 16])[0].text


def test_a_seed_repeats_a_conversation_whatever_was_undone() -> None:
    def said(chat: Chat) -> list[str]:
        return [chat.ask(text).text for text in ("a", "b", "c")]

    first, again = said(make_chat()), make_chat()
    again.ask("a")
    again.ask_again(lambda chunk: None, never)
    again.restart(again.conversation.undone())
    assert said(again) == first
    assert said(make_chat(seed=6)) != first


def test_each_new_answer_is_another_and_repeats_too() -> None:
    def draws() -> list[str]:
        chat = make_chat()
        return [chat.ask("a").text, *(chat.ask_again(lambda chunk: None, never).text for _ in range(3))]

    assert len(set(draws())) == 4
    assert draws() == draws()
    chat = make_chat()
    chat.ask("a")
    chat.ask_again(lambda chunk: None, never)
    assert len(chat.conversation.turns) == 1
    assert len(chat.conversation.turns[0]) == 2


@pytest.mark.parametrize("after", [0, 1, 5])
def test_a_stopped_answer_keeps_what_was_said(after: int) -> None:
    pieces: list[str] = []
    asked = 0

    def stopped() -> bool:
        nonlocal asked
        asked += 1
        return asked > after

    chat = make_chat(ignore_eos=True)
    answer = chat.ask("a", pieces.append, stopped)
    assert (answer.finish_reason, answer.tokens) == ("interrupted", after + 1)
    assert chat.conversation.turns[0][1]["content"] == answer.text == "".join(pieces)
    assert make_chat(ignore_eos=True).ask("a").text.startswith(answer.text)
    chat.ask("b")  # and it goes on
    assert len(chat.conversation.turns) == 2


def test_turns_left_out_are_told_and_the_system_prompt_stays() -> None:
    notes: list[str] = []
    chat = Chat(make_engine(context_length=160), dataclasses.replace(PARAMS, ignore_eos=True), "Be kind.", notes.append)
    left_out = [chat.ask(f"question {n}").left_out for n in range(5)]
    assert left_out[0] == 0
    assert left_out == sorted(left_out)
    changes = [n for before, n in zip([0, *left_out], left_out, strict=False) if n != before]
    assert len(notes) == len(changes) >= 2
    assert notes[0] == (
        "the context of 160 tokens is full: turn 1 is left out of the model's view, which begins with turn 2, "
        "'question 1'"
    )
    assert "turns 1 to 2 are left out" in notes[1]
    assert len(chat.conversation.turns) == 5  # all of them are kept


def test_refuse_stops_and_keeps_the_conversation() -> None:
    chat = make_chat(context_length=128, on_overflow="refuse")
    chat.ask("a" * 60)
    before = chat.conversation
    with pytest.raises(UserError, match="on_overflow: refuse"):
        chat.ask("b" * 30)
    assert chat.conversation == before


def test_an_answer_never_outgrows_the_context() -> None:
    chat = make_chat(context_length=64, max_new_tokens=500, ignore_eos=True)
    answer = chat.ask("hi")
    prompt = len(encode_chat(speaker(), [{"role": "user", "content": "hi"}]))
    assert (answer.finish_reason, answer.tokens, answer.limit) == ("length", 64 - prompt, 64 - prompt)
    with pytest.raises(UserError, match="this turn and the system prompt have"):
        chat.ask("x" * 60)
    with pytest.raises(UserError, match="this turn and the system prompt have"):
        chat.set_system("x" * 60)
    assert chat.conversation.system is None


@pytest.mark.parametrize("act", [lambda c, t: c.ask(t), lambda c, t: c.set_system(t),
                                 lambda c, t: c.restart(Conversation().asked(t).answered("x"))])  # fmt: skip
def test_text_that_spells_a_special_token_is_refused(act: Callable[[Chat, str], object]) -> None:
    chat = make_chat()
    with pytest.raises(UserError, match=r"holds <\|im_end\|>"):
        act(chat, "hello<|im_end|>")
    assert chat.conversation == Conversation()


def test_a_template_that_takes_no_system_prompt_says_so_at_once() -> None:
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    tokenizer = byte_tokenizer().for_chat(template, CHATML_TOKENS, CHATML_TOKENS[1])
    with pytest.raises(UserError, match="no system"):
        Chat(make_engine(tokenizer), PARAMS, "Be brief.")
    Chat(make_engine(tokenizer), PARAMS)


def test_a_model_without_a_template_speaks_in_lines() -> None:
    engine = make_engine(byte_tokenizer())
    chat = Chat(engine, dataclasses.replace(PARAMS, stop=["~"]))
    assert not chat.has_template
    answer = chat.ask("Say <|endoftext|>")  # which is text here
    [expected] = engine.generate(
        [list(b"User: Say <|endoftext|>\nAssistant:")], dataclasses.replace(PARAMS, stop=["~", "\nUser:"])
    )
    assert answer.text == expected.text.lstrip()


def test_beams_and_best_of_answer_whole() -> None:
    for changes in ({"num_beams": 2}, {"best_of": 3}):
        pieces: list[str] = []
        answer = make_chat(**changes).ask("a", pieces.append)
        assert pieces == ([answer.text] if answer.text else [])


def test_the_templates_end_of_turn_ends_an_answer() -> None:
    tokenizer = byte_tokenizer().for_chat(LLAMA_LIKE, ("<|im_start|>", "<|eot|>"), None)
    eot = tokenizer.encode("<|eot|>", parse_special=True)[0]
    assert end_ids(tokenizer) == (tokenizer.eos_id, eot)
    for end in end_ids(tokenizer):
        chat = Chat(make_engine(tokenizer), dataclasses.replace(PARAMS, logit_bias={str(end): 100.0}))
        answer = chat.ask("a")
        assert (answer.text, answer.finish_reason, answer.tokens) == ("", "eos", 0)
        beam = Chat(make_engine(tokenizer), dataclasses.replace(chat.params, num_beams=2))
        assert beam.ask("a").finish_reason == "eos"
        held = Chat(make_engine(tokenizer), dataclasses.replace(chat.params, min_new_tokens=3))
        assert held.ask("a").tokens >= 3
    assert end_ids(byte_tokenizer()) == (256,)
    assert end_ids(byte_tokenizer().for_chat("{{ raise_exception('no') }}", (), None)) == (256,)
    assert end_ids(speaker()) == (speaker().eos_id,)

"""Conversations: turns come and go, views keep the newest, files are what gpt sft reads."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from gptcli.data.conversations import ConversationEncoder, parse_conversation
from gptcli.errors import UserError
from gptcli.generate.conversation import Conversation, load_conversation, save_conversation, view
from gptcli.tokenizer import Tokenizer
from gptcli.tokenizer.build import byte_tokenizer
from gptcli.tokenizer.chat_template import CHATML, CHATML_TOKENS, encode_chat


def chatml() -> Tokenizer:
    return byte_tokenizer().for_chat(CHATML, CHATML_TOKENS, CHATML_TOKENS[1])


def talk(turns: int, system: str | None = "Be brief.") -> Conversation:
    conversation = Conversation(system)
    for number in range(turns):
        conversation = conversation.asked(f"question {number}").answered(f"answer {number}")
    return conversation


def test_turns_come_and_go() -> None:
    two = talk(2)
    assert two.asked("x").undone() == two
    assert two.unanswered().answered("answer 1") == two
    assert two.undone() == talk(1)
    assert Conversation.of(two.messages()) == two
    with pytest.raises(UserError, match="nothing was said yet"):
        talk(0).undone()
    with pytest.raises(UserError, match="nothing was asked yet"):
        talk(0).unanswered()


def test_a_turn_is_what_follows_a_users_message() -> None:
    roles = ["assistant", "user", "tool", "assistant", "user"]
    conversation = Conversation.of([{"role": role, "content": role} for role in roles])
    assert [[m["role"] for m in turn] for turn in conversation.turns] == [
        ["assistant"],
        ["user", "tool", "assistant"],
        ["user"],
    ]
    assert conversation.system is None


@pytest.mark.parametrize("tokenizer", [chatml(), byte_tokenizer()], ids=["chatml", "plain"])
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_a_view_is_the_most_that_fits(tokenizer: Tokenizer, system: str | None) -> None:
    asked = talk(6, system).asked("and now?")
    lengths = [len(encode_chat(tokenizer, asked.messages(since=n))) for n in range(7)]
    assert lengths == sorted(lengths, reverse=True)
    for room in range(lengths[-1], lengths[0] + 2):
        seen = view(asked, tokenizer, room)
        assert seen.ids == encode_chat(tokenizer, asked.messages(since=seen.left_out))
        assert len(seen.ids) <= room
        assert seen.left_out == 0 or lengths[seen.left_out - 1] > room  # one turn more would not fit
        assert system is None or bytes(system, "ascii") in bytes(i for i in seen.ids if i < 256)
    with pytest.raises(UserError, match=f"this turn and the system prompt have {lengths[-1]} tokens"):
        view(asked, tokenizer, lengths[-1] - 1)


def test_refuse_leaves_nothing_out() -> None:
    asked, tokenizer = talk(3).asked("x"), chatml()
    length = len(encode_chat(tokenizer, asked.messages()))
    assert view(asked, tokenizer, length, refuse=True).left_out == 0
    with pytest.raises(UserError, match=f"has {length} tokens, and beside an answer the context holds {length - 1}"):
        view(asked, tokenizer, length - 1, refuse=True)


@pytest.mark.parametrize("system", [None, "Sei höflich ☃\n"])
def test_a_saved_conversation_loads_and_teaches(system: str | None, tmp_path: Path) -> None:
    said, file = talk(3, system), tmp_path / "talk.jsonl"
    assert save_conversation(said.asked("open"), file) == 1
    assert load_conversation(file) == said
    [line] = file.read_text().splitlines()
    encoded = ConversationEncoder(chatml()).encode(parse_conversation(json.loads(line)))
    assert len(encoded.answers) == 3


def test_empty_answers_are_not_saved(tmp_path: Path) -> None:
    file = tmp_path / "talk.jsonl"
    assert save_conversation(talk(1).asked("x").answered(" \n").asked("y").answered("z"), file) == 1
    assert load_conversation(file) == talk(1).asked("y").answered("z")
    with pytest.raises(UserError, match="no turn with an answer"):
        save_conversation(talk(0), file)
    with pytest.raises(UserError, match=r"no/talk\.jsonl: No such file"):
        save_conversation(talk(1), tmp_path / "no" / "talk.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["talk.jsonl"]


def test_what_sft_reads_can_be_loaded(tmp_path: Path) -> None:
    file = tmp_path / "one.jsonl.gz"
    file.write_bytes(gzip.compress(b'\n{"instruction": "Add.", "input": "1 2", "output": "3"}\n'))
    assert load_conversation(file) == Conversation().asked("Add.\n\n1 2").answered("3")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "holds 0 conversations"),
        ('{"prompt": "a", "response": "b"}\n' * 2, "holds 2 conversations"),
        ("{", "talk.jsonl:1: not JSON"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "talk.jsonl:1: messages: ends with 'user'"),
        ('{"messages": [{"rolle": "user"}]}', r"talk.jsonl:1: messages\[0\]: no role"),
    ],
)
def test_what_cannot_be_loaded_is_named(text: str, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "talk.jsonl"
    file.write_text(text)
    with pytest.raises(UserError, match=reason):
        load_conversation(file)

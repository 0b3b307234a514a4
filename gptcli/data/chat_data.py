"""From a recipe's `data:` and `sft:` to conversations in rows, checked before anything is trained."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gptcli.config.schema import DataBlock, SFTBlock
from gptcli.data.chat_rows import ChatRows, Row, fit
from gptcli.data.conversations import ConversationEncoder, Encoded, parse_conversation
from gptcli.data.examples import Example, open_examples, report_skipped
from gptcli.errors import UserError
from gptcli.tokenizer import Tokenizer
from gptcli.tokenizer.chat_template import CHATML, CHATML_TOKENS

Say = Callable[[str], None]


@dataclass(frozen=True)
class ChatData:
    """Rows to train on, and held-out ones in which the answers alone count."""

    train: ChatRows
    held_out: list[Row]
    hash: str


def chat_tokenizer(base: Tokenizer, sft: SFTBlock) -> Tokenizer:
    """The checkpoint's tokenizer with the template and the tokens that conversations are written with."""
    template, stop = base.chat_template, sft.stop_token
    tokens: tuple[str, ...] = ()
    if sft.template == "chatml" or (sft.template == "auto" and template is None):
        template, tokens, stop = CHATML, CHATML_TOKENS, stop or CHATML_TOKENS[1]
    elif sft.template not in ("auto", "none"):
        try:
            template = Path(sft.template).expanduser().read_text("utf-8")
        except OSError as error:
            raise UserError(
                f"sft.template: {sft.template}: {error.strerror}; expected auto | chatml | none | a Jinja file"
            ) from error
    tokenizer = base.for_chat(template, tokens, stop)
    if tokenizer.eos_id is None:
        raise UserError("sft.stop_token: this tokenizer names no token that ends a text; name one")
    return tokenizer


def prepare_chat(data: DataBlock, sft: SFTBlock, tokenizer: Tokenizer, seq_len: int, seed: int, say: Say) -> ChatData:
    """Read, check, encode and pack. Raises UserError, file and line first, for a conversation that cannot be learned
    from (with data.skip_bad it is counted and left out)."""
    encoder = ConversationEncoder(tokenizer, sft.train_on, plain=sft.template == "none")

    def parse(row: dict[str, Any]) -> Encoded:
        encoded = encoder.encode(parse_conversation(row))
        return fit(encoded, seq_len, "refuse") if sft.truncation == "refuse" else encoded

    examples = open_examples(data, parse)
    report_skipped(examples.skipped, say)
    train = _fitted(examples.train, seq_len, sft.truncation, say)
    val = [answers_only(e) for e in _fitted(examples.val, seq_len, sft.truncation, say)]
    if not train:
        raise UserError(f"data: no conversation fits a row of {seq_len} tokens; raise train.seq_len")
    rows = ChatRows(train, seq_len, seed, packing=sft.packing)
    held_out = ChatRows(val, seq_len, seed, packing=sft.packing).rows if val else []
    say(f"{len(train):,} conversations in {len(rows.rows):,} rows, {len(val):,} held out")
    digest = hashlib.sha256(f"{examples.hash} {sft} {seq_len}".encode())
    return ChatData(rows, held_out, digest.hexdigest()[:16])


def answers_only(example: Encoded) -> Encoded:
    """The same with every answer counted and nothing else, so that held-out losses can be compared."""
    trained = example.trained.copy()
    trained[:] = False
    for begin, end in example.answers:
        trained[max(1, begin) : end] = True
    return replace(example, trained=trained)


def _fitted(examples: list[Example[Encoded]], seq_len: int, truncation: str, say: Say) -> list[Encoded]:
    """Those that a row holds, as sft.truncation says; what became of the others is said."""
    out, cut, left_out = [], 0, []
    for example in examples:
        try:
            fitting = fit(example.value, seq_len, truncation)
        except UserError as error:
            left_out.append(f"{example.place}: {error}")
            continue
        cut += len(fitting) < len(example.value)
        out.append(replace(fitting, place=example.place))
    if cut:
        say(f"{cut} conversations are longer than a row and lost their beginning (sft.truncation: left)")
    if left_out:
        say(f"{len(left_out)} conversations are longer than a row and left out; the first: {left_out[0]}")
    return out

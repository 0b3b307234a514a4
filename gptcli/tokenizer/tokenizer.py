"""The one tokenizer class: a `tokenizers.Tokenizer` plus the names of its special tokens."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from gptcli.errors import UserError
from gptcli.files import read_object
from gptcli.tokenizer.gpt1 import NORMALIZERS

END_OF_TEXT = "<|endoftext|>"
ROLES = ("eos", "bos", "pad", "unk")
NORMALIZER_KEY = "gptcli_normalizer"


class Tokenizer:
    """Encodes plain text, decodes ids, and knows which ids are special.

    Special tokens are those that the files name: `tokenizer_config.json` beside tokenizer.json gives each role
    its token, as Hugging Face does; a lone tokenizer.json names end-of-text by holding the special token
    `<|endoftext|>`. Nothing else is guessed. A role that no file names is None.

    `normalizer` names what is done to text before the backend gets it, where that is more than tokenizer.json can
    say; tokenizer_config.json keeps the name.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special: dict[str, str] | None = None,
        normalizer: str | None = None,
        *,
        chat_template: str | None = None,
    ) -> None:
        self.backend, self.normalizer, self.chat_template = backend, normalizer, chat_template
        # Text that looks like a special token is text: only `parse_special` lets it through as one.
        self.backend.encode_special_tokens = True
        self.backend.no_padding()
        self.backend.no_truncation()
        added = {t.content: i for i, t in backend.get_added_tokens_decoder().items() if t.special}
        if special is None:
            special = {"eos": END_OF_TEXT} if END_OF_TEXT in added else {}
        self.special = {role: token for role, token in special.items() if backend.token_to_id(token) is not None}
        self.special_texts = frozenset(added) | frozenset(self.special.values())
        self.special_ids = frozenset(added.values()) | {backend.token_to_id(t) for t in self.special.values()}
        self.alphabet = _alphabet(backend)  # of a char tokenizer, else None

    # ---- files ---------------------------------------------------------------------------------------------

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """A tokenizer.json, or a folder that holds one. Raises UserError naming the file."""
        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        try:
            text = file.read_text("utf-8")
        except OSError as error:
            raise UserError(f"{file}: {error.strerror}; expected a tokenizer.json") from error
        except UnicodeDecodeError as error:
            raise UserError(f"{file}: not a tokenizer.json (not UTF-8)") from error
        try:
            backend = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{file}: not a tokenizer.json ({error})") from error
        normalizer = _read_normalizer(file.parent / "tokenizer_config.json")
        return cls(backend, _read_roles(file.parent), normalizer, chat_template=_read_chat_template(file.parent))

    def save(self, folder: str | Path, *, context_length: int | None = None) -> None:
        """Write tokenizer.json and tokenizer_config.json, in which others look for the model's context_length."""
        folder = Path(folder)
        (folder / "tokenizer.json").write_text(self.to_json(), "utf-8")
        config: dict[str, Any] = {f"{role}_token": token for role, token in self.special.items()}
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        if context_length is not None:
            config["model_max_length"] = context_length
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        if self.normalizer is not None:
            config[NORMALIZER_KEY] = self.normalizer
            config["tokenizer_class"] = "OpenAIGPTTokenizer"  # where ours is not at hand, the nearest to it
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False), "utf-8")

    def to_json(self) -> str:
        return self.backend.to_str(pretty=True)

    def with_role(self, role: str, token: str) -> Tokenizer:
        """The same tokenizer with one more special token known by its role."""
        backend = tokenizers.Tokenizer.from_str(self.backend.to_str())
        special = {**self.special, role: token}
        return Tokenizer(backend, special, self.normalizer, chat_template=self.chat_template)

    def with_tokens(self, tokens: Sequence[str]) -> Tokenizer:
        """The same tokenizer that has these special tokens too; new ones take the ids after its last."""
        backend = tokenizers.Tokenizer.from_str(self.backend.to_str())
        backend.add_special_tokens([tokenizers.AddedToken(t, special=True, normalized=False) for t in tokens])
        return Tokenizer(backend, self.special, self.normalizer, chat_template=self.chat_template)

    def for_chat(self, template: str | None, tokens: Sequence[str], stop_token: str | None) -> Tokenizer:
        """The same tokenizer with a chat template and its special tokens: those it does not know yet get the next
        ids. `stop_token` ends an answer, so it takes the role eos; what had it still begins texts."""
        backend = tokenizers.Tokenizer.from_str(self.backend.to_str())
        wanted = [*tokens, *([stop_token] if stop_token is not None else [])]
        backend.add_special_tokens([tokenizers.AddedToken(t, special=True, normalized=False) for t in wanted])
        special = dict(self.special)
        if stop_token is not None:
            if "eos" in special:
                special.setdefault("bos", special["eos"])
            special["eos"] = stop_token
        return Tokenizer(backend, special, self.normalizer, chat_template=template)

    @property
    def hash(self) -> str:
        """Of everything that decides ids; two tokenizers of one hash give the same tokens."""
        roles = json.dumps(self.special, sort_keys=True)
        return hashlib.sha256((self.backend.to_str() + roles + (self.normalizer or "")).encode()).hexdigest()[:16]

    # ---- ids -----------------------------------------------------------------------------------------------

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return 1 + max(self.backend.get_vocab(with_added_tokens=True).values())

    def same_ids(self, other: Tokenizer) -> bool:
        """Whether each id stands for the same token there."""
        return self.backend.get_vocab(with_added_tokens=True) == other.backend.get_vocab(with_added_tokens=True)

    @property
    def eos_id(self) -> int | None:
        return self._role_id("eos")

    @property
    def bos_id(self) -> int | None:
        return self._role_id("bos")

    @property
    def pad_id(self) -> int | None:
        """The pad token's id if the files name one; never end-of-text in disguise."""
        return self._role_id("pad")

    @property
    def start_id(self) -> int | None:
        """What a text follows that nothing precedes: bos, else end-of-text."""
        return self.bos_id if self.bos_id is not None else self.eos_id

    @property
    def adds_bos(self) -> bool:
        """Whether its own files begin every text with bos, as Llama's do."""
        return self.bos_id is not None and self.backend.encode("").ids[:1] == [self.bos_id]

    def _role_id(self, role: str) -> int | None:
        token = self.special.get(role)
        return None if token is None else self.backend.token_to_id(token)

    # ---- text ----------------------------------------------------------------------------------------------

    def encode(self, text: str, *, parse_special: bool = False) -> list[int]:
        """Ids of `text`, with no token added at either end. Raises UserError for a character that a `char`
        tokenizer does not have."""
        return self.encode_batch([text], parse_special=parse_special)[0]

    def encode_batch(self, texts: Sequence[str], *, parse_special: bool = False) -> list[list[int]]:
        for text in texts:
            self._check(text, parse_special)
        if self.normalizer is not None:
            texts = [self._normalize(text, parse_special) for text in texts]
        self.backend.encode_special_tokens = not parse_special
        try:
            encoded = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        finally:
            self.backend.encode_special_tokens = True
        return [e.ids for e in encoded]

    def _normalize(self, text: str, parse_special: bool) -> str:
        """The text as the backend expects it; a special token that is to be parsed stays as it is."""
        normalize = NORMALIZERS[self.normalizer or ""]
        added = [token.content for token in self.backend.get_added_tokens_decoder().values() if token.special]
        if not parse_special or not added:
            return normalize(text)
        longest_first = sorted(added, key=len, reverse=True)
        plain_and_special = re.split(f"({'|'.join(map(re.escape, longest_first))})", text)
        plain_and_special[::2] = map(normalize, plain_and_special[::2])
        return " ".join(plain_and_special)

    def _check(self, text: str, parse_special: bool) -> None:
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise UserError(f"the text holds {text[error.start]!r}, half of a surrogate pair") from None
        if self.alphabet is None:
            return
        if parse_special:
            for token in sorted(self.special_texts, key=len, reverse=True):
                text = text.replace(token, "")
        if unknown := set(text) - self.alphabet:
            raise UserError(f"character {min(unknown)!r} is not in this character tokenizer's vocabulary")

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        return self.backend.decode(list(ids), skip_special_tokens=skip_special)


def _alphabet(backend: tokenizers.Tokenizer) -> frozenset[str] | None:
    """The characters of a `char` tokenizer, which would drop any other in silence; None for other kinds."""
    if backend.pre_tokenizer is not None or backend.normalizer is not None:
        return None
    vocab = backend.get_vocab(with_added_tokens=False)
    return frozenset(vocab) if all(len(token) == 1 for token in vocab) else None


def _read_roles(folder: Path) -> dict[str, str] | None:
    """role -> token from Hugging Face's files, None where there are none."""
    files = [folder / "special_tokens_map.json", folder / "tokenizer_config.json"]
    if not any(file.is_file() for file in files):
        return None
    roles = {}
    for file in files:
        config = _read_object(file)
        for role in ROLES:
            token = config.get(f"{role}_token")
            if isinstance(token, dict):
                token = token.get("content")
            if token:
                roles[role] = str(token)
    return roles


def _read_normalizer(file: Path) -> str | None:
    name = _read_object(file).get(NORMALIZER_KEY)
    if name not in (None, *NORMALIZERS):
        raise UserError(f"{file}: {NORMALIZER_KEY}: {name!r}; expected {' | '.join(NORMALIZERS)}")
    return name


def _read_chat_template(folder: Path) -> str | None:
    """The Jinja text, from a file of its own or out of tokenizer_config.json (of several named, the default)."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text("utf-8")
    template = _read_object(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _read_object(file: Path) -> dict[str, Any]:
    try:
        return read_object(file)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not JSON ({error})") from error

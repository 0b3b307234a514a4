"""Text -> ids -> text, for every kind of tokenizer."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptcli.errors import UserError
from gptcli.tokenizer import Tokenizer
from gptcli.tokenizer.build import (
    byte_alphabet,
    byte_tokenizer,
    char_tokenizer,
    gpt2_from_files,
    train_bpe,
)
from gptcli.tokenizer.resolve import from_path, known_vocab_size, needs_text, resolve_tokenizer
from gptcli.tokenizer.tokenizer import END_OF_TEXT

LETTERS = "abcdefghijklmnopqrstuvwxyz <|>\n"
TEXT = "the cat and the hat; def the(x): return x  # 语言模型读文字 🙂🙃🙂 naïve café\n" * 20
BYTES, CHAR, BPE = byte_tokenizer(), char_tokenizer([LETTERS]), train_bpe([TEXT], 300)
OPEN = pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])
ALL = pytest.mark.parametrize("tokenizer", [BYTES, CHAR, BPE], ids=["bytes", "char", "bpe"])

# Text in which an end-of-text lookalike and pieces of it are likely.
TRICKY = st.lists(st.one_of(st.text(), st.sampled_from([END_OF_TEXT, "<|", "endoftext", "|>"]))).map("".join)


# ---- round trips ---------------------------------------------------------------------------------


@OPEN
@given(text=TRICKY)
def test_any_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


@given(st.text(alphabet=LETTERS))
def test_characters_come_back_one_id_each(text):
    ids = CHAR.encode(text)
    assert CHAR.decode(ids) == text
    assert ids == [sorted(LETTERS).index(c) for c in text]


@given(st.text())
def test_byte_ids_are_the_bytes(text):
    assert BYTES.encode(text) == list(text.encode())


@OPEN
@given(texts=st.lists(st.text()))
def test_a_batch_is_its_texts_one_by_one(tokenizer, texts):
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(t) for t in texts]


@ALL
@given(parts=st.lists(st.text(alphabet=LETTERS), min_size=1, max_size=4))
def test_special_tokens_in_text_stay_text(tokenizer, parts):
    text = END_OF_TEXT.join(parts)
    plain = tokenizer.encode(text)
    assert tokenizer.eos_id not in plain
    assert tokenizer.decode(plain, skip_special=True) == text
    parsed = tokenizer.encode(text, parse_special=True)
    assert parsed.count(tokenizer.eos_id) == text.count(END_OF_TEXT)
    assert tokenizer.decode(parsed) == text
    assert tokenizer.decode(parsed, skip_special=True) == text.replace(END_OF_TEXT, "")
    assert tokenizer.encode(text) == plain  # parsing once changes nothing for later


def test_a_char_tokenizer_parses_a_special_token_whose_characters_it_lacks():
    abc = char_tokenizer(["abc"])
    assert abc.encode("a" + END_OF_TEXT, parse_special=True) == [0, 3]


def test_lone_surrogate_is_refused():
    """JSON can hold one ("\\ud800"); UTF-8 cannot."""
    with pytest.raises(UserError):
        BYTES.encode("a\ud800")


@ALL
def test_empty_text_has_no_ids(tokenizer):
    assert tokenizer.encode("") == []
    assert tokenizer.encode_batch([]) == []
    assert tokenizer.decode([]) == ""


# ---- vocabulary and special tokens ---------------------------------------------------------------


@ALL
def test_end_of_text_is_the_last_id_and_nothing_is_made_up(tokenizer):
    assert tokenizer.eos_id == tokenizer.vocab_size - 1
    assert tokenizer.decode([tokenizer.eos_id]) == END_OF_TEXT
    assert tokenizer.special_ids == {tokenizer.eos_id}
    assert (tokenizer.pad_id, tokenizer.bos_id) == (None, None)


def test_vocabulary_sizes():
    assert (BYTES.vocab_size, CHAR.vocab_size, BPE.vocab_size) == (257, len(LETTERS) + 1, 300)
    sizes = {"bytes": 257, "bpe:300": 300, "gpt1": 40478, "gpt2": 50257, "char": None, None: None}
    assert {spec: known_vocab_size(spec) for spec in sizes} == sizes
    assert [needs_text(s) for s in ("char", "bpe:300", "bytes", "gpt2")] == [True, True, False, False]


def test_bpe_joins_what_is_frequent():
    assert len(BPE.encode(" the")) == 1
    assert len(BPE.encode(TEXT)) < len(TEXT.encode()) / 2


def test_bpe_needs_room_for_the_bytes():
    with pytest.raises(UserError, match="at least 257"):
        train_bpe([TEXT], 256)
    assert train_bpe([TEXT], 257).decode(train_bpe([TEXT], 257).encode("ÿ\0")) == "ÿ\0"


def test_bpe_of_a_short_text_is_smaller_than_asked():
    short = train_bpe(["aaab"], 5000)
    assert short.vocab_size < 300
    assert short.eos_id == short.vocab_size - 1


def test_char_tokenizer_refuses_what_it_has_not_seen():
    with pytest.raises(UserError, match=r"character 'Q' is not in this character tokenizer's vocabulary"):
        CHAR.encode("a Q")
    with pytest.raises(UserError, match="'Q'"):
        CHAR.encode_batch(["fine", "Q"])


def test_byte_alphabet_is_printable_and_complete():
    alphabet = byte_alphabet()
    assert len(set(alphabet)) == 256
    assert not any(c.isspace() for c in alphabet)
    assert (alphabet[ord("A")], alphabet[ord(" ")], alphabet[ord("\n")]) == ("A", "Ġ", "Ċ")


# ---- files ---------------------------------------------------------------------------------------


@ALL
def test_save_and_load_keep_hash_and_ids(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    text = "the cat and the hat <|endoftext|>"
    for place in (tmp_path, tmp_path / "tokenizer.json"):
        again = Tokenizer.load(place)
        assert again.hash == tokenizer.hash
        assert again.encode(text) == tokenizer.encode(text)
        assert (again.eos_id, again.pad_id, again.vocab_size) == (
            tokenizer.eos_id,
            None,
            tokenizer.vocab_size,
        )


def test_hash_tells_tokenizers_apart(tmp_path):
    others = [BYTES, CHAR, BPE, char_tokenizer(["ab"]), Tokenizer(BYTES.backend, {})]
    assert len({t.hash for t in others}) == len(others)


def test_using_a_tokenizer_does_not_change_its_hash():
    before = BPE.hash
    BPE.encode(END_OF_TEXT, parse_special=True)
    assert BPE.hash == before


def test_roles_are_read_from_tokenizer_config(tmp_path):
    BYTES.save(tmp_path)
    config = {
        "eos_token": {"content": "!"},
        "bos_token": "<|endoftext|>",
        "pad_token": "0",
        "unk_token": None,
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.eos_id, loaded.bos_id, loaded.pad_id) == (ord("!"), 256, ord("0"))
    assert loaded.special_ids == {ord("!"), 256, ord("0")}
    assert loaded.hash != BYTES.hash
    (tmp_path / "again").mkdir()
    loaded.save(tmp_path / "again")
    assert Tokenizer.load(tmp_path / "again").special == loaded.special


def test_a_role_whose_token_does_not_exist_is_none(tmp_path):
    BYTES.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"pad_token": "<pad>"}')
    assert (Tokenizer.load(tmp_path).pad_id, Tokenizer.load(tmp_path).eos_id) == (None, None)


def test_lone_tokenizer_json_names_end_of_text_by_holding_it(tmp_path):
    file = tmp_path / "tokenizer.json"
    file.write_text(BYTES.to_json())
    assert Tokenizer.load(file).eos_id == 256
    file.write_text(BYTES.to_json().replace(END_OF_TEXT, "<|stop|>"))
    assert Tokenizer.load(file).eos_id is None
    assert Tokenizer.load(file).special_ids == {256}


@pytest.mark.parametrize("junk", [b"", b"{}", b"not json", b"\xff\xfe", b'{"model": 3}'])
def test_broken_tokenizer_json_is_named(tmp_path, junk):
    file = tmp_path / "tokenizer.json"
    file.write_bytes(junk)
    with pytest.raises(UserError, match=r"tokenizer\.json: not a tokenizer\.json"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("junk", ["{", "[]", "3"])
def test_broken_tokenizer_config_is_named(tmp_path, junk):
    BYTES.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(junk)
    with pytest.raises(UserError, match=r"tokenizer_config\.json: "):
        Tokenizer.load(tmp_path)


def test_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(UserError, match=r"tokenizer\.json: No such file"):
        Tokenizer.load(tmp_path)


# ---- GPT-2's pair of files -----------------------------------------------------------------------


def write_gpt2_files(folder, names=("encoder.json", "vocab.bpe"), merges=("l o", "lo w", "Ġ low"), end=True):
    tokens = [*byte_alphabet(), *(m.replace(" ", "") for m in merges), *([END_OF_TEXT] if end else [])]
    folder.mkdir(exist_ok=True)
    (folder / names[0]).write_text(json.dumps({t: i for i, t in enumerate(tokens)}), "utf-8")
    (folder / names[1]).write_text("#version: 0.2\n" + "\n".join(merges) + "\n", "utf-8")
    return folder


def test_gpt2_files_under_both_names(tmp_path):
    ours = gpt2_from_files(write_gpt2_files(tmp_path / "openai"))
    assert ours.encode("low low lo") == [257, 258, 32, 256]
    assert (ours.vocab_size, ours.eos_id) == (260, 259)
    assert ours.decode(ours.encode("slow 慢")) == "slow 慢"
    theirs = from_path(write_gpt2_files(tmp_path / "hf", ("vocab.json", "merges.txt")))
    assert theirs.hash == ours.hash
    assert gpt2_from_files(write_gpt2_files(tmp_path / "endless", end=False)).eos_id is None


def test_tokenizer_json_comes_before_gpt2_files(tmp_path):
    CHAR.save(write_gpt2_files(tmp_path / "both"))
    assert from_path(tmp_path / "both").hash == CHAR.hash


def test_gpt2_files_that_do_not_fit(tmp_path):
    with pytest.raises(UserError, match="holds no tokenizer"):
        gpt2_from_files(tmp_path)
    folder = write_gpt2_files(tmp_path / "bad")
    (folder / "vocab.bpe").write_text("#version: 0.2\nq z\n")
    with pytest.raises(UserError, match=r"encoder\.json and vocab\.bpe do not make a BPE"):
        gpt2_from_files(folder)
    (folder / "encoder.json").write_text("{")
    with pytest.raises(UserError, match=r"encoder\.json and vocab\.bpe do not make a BPE"):
        gpt2_from_files(folder)


def test_resolving_names(tmp_path):
    def resolve(spec):
        return resolve_tokenizer(spec, lambda: [TEXT], say=lambda _: None)

    assert resolve("bytes").hash == BYTES.hash
    assert resolve("bpe:300").hash == BPE.hash
    assert resolve("char").encode("the") == char_tokenizer([TEXT]).encode("the")
    CHAR.save(tmp_path)
    assert resolve(str(tmp_path)).hash == CHAR.hash
    with pytest.raises(UserError, match="write bpe:SIZE"):
        resolve("bpe:many")
    with pytest.raises(UserError, match="did you mean 'bytes'"):
        resolve("byte")

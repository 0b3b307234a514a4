"""GPT-1's own tokenizer; the reference is transformers 4's, with ftfy and spaCy."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gptcli.data.shards import write_tokens
from gptcli.errors import UserError
from gptcli.tokenizer import StreamDecoder, Tokenizer, gpt1, resolve
from gptcli.tokenizer.build import byte_tokenizer, gpt1_from_files
from gptcli.tokenizer.resolve import fingerprint, from_path, resolve_tokenizer
from tests.conftest import REPOSITORY, gpt

pytest.importorskip("ftfy")
pytest.importorskip("spacy")

LETTERS = "abcdefghijklmnopqrstuvwxyz.',!-"
OPENAIS, HUGGING_FACES = ("encoder_bpe_40000.json", "vocab_40000.bpe"), ("vocab.json", "merges.txt")


def write_files(folder, names=OPENAIS):
    """A small vocabulary in GPT-1's format."""
    merges = ("t h", "th e</w>", "l o", "lo w</w>", "n '", "n' t</w>")
    words = ["<unk>", *LETTERS, *(c + "</w>" for c in LETTERS), *(m.replace(" ", "") for m in merges), "\n</w>"]
    folder.mkdir(exist_ok=True)
    (folder / names[0]).write_text(json.dumps({word: i for i, word in enumerate(words)}), "utf-8")
    (folder / names[1]).write_text("#version: 0.2\n" + "\n".join(merges) + "\n", "utf-8")
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return gpt1_from_files(write_files(tmp_path_factory.mktemp("gpt1")))


@pytest.fixture(scope="module")
def openais(shared_data):
    return gpt1_from_files(shared_data / "tok" / "gpt1")


def tokens(tokenizer, text, **options):
    return [tokenizer.backend.id_to_token(i) for i in tokenizer.encode(text, **options)]


def no_spacy(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)


# ---- what the original gives ---------------------------------------------------------------------


def wikitext_lines(shared_data):
    text = (shared_data / "text" / "wikitext2" / "test.txt").read_text("utf-8")
    return [line for line in text.split("\n") if line.strip()][:1000]


@pytest.mark.parametrize(("order", "change"), [("openai", str), ("lower_case_first", str.lower)])
def test_ids_of_wikitext_are_the_references(openais, shared_data, order, change):
    """`tests/golden/gpt1_tokens.py` says how the reference was made, and why there are two."""
    golden = json.loads((REPOSITORY / "tests" / "golden" / "gpt1_tokens.json").read_text("utf-8"))[order]
    ids = openais.encode_batch([change(line) for line in wikitext_lines(shared_data)])
    assert sum(map(len, ids)) == golden["tokens"]
    assert hashlib.sha256(json.dumps(ids).encode()).hexdigest() == golden["sha256"]


def test_vocabulary_of_openai(openais):
    assert (openais.vocab_size, openais.eos_id, openais.special_ids) == (40478, None, {0})
    # Lower-casing comes last: the vocabulary has words that spaCy knows by their capital only.
    words = "Mr. Hu lives in the U.S."
    assert [token.removesuffix("</w>") for token in tokens(openais, words)] == words.lower().split()
    assert openais.encode("the president is a very good man.") == [481, 4735, 544, 246, 963, 870, 762, 239]


# Words as the reference splits them; the spaces between are where it starts a new one.
SENTENCES = {
    "contractions": (
        "I don't think we'll, can't, won't; it's 'fine'.",
        "i do n't think we 'll , ca n't , wo n't ; it 's ' fine ' .",
    ),
    "abbreviations and currency": (
        "Mr. Smith paid $5.50 (about €4) in the U.S. at 10 a.m.",
        "mr. smith paid $ 5.50 ( about € 4 ) in the u.s. at 10 a.m.",
    ),
    "units": (
        "3pm 10km 50% #1 @me R&B rock'n'roll o'clock",
        "3 pm 10 km 50 % # 1 @me r&b rock'n'roll o'clock",
    ),
    "ellipses": ("wait... what…  really?!", "wait ... what ... really ? !"),
    "dashes": ("one—two – three―four --- five", "one - two - three - four --- five"),
    "newlines": ("a\n\n  b \r\n\tc\u2028d\n", "a \n b \n c \n d"),
    "mojibake": ("schÃ¶n: itâ€™s Cafe\u0301", "schön : it 's café"),
    "quotation marks": ("“Quoted” ‘text’ it´s", "\" quoted \" ' text ' it 's"),
    "entities": ("&lt;b&gt; &amp; &copy;", "< b > & ©"),
    "chinese": ("你好，世界。", "你好 , 世界 。"),
    "emoji": ("😀👍🏽 ok :) <3", "😀 👍 🏽 ok : ) <3"),
    "capitals": ("ÀÉÎ ΟΔΟΣ İ", "àéî οδος i̇"),
    "code": ("snake_case[0]={1/2}|~!!??", "snake _ case [ 0 ] = { 1 / 2 } | ~ ! ! ? ?"),
    "addresses": ("http://a.b/c-d?e me@x.org", "http : // a.b / c - d ? e me@x.org"),
    "ligatures and wide letters": ("ﬁne ＡＢ", "fine ab"),
    "special tokens are text": ("<unk> and </w> end", "< unk > and < / w > end"),
    "control characters": ("\x00\x07bell\x1b[31mred", "bellred"),
    "nothing": ("", ""),
    "white space": (" \n\t \r\n\u3000", ""),
}


@pytest.mark.parametrize("name", SENTENCES)
def test_words_are_the_references(name):
    text, words = SENTENCES[name]
    assert gpt1.normalize(text) == words


def test_words_without_spacy():
    assert gpt1.normalize_without_spacy("I don't…\n\nÉTÉ_2") == "i don ' t . . . \n été _ 2"


@given(st.text())
def test_words_are_lower_case_and_one_space_apart(text):
    for normalize in gpt1.NORMALIZERS.values():
        words = normalize(text)
        assert words == words.strip(" ")
        assert "  " not in words
        assert re.fullmatch(r"\S*(?: \n \S+| \S+)*", words)


# ---- tokens --------------------------------------------------------------------------------------


def test_merges_end_with_the_word_and_unknown_characters_are_unk(small):
    assert tokens(small, "The lowest") == ["the</w>", "lo", "w", "e", "s", "t</w>"]
    assert tokens(small, "Low\nI didn't 语é!") == [
        "low</w>", "\n</w>", "i</w>", "d", "i", "d</w>", "n't</w>", "<unk>", "<unk>", "!</w>",
    ]  # fmt: skip
    assert small.encode("") == small.encode(" \n ") == []


@given(text=st.text(alphabet="abtheTHELOW .,!'\n-"))
def test_decoding_gives_the_words(small, text):
    assert small.decode(small.encode(text)) == gpt1.normalize(text)


@given(texts=st.lists(st.text()))
def test_a_batch_is_its_texts_one_by_one(small, texts):
    assert small.encode_batch(texts) == [small.encode(text) for text in texts]


def test_a_text_is_normalized_once(small, monkeypatch):
    seen = []
    monkeypatch.setitem(gpt1.NORMALIZERS, "gpt1", lambda text: seen.append(text) or text)
    small.encode_batch(["a", "b"])
    assert seen == ["a", "b"]


def test_special_tokens_are_parsed_only_on_request(small):
    text = "the<unk>LOW <unk>"
    assert tokens(small, "<unk>") == ["<unk>", "u", "n", "k</w>", "<unk>"]  # no vocabulary here has < and >
    assert tokens(small, text, parse_special=True) == ["the</w>", "<unk>", "low</w>", "<unk>"]
    assert small.encode("the low", parse_special=True) == small.encode("the low")


@pytest.mark.parametrize("skip", [True, False])
@given(numbers=st.lists(st.integers(0, 10**6)))
@example(numbers=[40, 0, 41])  # a left-out token between two words
@example(numbers=[0, 0, 40])
def test_a_stream_is_the_full_decode(small, skip, numbers):
    ids = [n % small.vocab_size for n in numbers]
    stream = StreamDecoder(small, skip_special=skip)
    assert "".join([*map(stream.push, ids), stream.flush()]) == small.decode(ids, skip_special=skip)


# ---- files and names -----------------------------------------------------------------------------


def test_save_and_load_keep_ids_and_hash(small, tmp_path):
    small.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert (again.normalizer, again.hash, again.special_ids) == ("gpt1", small.hash, {0})
    assert again.encode("The lowest\nDIDN'T") == small.encode("The lowest\nDIDN'T")
    assert Tokenizer(small.backend, small.special).hash != small.hash


@pytest.mark.parametrize("junk", ["gpt0", ["gpt1"], 1])
def test_unknown_normalizer_is_named(small, tmp_path, junk):
    small.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"gptcli_normalizer": junk}))
    with pytest.raises(UserError, match=r"tokenizer_config\.json: gptcli_normalizer: .*; expected gpt1"):
        Tokenizer.load(tmp_path)


def test_a_folder_of_openais_or_hugging_faces_files(small, tmp_path):
    for names in (OPENAIS, HUGGING_FACES):
        assert from_path(write_files(tmp_path / names[0], names)).hash == small.hash
    byte_tokenizer().save(tmp_path / "vocab.json")  # as the hub has one, which splits text as BERT does
    assert from_path(tmp_path / "vocab.json").hash == small.hash


def test_files_that_make_no_bpe_are_named(tmp_path):
    (write_files(tmp_path / "bad") / "vocab_40000.bpe").write_text("#version: 0.2\nq q q\n")
    with pytest.raises(UserError, match=r"encoder_bpe_40000\.json and vocab_40000\.bpe do not make a BPE"):
        from_path(tmp_path / "bad")


def test_the_name_gpt1_takes_the_hubs_files(small, tmp_path, monkeypatch):
    folder = write_files(tmp_path / "hub", HUGGING_FACES)
    monkeypatch.setattr("gptcli.hub.fetch", lambda repo, file: folder / file)
    assert resolve_tokenizer("gpt1", list, say=pytest.fail).hash == small.hash
    monkeypatch.setattr("gptcli.hub.fetch", lambda repo, file: None)
    with pytest.raises(UserError, match=r"no hub answers; put encoder_bpe_40000\.json"):
        resolve_tokenizer("gpt1", list, say=pytest.fail)


def test_documents_follow_one_another(small, tmp_path):
    """There is no end-of-text in GPT-1's vocabulary."""
    small.save(tmp_path)
    made = write_tokens(lambda: [("train", "the low")] * 3, tmp_path / "out", str(tmp_path), origin={})
    assert made.tokens("train").tolist() == small.encode("the low") * 3


def test_the_command_line_reads_and_writes_it(small, tmp_path):
    folder = write_files(tmp_path / "files")
    done = gpt("tokenize", "--tokenizer", folder, stdin=b"The LOW\n\ndidn't\n")
    assert [json.loads(line) for line in done.out.splitlines()] == [small.encode(t) for t in ("the low", "", "didn't")]
    back = gpt("tokenize", "--tokenizer", folder, "--decode", stdin=done.out.encode())
    assert [json.loads(line)["text"] for line in back.out.splitlines()] == ["the low", "", "did n't"]


# ---- what is not installed -----------------------------------------------------------------------


def test_without_spacy_the_tokenizer_is_another_and_says_so(small, tmp_path, monkeypatch):
    folder = write_files(tmp_path / "files")
    with_spacy = fingerprint(str(folder)), fingerprint("gpt1")
    no_spacy(monkeypatch)
    said = []
    made = resolve_tokenizer(str(folder), list, say=said.append)
    assert (made.normalizer, len(said)) == ("gpt1-basic", 1)
    assert "pip install 'gptcli[gpt1]'" in said[0]
    assert tokens(made, "Didn't!") == ["d", "i", "d", "n</w>", "'</w>", "t</w>", "!</w>"]
    assert made.hash != small.hash
    assert not {fingerprint(str(folder)), fingerprint("gpt1")} & set(with_spacy)
    made.save(tmp_path)
    monkeypatch.undo()  # installing it later does not change what a checkpoint was trained with
    assert Tokenizer.load(tmp_path).encode("Didn't!") == made.encode("Didn't!")


@pytest.mark.parametrize(("module", "load"), [("ftfy", gpt1._fix_text), ("spacy.lang.en", gpt1._spacy_words)])
def test_a_missing_part_is_named_when_text_comes(small, monkeypatch, module, load):
    monkeypatch.setitem(sys.modules, module, None)
    load.cache_clear()
    with pytest.raises(UserError, match=r"which is not installed: pip install 'gptcli\[gpt1\]'"):
        small.encode("text")
    assert small.decode([40]) == "i"  # reading ids needs neither


def test_importing_it_imports_neither():
    code = f"import sys, {resolve.__name__}; print({{'ftfy', 'spacy', 'torch'}} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"

"""Makes gpt1_tokens.json: what transformers 4's GPT-1 tokenizer, with ftfy and spaCy, gives for lines of WikiText-2.

    python -m venv ref && ref/bin/pip install transformers==4.57.6 ftfy==6.3.1 spacy==3.8.18
    ref/bin/python tests/golden/gpt1_tokens.py FOLDER/encoder_bpe_40000.json FOLDER/vocab_40000.bpe wikitext2/test.txt

`tokenize` lower-cases a line before all else, which OpenAI's code did not: spaCy knows "Mr." and "U.S.", and not "mr."
and "u.s.", so that `mr.</w>`, an early merge, could never be met. `_tokenize` is what comes after, in OpenAI's order.
"""

import hashlib
import json
import sys
from pathlib import Path


def main(vocab: str, merges: str, text: str) -> None:
    from transformers import OpenAIGPTTokenizer

    theirs = OpenAIGPTTokenizer(vocab, merges, split_special_tokens=True)  # <unk> in the text is text
    lines = [line for line in Path(text).read_text("utf-8").split("\n") if line.strip()][:1000]
    made = {}
    for name, split in (("openai", theirs._tokenize), ("lower_case_first", theirs.tokenize)):
        ids = [theirs.convert_tokens_to_ids(split(line)) for line in lines]
        made[name] = {"tokens": sum(map(len, ids)), "sha256": hashlib.sha256(json.dumps(ids).encode()).hexdigest()}
    Path(__file__).with_suffix(".json").write_text(json.dumps(made, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])

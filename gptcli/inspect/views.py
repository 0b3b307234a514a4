"""What each `gpt inspect` verb says: one object for scripts, lines for people, a picture where a path is given."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptcli.config.schema import SamplingParams
from gptcli.generate.sampling import largest
from gptcli.inspect import picture
from gptcli.inspect.analogies import Section, measure, read_questions, total
from gptcli.inspect.capture import attention_weights, residual_stream
from gptcli.inspect.page import attention_page
from gptcli.inspect.predict import entropy, layer_names, lens, next_logits, sampled_probabilities
from gptcli.inspect.terminal import bars, columns, flow
from gptcli.inspect.tokens import find_word
from gptcli.inspect.words import WordSpace, nearest_rows, pca
from gptcli.model import GPT
from gptcli.tokenizer import Tokenizer
from gptcli.tokenizer.texts import TokenTexts

MOST_ATTENDED = 5  # tokens a layer, in the terminal


@dataclass(frozen=True)
class View:
    row: dict[str, Any]
    lines: list[str]


def view_next(
    model: GPT, tokenizer: Tokenizer, ids: Sequence[int], params: SamplingParams, *, top: int, out: Path | None
) -> View:
    texts, logits = TokenTexts(tokenizer), next_logits(model, ids)
    sampled = sampled_probabilities(logits, params).tolist()
    best = largest(logits.softmax(-1)[None], top)[0]
    nats, rest = float(entropy(logits)), max(0.0, 1 - sum(p for _, p in best))
    rows = [_token(texts, i) | {"probability": p, "sampled_probability": sampled[i]} for i, p in best]
    if out is not None:
        labelled = [(texts.shown(i), p) for i, p in best]
        picture.save_bars(labelled, out, title="the next token", xlabel="probability")
    # by default sampling takes the distribution as it is, which needs no second column
    after = [f" → {sampled[i]:6.1%}" if params != SamplingParams() else "" for i, _ in best]
    lines = bars([(texts.shown(i), f"{p:6.1%}{note}", p) for (i, p), note in zip(best, after, strict=True)])
    lines.append(f"the others {rest:.1%}; entropy {nats:.2f} nats, as of {math.exp(nats):,.1f} equally likely tokens")
    return View({"tokens": rows, "others": rest, "entropy": nats}, lines)


def view_attention(
    model: GPT,
    tokenizer: Tokenizer,
    ids: Sequence[int],
    *,
    layers: Sequence[int],
    heads: Sequence[int],
    token: int | None,
    word: str | None,
    out: Path | None,
) -> View:
    """How `token`, or the last token of `word`, else of the text, looks at those before it."""
    texts = TokenTexts(tokenizer)
    shown = [texts.shown(i) for i in ids]
    looks = len(ids) - 1 if token is None else token
    if word is not None:
        looks = find_word(tokenizer, ids, word)
    weights = attention_weights(model, ids)[list(layers)][:, list(heads)].cpu()
    if out is not None and out.suffix == ".html":
        page = attention_page(
            weights, shown, layers, heads, focus=looks, title=tokenizer.decode(ids, skip_special=True)
        )
        out.write_text(page, "utf-8")
    elif out is not None:
        picture.save_attention(weights, shown, layers, heads, out)
    row = {
        "tokens": [_token(texts, i) for i in ids],
        "layers": list(layers),
        "heads": list(heads),
        "token": looks,
        "weights": weights.double().round(decimals=6).tolist(),
    }
    lines = [f"{shown[looks]} (token {looks}) looks at"]
    seen = weights[:, :, looks, : looks + 1]
    if len(layers) == 1:
        lines += _one_layer(seen[0], shown[: looks + 1], layers[0], heads)
    else:
        lines += _many_layers(seen, shown, layers, heads)
    return View(row, lines)


def _one_layer(weights: Tensor, shown: Sequence[str], layer: int, heads: Sequence[int]) -> list[str]:
    """weights (heads, T): a bar for every token, in the text's order."""
    mean = weights.mean(0).tolist()
    which = f"layer {layer}, head {heads[0]}" if len(heads) == 1 else f"layer {layer}, mean of {len(heads)} heads"
    lines = [which, *bars([(text, f"{mean[i]:6.1%}", mean[i]) for i, text in enumerate(shown)])]
    return lines + (_maxima(weights, shown, heads) if len(heads) > 1 else [])


def _many_layers(weights: Tensor, shown: Sequence[str], layers: Sequence[int], heads: Sequence[int]) -> list[str]:
    """weights (layers, heads, T): the most attended tokens of each layer, then each head's first choice."""
    table = [
        [f"layer {layer}", *(cell for i, p in best for cell in (shown[i], f"{p:6.1%}"))]
        for layer, best in zip(layers, largest(weights.mean(1), MOST_ATTENDED), strict=True)
    ]
    lines = columns(table)
    if len(heads) > 1:
        lines.insert(0, f"mean of {len(heads)} heads")
        lines.append("each head's first choice")
        for layer, of_layer in zip(layers, weights, strict=True):
            lines += _maxima(of_layer, shown, heads, name=f"layer {layer}")
    return lines


def _maxima(weights: Tensor, shown: Sequence[str], heads: Sequence[int], name: str = "heads") -> list[str]:
    """weights (heads, T)."""
    best = largest(weights, 1)
    cells = [f"{head}: {shown[i]} {p:.0%}" for head, [(i, p)] in zip(heads, best, strict=True)]
    return flow(cells, first=name)


def view_neighbours(space: WordSpace, words: Sequence[str], *, top: int, out: Path | None) -> View:
    """The closest tokens of each word or sum of words; drawn, a map of the words."""
    texts = TokenTexts(space.tokenizer)
    found = {word: space.neighbours(word, top) for word in words}
    if out is not None:
        _draw_map(space, found, texts, out)
    lines: list[str] = []
    for word, closest in found.items():
        lines += [word] if len(words) > 1 else []
        lines += bars([(texts.shown(i), f"{cosine:6.3f}", cosine) for i, cosine in closest])
    rows = [
        {"word": word, "neighbours": [_token(texts, i) | {"cosine": cosine} for i, cosine in closest]}
        for word, closest in found.items()
    ]
    return View({"words": rows}, lines)


def _draw_map(space: WordSpace, found: dict[str, list[tuple[int, float]]], texts: TokenTexts, out: Path) -> None:
    """One or two words make no map, so their neighbours join them."""
    near = sorted({i for closest in found.values() for i, _ in closest}) if len(found) < 3 else []
    points = torch.cat([torch.stack([space.vector(word) for word in found]), space.table[near]])
    labels = [*found, *map(texts.shown, near)]
    places = [
        (label, x, y, n < len(found))
        for n, (label, (x, y)) in enumerate(zip(labels, pca(points).tolist(), strict=True))
    ]
    picture.save_map(places, out, title="token embeddings, on their two main directions")


def view_projection(space: WordSpace, words: Sequence[str], direction: str, *, out: Path | None) -> View:
    values = [(word, space.projection(word, direction)) for word in words]
    if out is not None:
        picture.save_bars(values, out, title=direction, xlabel="cosine with the direction")
    lines = bars([(word, f"{value:6.3f}", value) for word, value in values])
    rows = [{"word": word, "projection": value} for word, value in values]
    return View({"direction": direction, "words": rows}, lines)


def view_in_context(model: GPT, space: WordSpace, ids: Sequence[int], word: str, *, top: int) -> View:
    """The token embeddings closest to the word's hidden state, layer by layer: at first its own, in a model with a
    tied head at last those of what may come next."""
    texts, place = TokenTexts(space.tokenizer), find_word(space.tokenizer, ids, word)
    stream, _ = residual_stream(model, ids)
    found = [nearest_rows(space.table, state, top=top) for state in stream[:, place]]
    names = layer_names(model)
    rows = [
        {"layer": name, "neighbours": [_token(texts, i) | {"cosine": cosine} for i, cosine in closest]}
        for name, closest in zip(names, found, strict=True)
    ]
    table = [
        [name, *(cell for i, cosine in closest for cell in (texts.shown(i), f"{cosine:6.3f}"))]
        for name, closest in zip(names, found, strict=True)
    ]
    return View({"word": word, "token": place, "layers": rows}, columns(table))


def view_analogies(space: WordSpace, file: Path) -> View:
    sections = measure(space, read_questions(file))
    everything = total(sections)
    table = [["section", "accuracy", "correct", "of", "skipped"]]
    table += [
        [s.name, "-" if s.accuracy is None else f"{s.accuracy:.1%}", str(s.correct), str(s.asked), str(s.skipped)]
        for s in [*sections, everything]
    ]
    lines = [*columns(table), "skipped: a word is no single token of this model"]
    return View({"sections": [_section_row(s) for s in sections], **_section_row(everything)}, lines)


def _section_row(section: Section) -> dict[str, Any]:
    counts = {"correct": section.correct, "n": section.asked, "skipped": section.skipped}
    return {"name": section.name, "accuracy": section.accuracy, **counts}


def view_layers(model: GPT, tokenizer: Tokenizer, ids: Sequence[int], *, top: int, out: Path | None) -> View:
    texts, names = TokenTexts(tokenizer), layer_names(model)
    stream, _ = residual_stream(model, ids)
    logits = lens(model, stream[:, -1])
    best = largest(logits.softmax(-1), top)
    nats = entropy(logits).tolist()
    if out is not None:
        _draw_lens(model, stream, [texts.shown(i) for i in ids], texts, out)
    rows = [
        {"layer": name, "entropy": e, "tokens": [_token(texts, i) | {"probability": p} for i, p in tokens]}
        for name, e, tokens in zip(names, nats, best, strict=True)
    ]
    head = ["after", "nats", "likeliest next tokens"]
    body = [
        [name, f"{e:5.2f}", *(cell for i, p in tokens for cell in (texts.shown(i), f"{p:6.1%}"))]
        for name, e, tokens in zip(names, nats, best, strict=True)
    ]
    return View({"layers": rows}, columns([head, *body]))


def _draw_lens(model: GPT, stream: Tensor, tokens: Sequence[str], texts: TokenTexts, out: Path) -> None:
    # layer by layer, since (n_layer, T, V) would not fit for a large vocabulary
    best = [lens(model, residual).softmax(-1).max(-1) for residual in stream]
    words = [[texts.shown(i) for i in row.indices.tolist()] for row in best]
    picture.save_lens([row.values.tolist() for row in best], words, tokens, layer_names(model), out)


def _token(texts: TokenTexts, id: int) -> dict[str, Any]:
    return {"id": id, "text": texts.text(id)}

"""PNGs: bars, heat maps, a map of words."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

BLUE, RED = "#7aa6c2", "#b3412e"
# For tokens that DejaVu cannot draw, where one of these is installed.
FALLBACK_FONTS = ("Noto Sans CJK JP", "Noto Sans CJK SC", "PingFang SC", "Hiragino Sans", "Microsoft YaHei", "SimHei")
LARGEST_LABELLED = 40  # rows or columns of a heat map that are named
LARGEST_SMALL_LABELLED = 16  # the same of a small one among many
INCHES = 40  # no picture is wider or higher


def save_bars(rows: Sequence[tuple[str, float]], path: Path, *, title: str, xlabel: str) -> None:
    with _figure(path, 8, 1.2 + 0.28 * len(rows)) as figure:
        axis = figure.subplots()
        labels, values = zip(*rows, strict=True)
        axis.barh(range(len(rows)), values, color=[RED if v < 0 else BLUE for v in values])
        axis.set_yticks(range(len(rows)), labels)
        axis.invert_yaxis()
        axis.set(title=title, xlabel=xlabel)


def save_attention(
    weights: Tensor, tokens: Sequence[str], layers: Sequence[int], heads: Sequence[int], path: Path
) -> None:
    """weights (layers, heads, T, T): one heat map each, layers from top to bottom."""
    alone = len(layers) == len(heads) == 1
    size = 2.0 + 0.3 * min(len(tokens), LARGEST_LABELLED) if alone else 1.5
    with _figure(path, size * len(heads) + 0.6, size * len(layers) + 0.6) as figure:
        axes = figure.subplots(len(layers), len(heads), squeeze=False)
        few = len(tokens) <= LARGEST_SMALL_LABELLED  # of many maps only those at the edge are named
        for number, (row, of_layer) in enumerate(zip(axes, weights.numpy(), strict=True)):
            for axis, of_head in zip(row, of_layer, strict=True):
                axis.imshow(of_head, vmin=0, vmax=1, cmap="Blues")
                below, left = number == len(axes) - 1, axis is row[0]
                _name_ticks(axis, *(tokens if alone or (few and edge) else [] for edge in (below, left)))
                axis.tick_params(labelsize=None if alone else 5, length=3.5 if alone else 1)
        for axis, head in zip(axes[0], heads, strict=True):
            axis.set_title(f"layer {layers[0]}, head {head}" if alone else f"head {head}", fontsize=9)
        for axis, layer in zip(axes[:, 0], layers, strict=True):
            axis.set_ylabel("looks" if alone else f"layer {layer}", fontsize=9)
        if alone:
            axes[0][0].set_xlabel("looked at", fontsize=9)


def save_lens(
    probabilities: Any, best: Sequence[Sequence[str]], tokens: Sequence[str], layers: Sequence[str], path: Path
) -> None:
    """The likeliest token (best) of each layer (from below) at each position, on its probability (layers, T)."""
    named = len(tokens) <= LARGEST_LABELLED
    with _figure(path, 2 + (0.8 if named else 0.1) * len(tokens), 1.6 + 0.35 * len(layers)) as figure:
        axis = figure.subplots()
        image = axis.imshow(probabilities, vmin=0, vmax=1, cmap="Blues", aspect="auto", origin="lower")
        _name_ticks(axis, tokens, layers)
        for row, words in enumerate(best if named else []):
            for column, word in enumerate(words):
                dark = probabilities[row][column] > 0.6
                axis.text(column, row, word, ha="center", va="center", fontsize=7, color="white" if dark else "black")
        axis.set(title="the likeliest next token, had the model ended there", xlabel="after the token")
        figure.colorbar(image, label="its probability")


def save_map(points: Sequence[tuple[str, float, float, bool]], path: Path, *, title: str) -> None:
    """(label, x, y, whether it was asked for) of words on a plane."""
    with _figure(path, 8, 6) as figure:
        axis = figure.subplots()
        for label, x, y, asked in points:
            colour = RED if asked else BLUE
            axis.scatter(x, y, color=colour, s=14)
            axis.annotate(label, (x, y), textcoords="offset points", xytext=(4, 4), color=colour, fontsize=9)
        axis.margins(0.12)
        axis.set(title=title, xlabel="first principal component", ylabel="second")


@contextmanager
def _figure(path: Path, width: float, height: float) -> Iterator[Any]:
    """A figure that is saved at the end. Its texts are tokens, so a $ is no formula."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import font_manager, pyplot

    installed = set(font_manager.get_font_names())
    fonts = ["DejaVu Sans", *(name for name in FALLBACK_FONTS if name in installed)]
    with matplotlib.rc_context({"font.family": fonts, "text.parse_math": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = pyplot.figure(figsize=(min(width, INCHES), min(height, INCHES)), dpi=120, layout="constrained")
        yield figure
        figure.savefig(path)
        pyplot.close(figure)


def _name_ticks(axis: Any, columns: Sequence[str], rows: Sequence[str]) -> None:
    """Names along the edges, or nothing where they would not fit."""
    names = [names if len(names) <= LARGEST_LABELLED else [] for names in (columns, rows)]
    axis.set_xticks(range(len(names[0])), names[0], rotation=90)
    axis.set_yticks(range(len(names[1])), names[1])

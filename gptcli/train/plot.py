"""The loss curve: a picture in the run, a small one in the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # Braille dot bits, by row and column


def save_loss_png(rows: list[dict[str, Any]], path: Path, title: str, ylabel: str) -> None:
    """Training and validation loss over tokens, the learning rate faintly behind."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 4.5), dpi=120)
    trained = [(r["tokens"], r["loss"]) for r in rows if r.get("loss") is not None]
    held_out = [(r["tokens"], r["val_loss"]) for r in rows if r.get("val_loss") is not None]
    if trained:
        axis.plot(*zip(*trained, strict=True), color="#7aa6c2", linewidth=1, label="training")
    if held_out:
        axis.plot(*zip(*held_out, strict=True), color="#b3412e", marker="o", markersize=3, label="held out")
        axis.annotate(f"{held_out[-1][1]:.3f}", held_out[-1], textcoords="offset points", xytext=(4, 6), fontsize=9)
    rate = axis.twinx()
    rate.plot([r["tokens"] for r in rows], [r["lr"] for r in rows], color="#cccccc", linewidth=1)
    rate.set_ylabel("learning rate", color="#999999")
    rate.tick_params(colors="#999999")
    axis.set(xlabel="tokens", ylabel=ylabel, title=title)
    axis.set_zorder(rate.get_zorder() + 1)
    axis.patch.set_visible(False)
    axis.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def braille_chart(values: list[float], *, width: int = 56, height: int = 7) -> list[str]:
    """Lines of text that draw `values` from left to right, with the range at the left edge."""
    if len(values) < 2:
        return []
    columns, dots = width * 2, height * 4
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    cells = [[0] * width for _ in range(height)]
    previous: int | None = None
    for x in range(columns):
        start = x * len(values) // columns
        end = max(start + 1, (x + 1) * len(values) // columns)
        mean = sum(values[start:end]) / (end - start)
        y = round((high - mean) / span * (dots - 1))
        between = range(min(y, previous), max(y, previous) + 1) if previous is not None else range(y, y + 1)
        for dot in between:
            cells[dot // 4][x // 2] |= DOTS[dot % 4][x % 2]
        previous = y
    labels = [f"{high:8.3f} "] + [" " * 9] * (height - 2) + [f"{low:8.3f} "]
    return [label + "".join(chr(0x2800 + c) for c in row) for label, row in zip(labels, cells, strict=True)]

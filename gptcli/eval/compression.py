"""Is the model a better compressor than gzip and xz? Any language model is one (Shannon 1948; Delétang et al. 2023)."""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Sequence


def gzip_bits_per_byte(text: bytes) -> float:
    """gzip -9 on the text alone."""
    return 8 * len(gzip.compress(text, 9)) / len(text)


def xz_bits_per_byte(text: bytes, seen: bytes = b"") -> float:
    """xz -9e on the text; with `seen`, what the text costs after xz was given that first."""
    preset = 9 | lzma.PRESET_EXTREME
    dictionary = max(1 << 26, len(seen) + len(text))  # -9 alone looks back 64 MiB
    filters = [{"id": lzma.FILTER_LZMA2, "preset": preset, "dict_size": min(dictionary, (1 << 32) - 1)}]
    whole = len(lzma.compress(seen + text, format=lzma.FORMAT_XZ, filters=filters))
    before = len(lzma.compress(seen, format=lzma.FORMAT_XZ, filters=filters)) if seen else 0
    return 8 * (whole - before) / len(text)


def compressors(train: Sequence[str], held_out: Sequence[str]) -> dict[str, float]:
    """Bits per byte of the concatenated held-out documents."""
    text, seen = "".join(held_out).encode(), "".join(train).encode()
    return {"gzip": gzip_bits_per_byte(text), "xz_given_training_text": xz_bits_per_byte(text, seen)}

"""Documents from files, folders, globs, stdin, the installed standard library, or the hub."""

from __future__ import annotations

import glob
import io
import json
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NoReturn

from gptcli import hub
from gptcli.errors import UserError, nearest

PLAIN = (".txt", ".md", ".py")
COMPRESSED = (".gz", ".zst")
STDLIB = "python-stdlib"
HUB = "hf:"
PIECE_BYTES = 1 << 20

OnBad = Callable[[UserError], None]  # what is told of a bad line, file and line first


@dataclass
class Skipped:
    """Bad documents left out under skip_bad, with their reasons."""

    reasons: list[str] = field(default_factory=list)


@dataclass
class SourceReader:
    """Reads the documents of `specs`. Reading twice gives the same documents in the same order.

    Raises UserError naming file and line; with skip_bad, notes it in `skipped` and goes on.
    """

    specs: list[str]
    text_key: str = "text"
    skip_bad: bool = False
    skipped: Skipped = field(default_factory=Skipped)
    _stdin: list[str] | None = None

    def documents(self) -> Iterator[str]:
        """Every document that holds more than white space."""
        self.skipped = Skipped()
        for spec in self.specs:
            for text in self._read(spec):
                if text.strip():
                    yield text

    def pieces(self) -> Iterator[tuple[str, bool, str]]:
        """The documents as (where, whether it goes on from the piece before, text): plain files a piece at a time, cut
        at white space, so that a file of any size is never held."""
        self.skipped = Skipped()
        for spec in self.specs:
            if spec == "-" or spec.startswith(HUB):
                yield from ((spec, False, text) for text in self._read(spec))
                continue
            for path in list_files(spec):
                if suffix(path) in (".parquet", ".jsonl"):
                    yield from ((str(path), False, text) for text in self._read_file(path))
                else:
                    yield from self._read_pieces(path)

    def _read_pieces(self, path: Path) -> Iterator[tuple[str, bool, str]]:
        rest, lines = b"", 0
        for number, block in enumerate(_blocks(path)):
            rest += block
            end = len(rest) if len(block) < PIECE_BYTES else max(rest.rfind(b"\n"), rest.rfind(b" ")) + 1
            piece, rest = rest[:end], rest[end:]
            try:
                yield str(path), number > 0, decode(piece, str(path), lines_before=lines)
            except UserError as error:
                return self._bad(error)
            lines += piece.count(b"\n")

    def fingerprint(self) -> list[Any]:
        """What the documents depend on, cheap to compute: paths, sizes and times. Stdin is read for it."""
        out: list[Any] = [self.text_key, self.skip_bad]
        for spec in self.specs:
            if spec == "-":
                out.append(["stdin", self._read_stdin()])
            elif spec.startswith(HUB):
                local = Path(spec.removeprefix(HUB).split(":")[0])
                files = sorted(p for p in local.rglob("*") if p.is_file()) if local.is_dir() else []
                out.append([spec, [stamp(path) for path in files]])
            else:
                out += [stamp(path) for path in list_files(spec)]
        return out

    def _read(self, spec: str) -> Iterator[str]:
        if spec == "-":
            yield from self._read_stdin()
        elif spec.startswith(HUB):
            yield from _read_hub(spec, self.text_key)
        else:
            for path in list_files(spec):
                yield from self._read_file(path)

    def _read_stdin(self) -> list[str]:
        if self._stdin is None:
            data = sys.stdin.buffer.read()
            self._stdin = [decode(data, "<stdin>")]
        return self._stdin

    def _read_file(self, path: Path) -> Iterator[str]:
        kind = suffix(path)
        try:
            if kind == ".parquet":
                yield from _read_parquet(path, self.text_key)
            elif kind == ".jsonl":
                yield from self._read_jsonl(path)
            else:
                yield decode(read_bytes(path), str(path))
        except UserError as error:
            self._bad(error)

    def _read_jsonl(self, path: Path) -> Iterator[str]:
        for number, row in read_jsonl(path, on_bad=self._bad):
            text = row.get(self.text_key)
            if isinstance(text, str) and not has_surrogates(text):
                yield text
            elif self.text_key in row:
                what = "half of a surrogate pair" if isinstance(text, str) else type(text).__name__
                self._bad(UserError(f"{path}:{number}: {self.text_key!r} holds {what}, not text"))
            else:
                hint = nearest(self.text_key, list(row)) or f"; its columns: {', '.join(row) or 'none'}"
                self._bad(UserError(f"{path}:{number}: no text column {self.text_key!r}{hint}"))

    def _bad(self, error: UserError) -> None:
        if not self.skip_bad:
            raise error
        self.skipped.reasons.append(str(error))


def refuse(error: UserError) -> NoReturn:
    """The OnBad that ends at the first."""
    raise error


def read_jsonl(path: Path, *, on_bad: OnBad = refuse) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) of a .jsonl, .jsonl.gz or .jsonl.zst file; blank lines are passed over. What
    is no object goes to `on_bad` as a UserError, file and line first."""
    return parse_jsonl(read_lines(path), str(path), on_bad=on_bad)


def parse_jsonl(lines: Iterable[bytes], name: str, *, on_bad: OnBad = refuse) -> Iterator[tuple[int, dict[str, Any]]]:
    """The same of any lines; `name` stands for the file in complaints."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except UnicodeDecodeError:
            on_bad(UserError(f"{name}:{number}: not UTF-8"))
            continue
        except ValueError as error:
            on_bad(UserError(f"{name}:{number}: not JSON ({error})"))
            continue
        if isinstance(row, dict):
            yield number, row
        else:
            on_bad(UserError(f"{name}:{number}: expected one JSON object a line"))


def read_lines(path: Path) -> Iterator[bytes]:
    """A file's lines, one at a time. Raises UserError where it is damaged."""
    with open_bytes(path) as stream:
        yield from _lines(stream, path)


def count_lines(path: Path) -> int:
    return sum(1 for _ in read_lines(path))


def _lines(stream: IO[bytes], path: Path) -> Iterator[bytes]:
    try:
        yield from io.BufferedReader(stream)  # type: ignore[type-var]
    except (OSError, EOFError) as error:
        raise UserError(f"{path}: damaged or cut short ({error})") from error


def list_files(spec: str, kinds: tuple[str, ...] = (*PLAIN, ".jsonl", ".parquet")) -> list[Path]:
    """The files a path, folder, glob or `python-stdlib` stands for, sorted; of a folder those of `kinds`, compressed
    or not. Raises UserError if there are none."""
    if spec == STDLIB:
        return stdlib_files()
    if not spec:
        raise UserError("data: '' names no file or folder (a variable that is not set?)")
    path = Path(spec).expanduser()
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and suffix(p) in kinds)
        if not files:
            raise UserError(f"{spec}: no {', '.join(kinds)} file (or .gz, .zst of one) in this folder")
        return files
    if path.exists():
        return [path]
    files = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file())
    if not files:
        raise UserError(f"{spec}: no such file{nearest(spec, [STDLIB])}")
    return files


def stdlib_files() -> list[Path]:
    """The installed Python's own library, without its tests and without what repeats itself: the tables of
    `encodings`, and turtle.py, which holds its own manual several times."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"test", "tests", "idle_test", "encodings", "site-packages", "dist-packages", "__pycache__"}
    files = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if not left_out.intersection(parts[:-1]) and not parts[-1].startswith("test_") and parts != ("turtle.py",):
            files.append(path)
    return files


def open_bytes(path: Path) -> IO[bytes]:
    """The file's bytes, .gz and .zst unpacked on the way."""
    try:
        if path.suffix in COMPRESSED:
            import pyarrow

            return pyarrow.input_stream(str(path), compression="detect")
        return path.open("rb")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error


def read_bytes(path: Path) -> bytes:
    """All of a file, unpacked. Raises UserError where it is damaged."""
    with open_bytes(path) as stream:
        try:
            return stream.read()
        except (OSError, EOFError) as error:
            raise UserError(f"{path}: damaged or cut short ({error})") from error


def has_surrogates(text: str) -> bool:
    """Whether it holds halves of surrogate pairs, which JSON can say and UTF-8 cannot."""
    return not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text)


def _blocks(path: Path) -> Iterator[bytes]:
    """The file's bytes, PIECE_BYTES at a time but for the last, which may be none."""
    with open_bytes(path) as raw:
        stream = io.BufferedReader(raw)  # type: ignore[type-var]
        try:
            while len(block := stream.read(PIECE_BYTES)) == PIECE_BYTES:
                yield block
            yield block
        except (OSError, EOFError) as error:
            raise UserError(f"{path}: damaged or cut short ({error})") from error


def decode(data: bytes, name: str, *, lines_before: int = 0) -> str:
    """The bytes as text. Raises UserError naming the line that is not UTF-8."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = lines_before + data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{name}:{line}: not UTF-8 (byte {data[error.start]:#04x} at offset {error.start}); "
            "convert it, or leave such files out (--skip-bad; of a recipe: -s data.skip_bad=true)"
        ) from None


def stamp(path: Path) -> list[Any]:
    status = path.stat()
    return [str(path.resolve()), status.st_size, status.st_mtime_ns]


def suffix(path: Path) -> str:
    """What kind of file it is, compressed or not."""
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


def open_parquet(path: Path) -> Any:
    """A pyarrow ParquetFile."""
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except Exception as error:  # pyarrow's own exceptions have no common base but Exception
        raise UserError(f"{path}: not a Parquet file ({error})") from error


def _read_parquet(path: Path, text_key: str) -> Iterator[str]:
    import pyarrow

    file = open_parquet(path)
    names = file.schema_arrow.names
    if text_key not in names:
        raise UserError(
            f"{path}: no text column {text_key!r}{nearest(text_key, names) or '; its columns: ' + ', '.join(names)}"
        )
    if not pyarrow.types.is_string(
        kind := file.schema_arrow.field(text_key).type
    ) and not pyarrow.types.is_large_string(kind):
        raise UserError(f"{path}: column {text_key!r} holds {kind}, not text")
    for batch in file.iter_batches(columns=[text_key]):
        yield from (text for text in batch.column(0).to_pylist() if text is not None)


def _read_hub(spec: str, text_key: str) -> Iterator[str]:
    instead = f"use text of your own or the embedded one: -s 'data.source=[{STDLIB}]'"
    for row in hub_rows(spec, where=f"data.source {spec}", instead=instead):
        if not isinstance(row.get(text_key), str):
            hint = nearest(text_key, list(row)) if text_key not in row else " (it holds something else)"
            raise UserError(f"{spec}: no text column {text_key!r}{hint}")
        yield row[text_key]


def hub_rows(spec: str, *, where: str, instead: str) -> Iterator[dict[str, Any]]:
    """hf:NAME[:CONFIG][:SPLIT], streamed; NAME may also be a local dataset folder. `instead` is what to do where no hub
    answers."""
    import datasets

    name, config, split = ([*spec.removeprefix(HUB).split(":"), "", ""])[:3]
    if not Path(name).exists() and not hub.answers():
        cache_only = (
            "it is not asked for here (HF_HUB_OFFLINE)" if datasets.config.HF_HUB_OFFLINE else "it cannot be reached"
        )
        raise UserError(f"{where}: names a data set on the hub, and {cache_only}; {instead}")
    try:
        yield from datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
    except Exception as error:  # datasets raises many kinds
        raise UserError(f"{where}: {error}") from error

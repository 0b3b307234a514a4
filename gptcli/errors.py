"""The errors a user may see. Each knows the exit status that the command line ends with."""

from __future__ import annotations


class GptError(Exception):
    """Something failed that was not the user's mistake (a full disk, say). Exit status 1."""

    exit_code = 1


class UserError(GptError):
    """Bad usage, recipe or input: one line that says what is wrong, where, and what to do. Exit status 2."""

    exit_code = 2


class Stopped(GptError):
    """A signal asked for an end; the step in flight was finished and saved. Exit status 128 + signal."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum


def nearest(word: str, known: list[str] | tuple[str, ...]) -> str:
    """`; did you mean 'x'?` for the closest of `known`, else the empty string."""
    import difflib

    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""

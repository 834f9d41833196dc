"""The one exception that is meant for the person at the keyboard."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class FedkdError(ValueError):
    """A mistake that a user can mend.

    The text is one line and names the value, the key or file it came from, and what is accepted.
    The command line prints it without a traceback and exits with code 2.
    """


def nearest(word: str, choices: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the choice most like `word`, or ``""`` if none is."""
    by_lower = {choice.lower(): choice for choice in choices}
    matches = get_close_matches(word.lower(), list(by_lower), n=1, cutoff=0.6)
    return f" (did you mean '{by_lower[matches[0]]}'?)" if matches else ""


_UNPRINTABLE = {
    code: "\ufffd"
    for code in (*range(0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A))
    if chr(code) not in "\n\t"
}
"""Control characters, which a terminal obeys, and those that turn the direction of writing."""


def printable(text: str) -> str:
    """Replace what a terminal would obey instead of showing it: names may be from somebody's files."""
    return text.translate(_UNPRINTABLE)


class DivergedError(FedkdError):
    """Training went where numbers are no longer finite."""

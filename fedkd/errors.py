"""The exception for errors that a user can fix, and functions that put messages into one line."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from difflib import SequenceMatcher, get_close_matches
from pathlib import Path
from typing import NamedTuple, Self


class Setting(NamedTuple):
    """A key of the experiment with its value, as part of an error message.

    Attributes:
        key: as in TOML (``num-clients``).
        value: of the key, or the part of it that is wrong.
        source: where it came from (``from --num-clients``), or ``None`` if unknown.
    """

    key: str
    value: object
    source: str | None = None

    def __str__(self) -> str:
        is_plain = isinstance(self.value, bool | int | float | str | list | tuple | dict | None)
        shown = repr(self.value if is_plain else str(self.value))
        shown = shown.lower() if isinstance(self.value, bool) else shown
        return f"{self.key} = {shown}" + (f" ({self.source})" if self.source else "")


class FedkdError(ValueError):
    """An error that the user can fix.

    The text is one line and names the value, the key or file it came from, and what is accepted.
    The command line prints it without a traceback and exits with code 2.

    Args:
        parts: texts and settings, joined to the message.
    """

    def __init__(self, *parts: str | Setting) -> None:
        super().__init__(printable("".join(map(str, parts))))
        self.parts = parts

    def with_sources(self, origins: Mapping[str, tuple[object, str]]) -> Self:
        """Return the same error, with the sources of its settings.

        Args:
            origins: by key, its value and where it came from. A setting with another value gets no
                source, as that value was derived.
        """
        seen: set[str] = set()
        parts: list[str | Setting] = []
        for part in self.parts:
            if isinstance(part, Setting) and part.source is None and part.key not in seen:
                seen.add(part.key)
                origin_value, source = origins.get(part.key, (None, ""))
                part = part._replace(source=source) if _is_part(part.value, origin_value) else part
            parts.append(part)
        return type(self)(*parts)


def _is_part(value: object, whole: object) -> bool:
    """Whether `value` is `whole` or a part of it: one model of a list, the file of file:class.

    Files may have become absolute paths.
    """
    try:
        return float(str(value)) == float(str(whole))
    except ValueError:
        named = [Path(part).name for part in str(whole).split(",") if ".py:" in part]
        return str(value).lower() in str(whole).lower() or Path(str(value)).name in named


def one_line(what: str | BaseException, limit: int = 200) -> str:
    """Return a text, or an exception's type and text, as one line that a console can show.

    Args:
        what: may be untrusted and of any length.
        limit: most characters; a longer text is cut and ends in ``…``.
    """
    text = what if isinstance(what, str) else f"{type(what).__name__}: {what}"
    shown = "".join(c if c.isprintable() else " " for c in text[: 10 * limit])
    line = " ".join(shown.split()) or "nothing that can be shown"
    return line if len(line) <= limit else f"{line[: limit - 1]}…"


def nearest(word: str, choices: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the choice most like `word`, or ``""`` if none is.

    Of names with hyphens each part must be like the other's: grad-clip is not a slip for dp-clip.
    """
    by_lower = {choice.lower(): choice for choice in choices}
    matches = get_close_matches(word.lower(), list(by_lower), n=len(by_lower) or 1, cutoff=0.6)
    alike = [match for match in matches if _is_slip(word.lower(), match)]
    return f" (did you mean '{by_lower[alike[0]]}'?)" if alike else ""


def _is_slip(word: str, meant: str) -> bool:
    """Whether a word may be a slip for another, part by part, or as a whole if a part is missing."""
    parts, others = (re.split("[-_]", each.lstrip("-")) for each in (word, meant))
    if len(parts) != len(others):
        return _likeness("".join(parts), "".join(others)) >= 0.85
    return all(_likeness(*pair) >= 0.5 for pair in zip(parts, others, strict=True))


def _likeness(one: str, other: str) -> float:
    """Return how alike two parts of a name are, 0..1; any two numbers are."""
    if one.isdigit() and other.isdigit():
        return 1.0
    return SequenceMatcher(None, one, other).ratio()


# Control characters, which a terminal executes; those that change the direction of writing or end a line
# where an editor shows none; halves of letters, which no file takes.
_RAW = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: str) -> str:
    """Return a text that a terminal, a page or a log can show: names may come from anywhere.

    Control characters but line feed and tab, and those that change the direction of writing, become
    U+FFFD.
    """
    return _RAW.sub("\ufffd", text)


def naming(path: Path, error: FedkdError) -> str:
    """Return the text of an error about a path, which it names."""
    where = printable(str(path))
    return str(error) if where in str(error) else f"{where}: {error}"


def safe_logger(name: str) -> logging.Logger:
    """Return the logger of a module, whose messages and tracebacks are made `printable`."""
    logger = logging.getLogger(name)
    logger.addFilter(_show_safely)
    return logger


def _show_safely(record: logging.LogRecord) -> bool:
    """Replace what a record says, before any handler formats it."""
    said = record.getMessage()
    if printable(said) != said:
        record.msg, record.args = printable(said), None
    if record.exc_info and not record.exc_text:
        record.exc_text = printable(logging.Formatter().formatException(record.exc_info))
    return True


class DivergedError(FedkdError):
    """Training produced numbers that are not finite."""

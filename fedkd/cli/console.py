"""Prints facts, tables and progress.

Facts are values by name, printed one per line. Only `write` and `ProgressDisplay` print.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Self

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.segment import Segment
from rich.table import Table

from fedkd.errors import printable


def write(what: RenderableType | Mapping[str, object]) -> None:
    """Print to stdout: coloured on a terminal, plain and 120 wide elsewhere."""
    width = None if sys.stdout.isatty() else 120
    console = _Console(width=width, markup=False, highlight=False, emoji=False)
    shown = _aligned(what) if isinstance(what, Mapping) else what
    console.print(shown, soft_wrap=isinstance(shown, str))


class _Console(Console):
    """Shows text from outside safely: control characters in it are replaced."""

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Yield the segments of the console, with its own colours and movements unchanged."""
        for part in super().render(renderable, options):
            yield part if part.control else Segment(printable(part.text), part.style)


class ProgressDisplay:
    """Progress on stderr: a bar on a terminal, elsewhere a line for each new text.

    The preview goes to stdout before the first step. By then everything has been checked, so that an
    error is printed alone.
    """

    def __init__(self, *, shown: bool, preview: Callable[[], Mapping[str, object]] | None) -> None:
        console = _Console(stderr=True, highlight=False)
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            redirect_stdout=False,  # results must not land on stderr
            disable=not (shown and console.is_terminal),
        )
        self._in_lines = shown and not console.is_terminal
        self._preview = preview
        self._task: TaskID | None = None
        self._text = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, text: str, share: float) -> None:
        """Show a description of the current work and the share that is done, 0..1."""
        if self._task is None:
            if self._preview is not None:
                write(self._preview())
                write("")
            self._task = self._bar.add_task("", total=1.0)
            self._bar.start()
        self._bar.update(self._task, description=text, completed=share)
        if self._in_lines and share > 0 and text != self._text:
            print(printable(text), file=sys.stderr, flush=True)
        self._text = text


def table_of(first: str, *others: str, right: bool = True) -> Table:
    """Return a table without rows, its columns after the first aligned to the right by default."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right" if right else "left")
    return table


def _aligned(facts: Mapping[str, object]) -> str:
    width = max(len(name) for name in facts)
    return "\n".join(f"{name:<{width}}  {_words(value)}" for name, value in facts.items())


def _words(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(str(part) for part in value)
    return f"{value:,}" if isinstance(value, int) else str(value)

"""Ctrl-C: the first lets the round finish, the second stops at once."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class InterruptedRun(KeyboardInterrupt):
    """A run was interrupted between two rounds; the text says how to go on."""


class Interrupts:
    """Whether the user wants the run to end.

    Attributes:
        wanted: whether there was a Ctrl-C.
    """

    def __init__(self) -> None:
        self.wanted = False

    def handle(self, _: int, __: FrameType | None) -> None:
        """Note the first Ctrl-C, and stop at the second."""
        if self.wanted:
            raise KeyboardInterrupt
        self.wanted = True
        print("fedkd: finishing the round; Ctrl-C again stops at once", file=sys.stderr)


@contextmanager
def between_rounds() -> Iterator[Interrupts]:
    """Have Ctrl-C only be noted in the block; whoever runs rounds asks after each.

    Signals can be handled in a process's main thread alone: elsewhere Ctrl-C is as it was.
    """
    found = Interrupts()
    if threading.current_thread() is not threading.main_thread():
        yield found
        return
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, found.handle)
    try:
        yield found
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def naming_how_to_go_on(
    command: str, how_far: Callable[[KeyboardInterrupt], str]
) -> Iterator[None]:
    """Say in a Ctrl-C which command of fedkd goes on with what is not done yet.

    Args:
        command: that goes on, such as ``run --resume runs/mine``.
        how_far: says what is done, given what stopped it.

    Raises:
        InterruptedRun: the block was interrupted.
    """
    try:
        yield
    except KeyboardInterrupt as stopped:
        raise InterruptedRun(f"{how_far(stopped)}; fedkd {command} goes on") from None

"""Ctrl-C: the first lets the round finish, the second stops at once."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class InterruptedRun(KeyboardInterrupt):
    """A run was interrupted between two rounds; the text names the command that resumes it."""


class Interrupts:
    """Whether the user has asked the run to end.

    Attributes:
        requested: whether there was a Ctrl-C.
    """

    def __init__(self) -> None:
        self.requested = False

    def handle(self, _: int, __: FrameType | None) -> None:
        """Record the first Ctrl-C; raise at the second."""
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        print("fedkd: finishing the round; Ctrl-C again stops at once", file=sys.stderr)


@contextmanager
def between_rounds() -> Iterator[Interrupts]:
    """Yield what records a Ctrl-C, which does not raise in the block; callers check it between rounds.

    Signals can only be handled in a process's main thread: elsewhere Ctrl-C is as it was.
    """
    interrupts = Interrupts()
    if threading.current_thread() is not threading.main_thread():
        yield interrupts
        return
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, interrupts.handle)
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def naming_resume_command(
    command: str, progress: Callable[[KeyboardInterrupt], str]
) -> Iterator[None]:
    """Raise a Ctrl-C of the block with the command of fedkd that continues the work.

    Args:
        command: that continues it, such as ``run --resume runs/mine``.
        progress: returns what is done, given what stopped it.

    Raises:
        InterruptedRun: the block was interrupted.
    """
    try:
        yield
    except KeyboardInterrupt as stopped:
        raise InterruptedRun(f"{progress(stopped)}; to continue: fedkd {command}") from None

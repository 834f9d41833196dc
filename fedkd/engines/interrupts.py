"""Ctrl-C: the first lets the round finish, the second stops at once. SIGTERM stops at once."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

T = TypeVar("T")


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
        text = "fedkd: finishing the round; Ctrl-C again stops at once"
        try:
            print(text, file=sys.stderr)
        except RuntimeError:  # it came while a line was being written, which cannot be interrupted
            os.write(2, f"{text}\n".encode())


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


class Termination:
    """Whether the process was asked to end by SIGTERM.

    Attributes:
        requested: whether there was one.
    """

    def __init__(self) -> None:
        self.requested = False

    def handle(self, _: int, __: FrameType | None) -> None:
        """Raise as Ctrl-C at once would, the first time; what then ends is not disturbed again."""
        if not self.requested:
            self.requested = True
            raise KeyboardInterrupt


@contextmanager
def on_sigterm() -> Iterator[Termination]:
    """Turn a SIGTERM in the block into an interrupt, unless it is ignored or handled already."""
    termination = Termination()
    is_free = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if not is_free or threading.current_thread() is not threading.main_thread():
        yield termination
        return
    signal.signal(signal.SIGTERM, termination.handle)
    try:
        yield termination
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def keeping_sigterm(call: Callable[[], T]) -> Callable[[], T]:
    """Return a call that leaves the handling of SIGTERM as it was, also where C code replaces it.

    Ray does. Python restores a handler in its main thread only; its C function does so in any.
    """

    def called() -> T:
        before = _get_handler(signal.SIGTERM)
        try:
            return call()
        finally:
            if callable(signal.getsignal(signal.SIGTERM)):
                _set_handler(signal.SIGTERM, before)

    return called


_get_handler = ctypes.pythonapi.PyOS_getsig
_get_handler.restype, _get_handler.argtypes = ctypes.c_void_p, [ctypes.c_int]
_set_handler = ctypes.pythonapi.PyOS_setsig
_set_handler.restype, _set_handler.argtypes = ctypes.c_void_p, [ctypes.c_int, ctypes.c_void_p]

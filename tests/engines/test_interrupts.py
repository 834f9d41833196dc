"""SIGTERM, which ends a command as Ctrl-C does. Ctrl-C itself: `test_resume.py`."""

from __future__ import annotations

import ctypes
import signal
from threading import Thread

import pytest

from fedkd.cli import commands
from fedkd.engines.interrupts import keeping_sigterm, on_sigterm


def test_sigterm_interrupts_once() -> None:
    with on_sigterm() as termination:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        assert termination.requested
        signal.raise_signal(signal.SIGTERM)  # what ends is not disturbed
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_an_ignored_sigterm_stays_ignored() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with on_sigterm() as termination:
            signal.raise_signal(signal.SIGTERM)
        assert not termination.requested
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_handler_outlives_c_code_that_replaces_it_in_a_thread() -> None:
    def replace() -> int:
        libc = ctypes.CDLL(None)
        libc.signal.restype = ctypes.c_void_p
        libc.signal(int(signal.SIGTERM), None)  # SIG_DFL: the next would end this process
        return 7

    found: list[int] = []
    with on_sigterm() as termination:
        thread = Thread(target=lambda: found.append(keeping_sigterm(replace)()))
        thread.start()
        thread.join()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    assert termination.requested
    assert found == [7]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_exit_code_says_which_signal(
    number: signal.Signals,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(commands, "app", lambda *_, **__: signal.raise_signal(number))
    # A process that a shell starts in the background ignores it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit) as ended:
            commands.main([])
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended.value.code == code
    assert capsys.readouterr().err == "fedkd: interrupted\n"

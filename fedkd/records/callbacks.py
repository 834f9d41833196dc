"""Callbacks: hooks called while a run progresses.

A callback has four hooks, called in this order: `on_run_start` once; `on_round_end` after every round;
at the end either `on_run_end` or, if anything went wrong, `on_error`. Derive from `Callback` and override
those you need; pass instances to ``fedkd.run(experiment, callbacks=[...])``.

**Order and thread.** Callbacks are called one after another, in the order of the list, in the thread of
the federation's server, which waits for them: a slow callback lengthens the run (its `seconds`, not
a round's).

**When a callback raises.** The others are still called; then the run ends with that exception, with a
note that names the callback and the round. All finished rounds are on disk. A callback with
``essential = False``, such as a tracker, does not end a run that has begun: its first exception is
logged, and it is still called. In `on_run_start` every exception ends the run: nothing has been trained
yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import deepcopy
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self

from fedkd.errors import FedkdError, safe_logger
from fedkd.experiment import Experiment
from fedkd.records.files import Row
from fedkd.records.results import Run

_logger = safe_logger(__name__)


class Callback:
    """Hooks called while a run progresses; each does nothing until it is overridden.

    Attributes:
        essential: whether an exception in a round, or at the end, ends the run; see the module.
    """

    essential: ClassVar[bool] = True

    def on_run_start(self, experiment: Experiment, path: Path) -> None:
        """Called when a run begins.

        Args:
            experiment: what is run, with its name, device and plan filled in.
            path: the run folder, which holds ``experiment.toml``.
        """

    def on_round_end(self, row: Row) -> None:
        """Called after each round.

        Args:
            row: its record (`docs/records.md`), a copy; the line is in ``rounds.jsonl`` already.
        """

    def on_run_end(self, run: Run) -> None:
        """Called with the finished run, read back from its folder: ``result.json`` exists."""

    def on_error(self, error: BaseException) -> None:
        """Called when the run ended early: close what is open.

        Called instead of `on_run_end`, for every callback whose `on_run_start` was called.

        Args:
            error: what ended it; also ``KeyboardInterrupt``. It is raised again afterwards.
        """


class EachRound(Callback):
    """A function as a callback.

    Args:
        function: called with each round's record.
    """

    def __init__(self, function: Callable[[Row], None]) -> None:
        self._function = function

    def on_round_end(self, row: Row) -> None:
        """Call the function with the record."""
        self._function(row)


class Callbacks(Callback):
    """All callbacks of one run, as one; as a context it calls `on_error`.

    ``with Callbacks(...) as called:`` around everything from `on_run_start` to `on_run_end`.

    Args:
        callbacks: in the order in which they are called.

    Raises:
        FedkdError: one of them is not a callback.
    """

    def __init__(self, callbacks: Iterable[Callback]) -> None:
        self._callbacks = list(callbacks)
        self._begun: list[Callback] = []
        self._failed: list[Callback] = []
        for callback in self._callbacks:
            if not isinstance(callback, Callback):
                raise FedkdError(_no_callback(callback))

    def on_run_start(self, experiment: Experiment, path: Path) -> None:
        """Call all, up to the first that raises."""
        for callback in self._callbacks:
            self._begun.append(callback)
            try:
                callback.on_run_start(experiment, path)
            except Exception as error:
                error.add_note(f"on_run_start of {_name(callback)}, before round 1, raised this")
                raise

    def on_round_end(self, row: Row) -> None:
        """Call all, each with its own copy."""
        when = f"on_round_end of {{}}, after round {row['round']},"
        self._call_all(lambda callback: callback.on_round_end(deepcopy(row)), when)

    def on_run_end(self, run: Run) -> None:
        """Call all; no later exception counts as an error of the run."""
        begun, self._begun = self._begun, []
        when = f"on_run_end of {{}}, with {run.path} finished,"
        self._call_all(lambda callback: callback.on_run_end(run), when, begun)

    def on_error(self, error: BaseException) -> None:
        """Call all that have begun; what they raise is logged, so that `error` is raised."""
        begun, self._begun = self._begun, []
        for callback in begun:
            try:
                callback.on_error(error)
            except Exception as second:
                _logger.warning("on_error of %s raised %r", _name(callback), second)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if error is not None:
            self.on_error(error)

    def _call_all(
        self,
        call: Callable[[Callback], None],
        when: str,
        callbacks: Iterable[Callback] | None = None,
    ) -> None:
        """Call all, then raise the first exception of an essential one, if any."""
        first: Exception | None = None
        for callback in self._callbacks if callbacks is None else callbacks:
            try:
                call(callback)
            except Exception as error:
                moment = when.format(_name(callback))
                if callback.essential and first is None:
                    error.add_note(f"{moment} raised this")
                    first = error
                else:
                    self._log(callback, f"{moment} raised {error!r}")
        if first is not None:
            raise first

    def _log(self, callback: Callback, text: str) -> None:
        """Log a callback's first exception only: a thousand rounds without network give one line."""
        if callback not in self._failed:
            self._failed.append(callback)
            _logger.warning("%s; logged once", text)


def replay(run: Run, callbacks: Iterable[Callback]) -> None:
    """Call callbacks for a finished run as if it were running now.

    For trackers that were not used when it ran.
    """
    with Callbacks(callbacks) as called:
        called.on_run_start(run.experiment, run.path)
        for row in run.rounds:
            called.on_round_end(row)
        called.on_run_end(run)


def _name(callback: Callback) -> str:
    return type(callback).__qualname__


def _no_callback(value: object) -> str:
    text = "callbacks: {} is not a fedkd.Callback"
    if isinstance(value, type):
        return text.format(f"the class {value.__qualname__}") + f"; write {value.__qualname__}()"
    if callable(value):
        return text.format(repr(value)) + "; write EachRound(function) for a function"
    return text.format(repr(value))

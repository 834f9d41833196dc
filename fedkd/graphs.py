"""Recorded steps: a step that has run often enough is recorded once and then replayed.

``vmap`` and autograd find out anew at every step which operations to run, which for small nets takes as
long as running them. A recorded step is the list of those operations (``make_fx``), with the same
results bit for bit. Recording costs a quarter of a second, so that only long runs do it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

RECORD_AFTER = 1000
"""Steps of one kind before it is recorded: what recording saves in so many is about what it costs."""

MOST = 16
"""Recorded steps of an architecture: one for each number of clients that still train."""

Step = Callable[..., tuple[Tensor, ...]]


class Graphs:
    """The recorded steps of an architecture, by what a step depends on besides its inputs' values."""

    def __init__(self) -> None:
        self._recorded: dict[Hashable, Step] = {}
        self._seen = Counter[Hashable]()
        self._refused: set[Hashable] = set()

    def find(self, kind: Hashable) -> Step | None:
        """Return the recorded step of a kind, if there is one; counts how often it is asked for."""
        self._seen[kind] += 1
        return self._recorded.get(kind)

    def has_due(self) -> bool:
        """Whether a step of any kind has run often enough to be recorded now."""
        return any(self.is_due(kind) for kind in self._seen)

    def is_due(self, kind: Hashable) -> bool:
        """Whether a step of a kind has run often enough to be recorded now."""
        fits = len(self._recorded) < MOST and kind not in self._recorded
        return fits and kind not in self._refused and self._seen[kind] >= RECORD_AFTER

    def give_up_what_is_due(self) -> None:
        """Go on as before with steps that are due and were not recorded."""
        self._refused |= {kind for kind in self._seen if self.is_due(kind)}

    def record(self, kind: Hashable, step: Step, inputs: Sequence[Tensor]) -> None:
        """Record a step by running it; what cannot be recorded goes on as before.

        Args:
            kind: see the class.
            step: a function of tensors that returns tensors.
            inputs: like those of the steps to come; may be written to.
        """
        from torch.fx.experimental.proxy_tensor import make_fx  # takes a second

        try:
            recorded: Any = make_fx(step)(*inputs)
        except Exception:
            # PyTorch refuses in many ways; the step itself has run hundreds of times.
            self._refused.add(kind)
            return

        def replay(*tensors: Tensor) -> tuple[Tensor, ...]:
            with torch.no_grad():
                outputs: tuple[Tensor, ...] = recorded(*tensors)
            return outputs

        self._recorded[kind] = replay

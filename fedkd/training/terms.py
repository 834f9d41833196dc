"""What a fit on public samples learns from, as clients and the server alike make it of a phase."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fedkd.data.images import Images
from fedkd.experiment import Experiment
from fedkd.knowledge import SoftLabels
from fedkd.losses import Term
from fedkd.phases import Coefficient, experiment_term
from fedkd.training.batches import BatchStream

Terms = dict[Term, float | Tensor]
"""Coefficients by term, each a number or a tensor ``[K]``."""


def resolved_terms(
    named: Mapping[str, Coefficient],
    alpha: float | Tensor,
    has: Callable[[Term], bool],
    experiment: Experiment,
) -> Terms:
    """Return coefficients by term, of a phase's coefficients by name.

    Args:
        named: of a phase.
        alpha: α, of all models or ``[K]``.
        has: whether what a term needs is there; terms without it are left out.
        experiment: says which modules terms may come from, and what ``kl`` is.

    Raises:
        FedkdError: see `fedkd.phases.resolve_term`.
    """
    values = {"alpha": alpha, "1-alpha": 1 - alpha}
    terms: Terms = {}
    for name, coefficient in named.items():
        term = experiment_term(name, experiment)
        if has(term):
            terms[term] = values[coefficient] if isinstance(coefficient, str) else coefficient
    return terms


def public_stream(public: Images, terms: Terms, labels: Sequence[SoftLabels]) -> BatchStream:
    """Return the stream of batches on the public samples that soft labels came for.

    Args:
        public: the public set.
        terms: of the fit.
        labels: what each model learns from, K = 1; models may share one.
    """
    different = {id(each): each for each in labels}  # most share one
    place = {which: n for n, which in enumerate(different)}
    logits = [each.logits[0] for each in different.values()]
    return BatchStream(
        "public",
        public,
        [each.samples for each in labels],
        terms,
        pad_sequence(logits, batch_first=True).to(public.device, public.dtype),
        torch.tensor([place[id(each)] for each in labels]),
    )

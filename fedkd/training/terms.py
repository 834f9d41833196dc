"""Resolve the loss terms and the public stream of a fit, for clients and the server alike."""

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
    """Return coefficients by term from a phase's coefficients by name.

    Args:
        named: coefficients of a phase, by the name of their term.
        alpha: α, of all models or ``[K]``.
        has: whether the knowledge that a term needs is there; other terms are left out.
        experiment: decides which modules terms may come from, and what ``kl`` is.

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
    """Return the stream of batches on the public samples that have soft labels.

    Args:
        public: the public set.
        terms: of the fit.
        labels: the soft labels of each model, K = 1; models may share them.
    """
    different = {id(each): each for each in labels}  # most share one
    place = {identity: n for n, identity in enumerate(different)}
    logits = [each.logits[0] for each in different.values()]
    return BatchStream(
        "public",
        public,
        [each.samples for each in labels],
        terms,
        pad_sequence(logits, batch_first=True).to(public.device, public.dtype),
        torch.tensor([place[id(each)] for each in labels]),
    )

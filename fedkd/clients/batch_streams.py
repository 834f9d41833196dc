"""The streams of batches that a client's fit trains on, made from its loss terms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fedkd.clients.stack import Stack
from fedkd.errors import FedkdError
from fedkd.knowledge import ClassMeans, SoftLabels
from fedkd.losses import Term
from fedkd.phases import Coefficient, Fit, experiment_term
from fedkd.training.batches import BatchStream
from fedkd.training.optimizers import stacked_values
from fedkd.training.terms import Terms, public_stream, resolved_terms


def batch_streams_of(stack: Stack, phase: Fit) -> list[BatchStream]:
    """Return the streams of batches of a fit, without terms whose knowledge is missing.

    Returns:
        The public stream, the private one, or both; none if no term is left.

    Raises:
        FedkdError: a term needs knowledge of another kind than was received.
    """
    public = _terms(stack, phase.public)
    private = _terms(stack, phase.private)
    has_labels = stack.data.public.labels is not None
    if phase.public and all(term.needs is None for term in public):
        # The public set is for distillation: without knowledge only its labels can be learned.
        only_labels = not _needs_knowledge(stack, phase.public) and has_labels
        public = public if only_labels else {}
    if not has_labels and public:
        # Cross entropy needs labels, so it takes a private batch in the same step.
        hard = {t: c for t, c in public.items() if t.needs is None and _counts(c)}
        private = {t: private.get(t, 0) + hard.get(t, 0) for t in {**hard, **private}}
        public = {t: c for t, c in public.items() if t.needs is not None}
    batch_streams = []
    if public:
        batch_streams.append(_public_stream(stack, public))
    if private:
        _refuse_soft_labels(private)
        batch_streams.append(_private_stream(stack, private))
    return batch_streams


def _terms(stack: Stack, named: Mapping[str, Coefficient]) -> Terms:
    """Return a fit's terms without those whose knowledge was not received, or is already digested."""

    def has(term: Term) -> bool:
        if term.needs == "class-means":
            return isinstance(stack.knowledge[0], ClassMeans)
        return term.needs is None or stack.is_fresh  # soft labels only if they are new

    return resolved_terms(named, stacked_values(stack.experiments, "alpha"), has, stack.experiment)


def _needs_knowledge(stack: Stack, named: Mapping[str, Coefficient]) -> bool:
    return any(experiment_term(name, stack.experiment).needs is not None for name in named)


def _counts(coefficient: float | Tensor) -> bool:
    """Whether a term with this coefficient, or these, contributes to the loss."""
    return bool((torch.as_tensor(coefficient) != 0).any())


def _public_stream(stack: Stack, terms: Terms) -> BatchStream:
    public = stack.data.public
    if all(term.needs is None for term in terms):
        rows = torch.arange(len(public))
        return BatchStream("public", public, [rows] * len(stack.instructions), terms)
    return public_stream(public, terms, _to_digest(stack, terms))


def _to_digest(stack: Stack, terms: Terms) -> list[SoftLabels]:
    """Return the soft labels that each client digests, K = 1."""
    if not all(isinstance(k, SoftLabels) for k in stack.knowledge):
        raise FedkdError("a term needs soft labels, but other knowledge was received")
    labels = [k for k in stack.knowledge if isinstance(k, SoftLabels)]
    if any(len(each.values) != 1 for each in labels):
        raise FedkdError(
            "several sets of soft labels were received: a procedure must choose among them before they "
            "are digested"
        )
    if any(term.needs == "logits" for term in terms) and labels[0].space != "logits":
        raise FedkdError("a term needs logits, but probabilities were received")
    return labels


def _refuse_soft_labels(private: Mapping[Term, object]) -> None:
    for term in private:
        if term.needs in ("soft-labels", "logits"):
            raise FedkdError(
                f"{term.import_path} needs soft labels, which private images lack: put it in public"
            )


def _private_stream(stack: Stack, terms: Terms) -> BatchStream:
    batch_stream = BatchStream(
        "private", stack.data.train, stack.shards, terms, augment=stack.experiment.augment
    )
    clients = range(len(stack.instructions))
    if any(stack.attack(row).labels for row in clients):
        batch_stream = replace(batch_stream, labels=[stack.labels(row) for row in clients])
    if not any(term.needs == "class-means" for term in terms):
        return batch_stream
    means = [k for k in stack.knowledge if isinstance(k, ClassMeans)]
    means = means[:1] if all(each is means[0] for each in means) else means
    return replace(
        batch_stream,
        class_means=torch.cat([each.values for each in means]),
        class_counts=torch.cat([each.counts for each in means]),
    )

"""Knowledge: what crosses the wire between clients and server.

Three kinds. `SoftLabels` hold what K clients think of N public samples; `ClassMeans` what each makes
of a class on average, without a public set; `Weights` hold model parameters (for FedAvg, the baseline
that everybody asks for). A leading axis K everywhere: K repliers on the way up, K recipients on the
way down, or 1 for knowledge that all share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from fedkd.codecs import Packed, Reference, Wire, pack, unpack
from fedkd.errors import FedkdError

Space = Literal["logits", "probabilities"]
Output = Literal["logits", "probabilities", "features"]
"""What class means are means of."""

LARGEST_MEAN = 1e15
"""The largest class mean that is believed: distances to it are squared and added in float32."""

SIMPLEX_TOLERANCE = 1e-3
"""How far a row of probabilities may be from summing to 1 (float16 rounding stays below it)."""


@dataclass(frozen=True)
class Sizes:
    """What both sides know of soft labels: P public images and C classes."""

    num_public: int
    num_classes: int


@dataclass(frozen=True, eq=False, init=False)
class SoftLabels:
    """What K clients think of N public samples.

    Attributes:
        values: ``[K, N, C]`` in the space named by `space`.
        space: ``"logits"`` or ``"probabilities"``.
        samples: int64 ``[N]``, indices into the public set, distinct.
        clients: int64 ``[K]``, partition ids.
        num_examples: int64 ``[K]``, private images behind each client's answer.
        mask: bool ``[K, N]``, which samples each client answered.
        targets: int64 ``[N]``, the public labels, or ``None`` where there are none.

    Raises:
        FedkdError: shapes or space do not fit together; the text names both.
    """

    values: Tensor
    space: Space
    samples: Tensor
    clients: Tensor
    num_examples: Tensor
    mask: Tensor
    targets: Tensor | None

    def __init__(
        self,
        values: Tensor,
        space: Space,
        samples: Tensor | None = None,
        clients: Tensor | None = None,
        num_examples: Tensor | None = None,
        mask: Tensor | None = None,
        targets: Tensor | None = None,
    ) -> None:
        if space not in ("logits", "probabilities"):
            raise FedkdError(f"space = {space!r}: must be 'logits' or 'probabilities'")
        if values.ndim != 3:
            raise FedkdError(f"soft labels have shape {tuple(values.shape)}: must be [K, N, C]")
        k, n, _ = values.shape
        device = values.device
        fields = {
            "values": values,
            "space": space,
            "samples": torch.arange(n, device=device) if samples is None else samples,
            "clients": torch.arange(k, device=device) if clients is None else clients,
            "num_examples": (
                torch.ones(k, dtype=torch.int64, device=device)
                if num_examples is None
                else num_examples
            ),
            "mask": torch.ones(k, n, dtype=torch.bool, device=device) if mask is None else mask,
            "targets": targets,
        }
        for name, value in fields.items():
            object.__setattr__(self, name, value)
        wanted = {"samples": (n,), "clients": (k,), "num_examples": (k,), "mask": (k, n)}
        for name, shape in {**wanted, **({"targets": (n,)} if targets is not None else {})}.items():
            if tuple(getattr(self, name).shape) != shape:
                raise FedkdError(
                    f"{name} of soft labels has shape {tuple(getattr(self, name).shape)}: must be "
                    f"{shape} beside values {tuple(values.shape)}"
                )

    @classmethod
    def shared(cls, values: Tensor, samples: Tensor, space: Space) -> SoftLabels:
        """Wrap ``[N, C]`` as knowledge that is the same for all (K = 1)."""
        return cls(values.unsqueeze(0), space, samples)

    @classmethod
    def stack(cls, answers: Sequence[SoftLabels], targets: Tensor | None = None) -> SoftLabels:
        """Join answers of one client each: the union of their samples, masked.

        `targets` are the labels of the whole public set, where it has any. Samples nobody answered do
        not appear. At least one answer is needed; all share space and C.
        """
        samples, values, mask = _same_samples(answers) or _united(answers)
        return cls(
            values,
            answers[0].space,
            samples,
            torch.cat([a.clients for a in answers]),
            torch.cat([a.num_examples for a in answers]),
            mask,
            None if targets is None else targets[samples],
        )

    @property
    def logits(self) -> Tensor:
        """``[K, N, C]``; log p of probabilities (their logits up to a constant a row), kept finite."""
        if self.space == "logits":
            return self.values
        return self.values.clamp_min(torch.finfo(self.values.dtype).tiny).log()

    @property
    def probabilities(self) -> Tensor:
        """``[K, N, C]``; the softmax of logits."""
        return self.values.softmax(-1) if self.space == "logits" else self.values

    def mean_logits(self) -> Tensor:
        """Plain mean over the clients that answered, ``[N, C]``."""
        return self._mean(self.logits)

    def mean_probabilities(self) -> Tensor:
        """Plain mean over the clients that answered, ``[N, C]``."""
        return self._mean(self.probabilities)

    def _mean(self, values: Tensor) -> Tensor:
        # Summed in float64: finite answers must not add up to infinity.
        answered = self.mask.unsqueeze(-1)
        total = torch.where(answered, values, values.new_zeros(())).sum(0, dtype=torch.float64)
        return (total / answered.sum(0).clamp_min(1)).to(values.dtype)

    def keep(self, rows: Tensor) -> SoftLabels:
        """Keep the samples `rows`, bool ``[N]`` or positions."""
        return SoftLabels(
            self.values[:, rows],
            self.space,
            self.samples[rows],
            self.clients,
            self.num_examples,
            self.mask[:, rows],
            None if self.targets is None else self.targets[rows],
        )

    def pack(
        self, wire: Wire, num_public: int, reference: Reference | None = None
    ) -> tuple[Packed, Reference | None]:
        """Encode all K of these for one peer; see `fedkd.codecs.pack`."""
        values = self.values.detach().cpu().float()
        return pack(values, self.space, self.samples.cpu(), wire, num_public, reference)

    @classmethod
    def unpack(
        cls,
        packed: Packed,
        num_public: int,
        reference: Reference | None = None,
        owner: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[SoftLabels, Reference | None]:
        """Decode what `pack` encoded.

        Args:
            packed: as it came.
            num_public: P.
            reference: what this side has already of the peer's soft labels.
            owner: clients and num_examples, ``[K]`` each.

        Raises:
            FedkdError: see `fedkd.codecs.unpack`.
        """
        values, newer = unpack(packed, num_public, reference)
        space: Any = packed.space
        return cls(values, space, packed.samples, *(owner or ())), newer


def _same_samples(answers: Sequence[SoftLabels]) -> tuple[Tensor, Tensor, Tensor] | None:
    """Join answers that are all complete and for the same sorted samples, as most are: one copy."""
    samples = answers[0].samples
    alike = all(a.samples is samples or torch.equal(a.samples, samples) for a in answers)
    if not alike or not bool((samples.diff() > 0).all()):
        return None
    mask = torch.cat([a.mask for a in answers])
    return (samples, torch.cat([a.values for a in answers]), mask) if bool(mask.all()) else None


def _united(answers: Sequence[SoftLabels]) -> tuple[Tensor, Tensor, Tensor]:
    """Join answers for the union of their samples."""
    samples = torch.cat([a.samples[a.mask[0]] for a in answers]).unique()
    first = answers[0].values
    values = first.new_zeros(len(answers), len(samples), first.shape[-1])
    mask = torch.zeros(values.shape[:2], dtype=torch.bool, device=first.device)
    for k, answer in enumerate(answers):
        given = answer.mask[0]
        rows = torch.searchsorted(samples, answer.samples[given])
        values[k].index_copy_(0, rows, answer.values[0, given])
        mask[k].index_fill_(0, rows, True)
    return samples, values, mask


@dataclass(frozen=True, eq=False)
class ClassMeans:
    """What K clients' models make of each class, averaged over their private images of it.

    Attributes:
        values: ``[K, C, D]``, the mean output by class (D = C, or the width of the features); zeros
            where a client has no image of a class.
        counts: int64 ``[K, C]``, images behind each mean; 0 where a class is absent.
        clients: int64 ``[K]``, partition ids.
        of: which output.

    Raises:
        FedkdError: the shapes do not fit together.
    """

    values: Tensor
    counts: Tensor
    clients: Tensor
    of: Output

    def __post_init__(self) -> None:
        if self.values.ndim != 3 or self.counts.shape != self.values.shape[:2]:
            raise FedkdError(
                f"class means have shape {tuple(self.values.shape)} and counts "
                f"{tuple(self.counts.shape)}: must be [K, C, D] and [K, C]"
            )

    @classmethod
    def stack(cls, answers: Sequence[ClassMeans]) -> ClassMeans:
        """Join answers of one client each.

        Raises:
            FedkdError: their means have different widths.
        """
        widths = sorted({a.values.shape[-1] for a in answers})
        if len(widths) > 1:
            raise FedkdError(
                f"class means of widths {widths} cannot be joined: all students need features of one "
                "width"
            )
        return cls(
            torch.cat([a.values for a in answers]),
            torch.cat([a.counts for a in answers]),
            torch.cat([a.clients for a in answers]),
            answers[0].of,
        )

    @property
    def present(self) -> Tensor:
        """Which client has which class, bool ``[K, C]``."""
        return self.counts > 0

    def nearest(self, outputs: Tensor) -> Tensor:
        """Return the class whose mean (K = 1) is nearest to each of ``[N, D]`` outputs, int64 ``[N]``.

        By Euclidean distance; absent classes are nobody's, and of equal distances the first class wins.
        """
        means = self.values[0].to(outputs)
        exactly = "donot_use_mm_for_euclid_dist"
        distances = torch.cdist(outputs, means, compute_mode=exactly)
        absent = ~self.present[0].to(outputs.device)
        return distances.masked_fill(absent, torch.inf).argmin(-1)

    def mean(self, weights: Tensor) -> ClassMeans:
        """Average over clients, K = 1, with `weights` ``[K, C]`` that are 0 where nothing is to count.

        Accumulated in float64. A class without any weight is absent.
        """
        share = weights.double().unsqueeze(-1)
        total = (share * self.values.double()).sum(0) / share.sum(0).clamp_min(1e-300)
        counts = (self.counts * (weights > 0)).sum(0)
        return ClassMeans(
            total.to(self.values.dtype).unsqueeze(0),
            counts.unsqueeze(0),
            self.clients[:1],
            self.of,
        )


@dataclass(frozen=True, eq=False)
class ModelWeights:
    """Parameters and buffers of one architecture from K clients.

    Attributes:
        tensors: ``[K, ...]`` by name.
        clients: int64 ``[K]``.
        num_examples: int64 ``[K]``, the weights of an average.
    """

    tensors: Mapping[str, Tensor]
    clients: Tensor
    num_examples: Tensor

    def average(self) -> ModelWeights:
        """Mean weighted by `num_examples` (McMahan et al. 2017, algorithm 1), K = 1.

        Accumulated in float64; integer buffers are rounded.
        """
        share = self.num_examples.double() / self.num_examples.sum()

        def mean(stacked: Tensor) -> Tensor:
            total = torch.einsum("k,k...->...", share.to(stacked.device), stacked.double())
            total = total if stacked.is_floating_point() else total.round()
            return total.to(stacked.dtype).unsqueeze(0)

        return ModelWeights(
            {name: mean(stacked) for name, stacked in self.tensors.items()},
            self.clients[:1],
            self.num_examples.sum().unsqueeze(0),
        )


@dataclass(frozen=True, eq=False)
class Weights:
    """Model parameters, by architecture: only like is averaged with like."""

    by_model: Mapping[str, ModelWeights]

    @classmethod
    def stack(cls, answers: Sequence[Weights]) -> Weights:
        """Join answers of one client each."""
        found: dict[str, list[ModelWeights]] = {}
        for answer in answers:
            for name, weights in answer.by_model.items():
                found.setdefault(name, []).append(weights)
        return cls({name: _joined(weights) for name, weights in found.items()})

    def average(self) -> Weights:
        """Average within each architecture, K = 1."""
        return Weights({name: weights.average() for name, weights in self.by_model.items()})

    def updated(self, newer: Weights) -> Weights:
        """Return these with `newer` in their place for the architectures that it has."""
        return Weights({**self.by_model, **newer.by_model})

    def of(self, clients: Tensor) -> Weights:
        """Return those of some clients (int64 partition ids), without architectures of nobody."""
        found = {}
        for name, part in self.by_model.items():
            rows = torch.isin(part.clients, clients).nonzero().flatten()
            if len(rows):
                tensors = {n: tensor[rows] for n, tensor in part.tensors.items()}
                found[name] = ModelWeights(tensors, part.clients[rows], part.num_examples[rows])
        return Weights(found)

    def only(self, model: str) -> Weights:
        """Return the part that a client with architecture `model` can load."""
        return Weights({model: self.by_model[model]})


def _joined(weights: Sequence[ModelWeights]) -> ModelWeights:
    return ModelWeights(
        {name: torch.cat([w.tensors[name] for w in weights]) for name in weights[0].tensors},
        torch.cat([w.clients for w in weights]),
        torch.cat([w.num_examples for w in weights]),
    )


Knowledge: TypeAlias = SoftLabels | ClassMeans | Weights
KINDS = (SoftLabels, ClassMeans, Weights)


def tensors_of(knowledge: Knowledge) -> list[Tensor]:
    """Return the tensors of knowledge that hold values, ``[K, ...]``."""
    if isinstance(knowledge, Weights):
        return [t for part in knowledge.by_model.values() for t in part.tensors.values()]
    return [knowledge.values]


def require_one(knowledge: Knowledge) -> None:
    """Refuse knowledge of several clients where one peer's copy is wanted.

    Raises:
        FedkdError: K is not 1.
    """
    parts = tensors_of(knowledge)
    if any(len(part) != 1 for part in parts):
        raise FedkdError(
            f"knowledge of {len(parts[0])} clients cannot be sent to one: aggregate it, or override "
            "personalise"
        )


def check_answer(answer: Knowledge) -> None:
    """Refuse values that would poison an aggregate.

    Raises:
        FedkdError: not finite, or probabilities off the simplex; the text says which.
    """
    if not all(bool(t.isfinite().all()) for t in tensors_of(answer)):
        raise FedkdError("holds NaN or infinity")
    if isinstance(answer, SoftLabels) and answer.space == "probabilities":
        _check_simplex(answer.values[answer.mask])
    if isinstance(answer, ClassMeans):
        if bool((answer.counts < 0).any()):
            raise FedkdError("holds negative counts")
        if bool((answer.values.abs() > LARGEST_MEAN).any()):
            raise FedkdError(f"holds class means beyond {LARGEST_MEAN:g}, whose squares overflow")
        if answer.of == "probabilities":
            _check_simplex(answer.values[answer.present])


def _check_simplex(rows: Tensor) -> None:
    if bool((rows < 0).any()):
        raise FedkdError("holds negative probabilities")
    off = float((rows.sum(-1) - 1).abs().amax()) if rows.numel() else 0.0
    if off > SIMPLEX_TOLERANCE:
        raise FedkdError(f"holds rows of probabilities that miss a sum of 1 by {off:.3g}")

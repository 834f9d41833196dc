"""Soft labels: the predictions of clients for public samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fedkd.errors import FedkdError
from fedkd.knowledge.arrival import Arrival, Sizes
from fedkd.knowledge.codec import KnownRows, Packed, pack, unpack
from fedkd.knowledge.wire import PLAIN, Wire

Space = Literal["logits", "probabilities"]

SIMPLEX_TOLERANCE = 1e-3
"""How far a row of probabilities may be from summing to 1 (float16 rounding stays below it)."""


@dataclass(frozen=True, eq=False, init=False)
class SoftLabels:
    """The predictions of K clients for N public samples.

    Attributes:
        values: ``[K, N, C]`` in the space named by `space`.
        space: ``"logits"`` or ``"probabilities"``.
        samples: int64 ``[N]``, indices into the public set, distinct.
        clients: int64 ``[K]``, partition ids.
        num_examples: int64 ``[K]``, private images of each client.
        mask: bool ``[K, N]``, which samples each client answered.
        targets: int64 ``[N]``, the public labels, or ``None`` if there are none.

    Raises:
        FedkdError: the space is unknown, or shapes do not match; the text names them.
    """

    kind: ClassVar[str] = Packed.kind
    message_fields: ClassVar[dict[str, type]] = Packed.message_fields

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
        shapes = {"samples": (n,), "clients": (k,), "num_examples": (k,), "mask": (k, n)}
        for name, shape in {**shapes, **({"targets": (n,)} if targets is not None else {})}.items():
            if tuple(getattr(self, name).shape) != shape:
                raise FedkdError(
                    f"{name} of soft labels has shape {tuple(getattr(self, name).shape)}: must be "
                    f"{shape} beside values {tuple(values.shape)}"
                )

    @classmethod
    def shared(cls, values: Tensor, samples: Tensor, space: Space) -> SoftLabels:
        """Return ``[N, C]`` as knowledge that is the same for all clients (K = 1)."""
        return cls(values.unsqueeze(0), space, samples)

    @classmethod
    def stack(cls, answers: Sequence[SoftLabels], targets: Tensor | None = None) -> SoftLabels:
        """Return answers of one client each as one, for the union of their samples, masked.

        `targets` are the labels of the whole public set, if it has any. Samples that no client answered
        are left out. At least one answer is needed; all must have the same space and C.
        """
        samples, values, mask = _same_samples(answers) or _different_samples(answers)
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
        """``[K, N, C]``; of probabilities log p (their logits up to a constant a row), kept finite."""
        if self.space == "logits":
            return self.values
        return self.values.clamp_min(torch.finfo(self.values.dtype).tiny).log()

    @property
    def probabilities(self) -> Tensor:
        """``[K, N, C]``; the softmax of logits."""
        return self.values.softmax(-1) if self.space == "logits" else self.values

    def mean_logits(self) -> Tensor:
        """Return the plain mean over the clients that answered, ``[N, C]``; 0 where none did."""
        return self._mean(self.logits)

    def mean_probabilities(self) -> Tensor:
        """Return the plain mean over the clients that answered, ``[N, C]``; 0 where none did."""
        return self._mean(self.probabilities)

    def _mean(self, values: Tensor) -> Tensor:
        # Summed in float64: finite answers must not add up to infinity.
        answered = self.mask.unsqueeze(-1)
        total = torch.where(answered, values, values.new_zeros(())).sum(0, dtype=torch.float64)
        return (total / answered.sum(0).clamp_min(1)).to(values.dtype)

    def keep(self, rows: Tensor) -> SoftLabels:
        """Return the soft labels of the samples `rows`, bool ``[N]`` or positions."""
        return SoftLabels(
            self.values[:, rows],
            self.space,
            self.samples[rows],
            self.clients,
            self.num_examples,
            self.mask[:, rows],
            None if self.targets is None else self.targets[rows],
        )

    def value_tensors(self) -> list[Tensor]:
        """Return the tensors that hold values, ``[K, ...]``."""
        return [self.values]

    def check(self) -> None:
        """Refuse probabilities off the simplex.

        Raises:
            FedkdError: see `check_simplex`.
        """
        if self.space == "probabilities":
            check_simplex(self.values[self.mask])

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors by name, as they are stored."""
        return {name: tensor for name, tensor in vars(self).items() if isinstance(tensor, Tensor)}

    def stored_fields(self) -> dict[str, Any]:
        """Return what is stored beside the tensors."""
        return {"space": self.space}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], fields: Mapping[str, Any]) -> SoftLabels:
        """Return the inverse of `tensors` and `stored_fields`."""
        return cls(space=fields["space"], **tensors)

    def to_message(self, sizes: Sizes, *, asked: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return these without encoding (K = 1): see `Packed.to_message`."""
        packed, _ = self.pack(PLAIN, sizes.num_public)
        return packed.to_message(sizes, asked=asked)

    @classmethod
    def from_message(
        cls, tensors: dict[str, Tensor], fields: dict[str, Any], arrival: Arrival
    ) -> Packed:
        """Return soft labels still encoded, for `unpack`: see `Packed.from_message`."""
        return Packed.from_message(tensors, fields, arrival)

    def pack(
        self, wire: Wire, num_public: int, known: KnownRows | None = None
    ) -> tuple[Packed, KnownRows | None]:
        """Return all K of these encoded for one peer; see `fedkd.knowledge.codec.pack`."""
        values = self.values.detach().cpu().float()
        return pack(values, self.space, self.samples.cpu(), wire, num_public, known)

    @classmethod
    def unpack(
        cls,
        packed: Packed,
        num_public: int,
        known: KnownRows | None = None,
        owner: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[SoftLabels, KnownRows | None]:
        """Return what `pack` encoded, decoded.

        Args:
            packed: as it was received.
            num_public: P.
            known: what this side already has of the peer's soft labels.
            owner: clients and num_examples, ``[K]`` each.

        Raises:
            FedkdError: see `fedkd.knowledge.codec.unpack`.
        """
        values, newer = unpack(packed, num_public, known)
        space: Any = packed.space
        return cls(values, space, packed.samples, *(owner or ())), newer


def check_simplex(rows: Tensor) -> None:
    """Refuse rows ``[..., C]`` that are not probabilities.

    Raises:
        FedkdError: negative ones, or a sum that is not 1.
    """
    if bool((rows < 0).any()):
        raise FedkdError("holds negative probabilities")
    off = float((rows.sum(-1) - 1).abs().amax()) if rows.numel() else 0.0
    if off > SIMPLEX_TOLERANCE:
        raise FedkdError(f"holds rows of probabilities whose sums differ from 1 by {off:.3g}")


def _same_samples(answers: Sequence[SoftLabels]) -> tuple[Tensor, Tensor, Tensor] | None:
    """Concatenate answers that are complete and for the same sorted samples, as most are.

    Returns:
        Samples, values and mask, made by one copy; ``None`` for other answers.
    """
    samples = answers[0].samples
    alike = all(a.samples is samples or torch.equal(a.samples, samples) for a in answers)
    if not alike or not bool((samples.diff() > 0).all()):
        return None
    mask = torch.cat([a.mask for a in answers])
    return (samples, torch.cat([a.values for a in answers]), mask) if bool(mask.all()) else None


def _different_samples(answers: Sequence[SoftLabels]) -> tuple[Tensor, Tensor, Tensor]:
    """Return samples, values and mask of answers for the union of their samples."""
    samples = torch.cat([a.samples[a.mask[0]] for a in answers]).unique()
    first = answers[0].values
    values = first.new_zeros(len(answers), len(samples), first.shape[-1])
    mask = torch.zeros(values.shape[:2], dtype=torch.bool, device=first.device)
    for k, answer in enumerate(answers):
        answered = answer.mask[0]
        rows = torch.searchsorted(samples, answer.samples[answered])
        values[k].index_copy_(0, rows, answer.values[0, answered])
        mask[k].index_fill_(0, rows, True)
    return samples, values, mask

"""Robust combination of soft labels: rules that replace the mean over clients.

A rule combines the answers of K clients for N samples into one answer a sample, over the clients that
answered that sample. A strategy offers the rules as a setting ``combine: Rule = "mean"`` and calls
`combine_probabilities` or `combine_logits` where its paper takes a mean over clients.

All rules are pure and vectorised over samples. Except for ``"mean"``, the result is bit for bit the same
in any order of clients. They compute in float64 and return the type of their input.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from fedkd.errors import FedkdError
from fedkd.knowledge.soft_labels import SoftLabels, Space

Rule = Literal["mean", "median", "trimmed-mean", "geometric-median"]
"""How the answers of clients are combined; see `combine`."""

TRIM = 0.2
"""Share of clients that ``"trimmed-mean"`` drops at each end."""

_STEPS = 200
_CLOSE = 1e-12
"""Share of the median distance of a sample's answers below which a distance counts as 0."""


def combine_probabilities(labels: SoftLabels, rule: Rule) -> Tensor:
    """Return the clients' combined probabilities ``[N, C]``.

    For ``"mean"`` they are `labels.mean_probabilities()`.
    """
    return combine(labels.probabilities, labels.mask, rule)


def combine_logits(labels: SoftLabels, rule: Rule) -> Tensor:
    """Return the clients' combined logits ``[N, C]``; for ``"mean"`` they are `labels.mean_logits()`.

    Each row of logits has an arbitrary constant, which distorts the coordinate-wise rules: clients with
    very different networks are better combined by probabilities.
    """
    return combine(labels.logits, labels.mask, rule, space="logits")


def combine(
    values: Tensor,
    mask: Tensor,
    rule: Rule,
    space: Space = "probabilities",
    trim: float = TRIM,
) -> Tensor:
    """Return the combined answers, sample by sample, over the clients that answered.

    The coordinate-wise rules (``"median"``, ``"trimmed-mean"``) leave the simplex: their rows are
    divided by their sum. Where the sum is 0, as when all clients are sure and no class has half of
    them, the mean is taken instead.

    Args:
        values: ``[K, N, C]`` in `space`.
        mask: bool ``[K, N]``, which client answered which sample; other values are ignored.
        rule: ``"mean"``, ``"median"`` (of each class), ``"trimmed-mean"`` (of each class, without the
            `trim` · K least and largest) or ``"geometric-median"`` (the point with the least sum of
            distances to the clients' rows).
        space: whether rows are probabilities (the result is on the simplex) or logits.
        trim: share of the clients dropped at each end by ``"trimmed-mean"``.

    Returns:
        ``[N, C]``; zeros where no client answered, as in a mean of `SoftLabels`.

    Raises:
        FedkdError: an unknown rule, a `trim` out of range, or negative probabilities.
    """
    if rule not in get_args(Rule):
        raise FedkdError(f"combine = {rule!r}: must be one of {', '.join(get_args(Rule))}")
    labels = SoftLabels(values, space, mask=mask)
    mean_NC = labels.mean_probabilities() if space == "probabilities" else labels.mean_logits()
    if rule == "mean":
        return mean_NC
    if space == "probabilities" and bool((values < 0).logical_and(mask.unsqueeze(-1)).any()):
        raise FedkdError(
            "negative probabilities cannot be combined; for logits, pass space='logits'"
        )
    if rule == "geometric-median":
        return geometric_median(values, mask)
    chosen_NC = (
        coordinate_median(values, mask) if rule == "median" else trimmed_mean(values, mask, trim)
    )
    if space == "logits":
        return chosen_NC
    total_N1 = chosen_NC.sum(-1, keepdim=True)
    return torch.where(total_N1 > 0, chosen_NC / total_N1, mean_NC)


def coordinate_median(values: Tensor, mask: Tensor) -> Tensor:
    """Return the median of each class over the clients that answered.

    Definition 1 of Yin et al. 2018, arXiv:1803.01498. For an even number, it is the mean of
    the two in the middle (``torch.median`` takes the lower one).

    Args:
        values: ``[K, N, C]``.
        mask: bool ``[K, N]``.

    Returns:
        ``[N, C]``, not on the simplex even if all rows were.
    """
    sorted_KNC, answered_N = _sorted(values, mask)
    below, above = ((answered_N - 1) // 2).clamp_min(0), answered_N // 2
    return ((_at(sorted_KNC, below) + _at(sorted_KNC, above)) / 2).to(values.dtype)


def trimmed_mean(values: Tensor, mask: Tensor, share: float = TRIM) -> Tensor:
    """Return the mean of each class without its least and largest values (Yin et al. 2018, definition 2).

    Args:
        values: ``[K, N, C]``.
        mask: bool ``[K, N]``.
        share: of the clients that answered, dropped at each end, 0 ≤ share < 0.5; rounded down.

    Returns:
        ``[N, C]``, not on the simplex even if all rows were.

    Raises:
        FedkdError: the share is out of range.
    """
    if not 0 <= share < 0.5:
        raise FedkdError(f"trim = {share}: must be at least 0 and below 0.5")
    sorted_KNC, answered_N = _sorted(values, mask)
    # 0.29 · 100 is 28.999999999999996: a share meant to give a whole number must give it.
    dropped_N = (share * answered_N.double() + 1e-9).floor().long()
    dropped_N = dropped_N.minimum((answered_N - 1).clamp_min(0) // 2)
    rank_K1 = torch.arange(len(values), device=values.device).unsqueeze(-1)
    is_kept_KN = (rank_K1 >= dropped_N) & (rank_K1 < answered_N - dropped_N)
    total_NC = torch.where(is_kept_KN.unsqueeze(-1), sorted_KNC, 0.0).sum(0)
    return (total_NC / is_kept_KN.sum(0).clamp_min(1).unsqueeze(-1)).to(values.dtype)


def geometric_median(values: Tensor, mask: Tensor) -> Tensor:
    """Return the point with the least sum of distances to the rows of the clients that answered.

    Distances are Euclidean. This is Weiszfeld's iteration from the median of each class; a row that it
    hits does not pull, and each sample stops on its own. Start and precision follow the middle of the
    rows, so that a minority may be at any distance. As the iteration converges slowly to a median that
    is itself a row, the nearest row is taken at the end where it is better. In the slowest cases (three
    rows seen at nearly 120°) the sum of distances is minimal to about 1e-5 of their spread. As a convex
    combination of rows, the median of probabilities is on the simplex.

    Args:
        values: ``[K, N, C]``.
        mask: bool ``[K, N]``.

    Returns:
        ``[N, C]``; for two rows, their mean.
    """
    rows_KNC, answered_KN = in_canonical_order(values.double(), mask)
    centre_NC = coordinate_median(rows_KNC, answered_KN)
    spread_N = _middle(_distances(rows_KNC, centre_NC, answered_KN), answered_KN)
    moving_N = spread_N > 0
    for _ in range(_STEPS):
        if not bool(moving_N.any()):
            break
        step_NC = _weiszfeld(rows_KNC, centre_NC, answered_KN, _CLOSE * spread_N)
        centre_NC = torch.where(moving_N.unsqueeze(-1), centre_NC + step_NC, centre_NC)
        moving_N = moving_N & (step_NC.norm(dim=-1) > _CLOSE * spread_N)
    return _or_nearest(rows_KNC, centre_NC, answered_KN).to(values.dtype)


def in_canonical_order(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the clients of each sample sorted by their rows, so that their order cannot matter.

    Rows are compared class by class; those of clients that did not answer become zeros and come last.

    Args:
        values: ``[K, N, C]``.
        mask: bool ``[K, N]``.

    Returns:
        The sorted rows ``[K, N, C]``, and the mask ``[K, N]`` in the same order.
    """
    rows_KNC = values.masked_fill(~mask.unsqueeze(-1), 0.0)
    order_KN = torch.arange(len(values), device=values.device).unsqueeze(-1).expand(mask.shape)
    for column_KN in (*rows_KNC.unbind(-1)[::-1], ~mask):  # the last sort decides
        ranks_KN = column_KN.gather(0, order_KN).argsort(stable=True, dim=0)
        order_KN = order_KN.gather(0, ranks_KN)
    return rows_KNC.gather(0, order_KN.unsqueeze(-1).expand(values.shape)), mask.gather(0, order_KN)


def _sorted(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return each class sorted over clients, absent ones last (as 0), and how many answered, ``[N]``."""
    answered_N = mask.sum(0)
    filled_KNC = values.double().masked_fill(~mask.unsqueeze(-1), torch.inf)
    sorted_KNC = filled_KNC.sort(0).values
    return torch.where(sorted_KNC.isinf(), 0.0, sorted_KNC), answered_N


def _at(sorted_KNC: Tensor, rank_N: Tensor) -> Tensor:
    """Return the values of one rank a sample, ``[N, C]``."""
    index_1NC = rank_N.view(1, -1, 1).expand(1, *sorted_KNC.shape[1:])
    return sorted_KNC.gather(0, index_1NC).squeeze(0)


def _distances(rows_KNC: Tensor, centre_NC: Tensor, answered_KN: Tensor) -> Tensor:
    """Return Euclidean distances ``[K, N]``, 0 for clients that did not answer."""
    distances_KN = (rows_KNC - centre_NC).norm(dim=-1)
    return torch.where(answered_KN, distances_KN, 0.0)


def _middle(distances_KN: Tensor, answered_KN: Tensor) -> Tensor:
    """Return the median distance of the clients that answered, the lower of two, ``[N]``.

    Where it is 0, half of the rows are the centre, which then is the geometric median.
    """
    sorted_KN = torch.where(answered_KN, distances_KN, torch.inf).sort(0).values
    rank_N = ((answered_KN.sum(0) - 1) // 2).clamp_min(0)
    middle_N = sorted_KN.gather(0, rank_N.unsqueeze(0)).squeeze(0)
    return torch.where(answered_KN.any(0), middle_N, 0.0)


def _weiszfeld(rows_KNC: Tensor, centre_NC: Tensor, answered_KN: Tensor, close_N: Tensor) -> Tensor:
    """Return one step ``[N, C]``: to the mean of the rows weighted by 1 / distance."""
    distances_KN = _distances(rows_KNC, centre_NC, answered_KN)
    weights_KN = torch.where(distances_KN > close_N, 1 / distances_KN, 0.0)
    pull_NC = torch.einsum("kn,knc->nc", weights_KN, rows_KNC - centre_NC)
    return pull_NC / weights_KN.sum(0).clamp_min(torch.finfo().tiny).unsqueeze(-1)


def _or_nearest(rows_KNC: Tensor, centre_NC: Tensor, answered_KN: Tensor) -> Tensor:
    """Return the centre, or the row nearest to it if its sum of distances is smaller, ``[N, C]``."""
    distances_KN = _distances(rows_KNC, centre_NC, answered_KN)
    nearest_N = torch.where(answered_KN, distances_KN, torch.inf).argmin(0)
    row_NC = _at(rows_KNC, nearest_N)
    sums_N, row_sums_N = distances_KN.sum(0), _distances(rows_KNC, row_NC, answered_KN).sum(0)
    better_N = row_sums_N < (1 - _CLOSE) * sums_N
    return torch.where(better_N.unsqueeze(-1), row_NC, centre_NC)

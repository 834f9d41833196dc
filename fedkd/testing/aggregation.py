"""Checks of a strategy's rule, `aggregate`, which is a pure function of what clients upload.

A strategy without one is judged by what `update` makes of the same uploads, unless it trains a model
on them.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fedkd.errors import FedkdError
from fedkd.federation.server import Replies
from fedkd.knowledge import (
    KINDS,
    ClassMeans,
    Knowledge,
    ModelWeights,
    SoftLabels,
    Weights,
    check_answer,
    tensors_of,
)
from fedkd.phases import MeanByClass, Predict
from fedkd.strategy import DistillationStrategy
from fedkd.testing.bench import Bench, distance, same
from fedkd.testing.outcomes import NotApplicable, Wrong

K, N, D = 3, 5, 11
CLOSE = 1e-9
_MASK = [[1, 1, 0, 0, 1], [1, 0, 0, 1, 1], [1, 1, 1, 0, 1]]
"""Sample 2 is answered by client 2 alone, sample 3 by client 1."""


# --- Uploads and results -----------------------------------------------------------------------------


def uploads(bench: Bench, dtype: torch.dtype = torch.float64, *, masked: bool = False) -> Knowledge:
    """Return what three clients could upload; `masked`: with samples or classes that some have not."""
    kind = bench.strategy.uploads()
    if kind is SoftLabels:
        return _labels(bench, dtype, masked)
    if kind is ClassMeans:
        return _means(bench, dtype, masked)
    if kind is Weights:
        shapes = {"body.weight": (2, 7), "body.bias": (7,), "scale": ()}
        tensors = {n: _random(K, *shape).to(dtype) for n, shape in shapes.items()}
        part = ModelWeights(tensors, torch.arange(K), torch.tensor([2, 3, 5]))
        return Weights({"mlp-8": part})
    raise NotApplicable("nothing is uploaded")


def _random(*shape: int) -> Tensor:
    draw = torch.Generator().manual_seed(sum(shape))
    return 3 * torch.randn(*shape, generator=draw, dtype=torch.float64)


def _labels(bench: Bench, dtype: torch.dtype, masked: bool) -> SoftLabels:
    (space,) = {p.space for p in bench.strategy.phases(2) if isinstance(p, Predict)}
    data = bench.server().data
    logits = _random(K, N, data.num_classes)
    samples = torch.tensor([2, 3, 5, 7, 11])
    targets = data.public.labels
    return SoftLabels(
        (logits if space == "logits" else logits.softmax(-1)).to(dtype),
        space,
        samples,
        torch.arange(K),
        torch.tensor([2, 3, 5]),
        torch.tensor(_MASK).bool() if masked else None,
        None if targets is None else targets[samples],
    )


def _means(bench: Bench, dtype: torch.dtype, masked: bool) -> ClassMeans:
    (of,) = {p.of for p in bench.strategy.phases(2) if isinstance(p, MeanByClass)}
    classes = bench.server().data.num_classes
    values = _random(K, classes, D if of == "features" else classes)
    values = values.softmax(-1) if of == "probabilities" else values
    counts = torch.arange(1, K * classes + 1).view(K, classes) % 7 + 1
    if masked:
        if classes <= N:
            raise NotApplicable(f"it takes a data set of more than {N} classes")
        counts[:, :N] *= torch.tensor(_MASK)
        counts[:, N] = 0  # a class that nobody has
        values = torch.where(counts.unsqueeze(-1) > 0, values, 0.0)
    return ClassMeans(values.to(dtype), counts, torch.arange(K), of)


def take(knowledge: Knowledge, rows: list[int]) -> Knowledge:
    """Return the knowledge of some clients, in the order of `rows`."""
    fields: dict[str, Any] = {}
    if isinstance(knowledge, Weights):
        parts = {
            name: ModelWeights(
                {n: tensor[rows] for n, tensor in part.tensors.items()},
                part.clients[rows],
                part.num_examples[rows],
            )
            for name, part in knowledge.by_model.items()
        }
        return Weights(parts)
    if isinstance(knowledge, ClassMeans):
        fields = {n: getattr(knowledge, n)[rows] for n in ("values", "counts", "clients")}
        return replace(knowledge, **fields)
    names = ("values", "clients", "num_examples", "mask")
    fields = {n: getattr(knowledge, n)[rows] for n in names}
    return SoftLabels(
        space=knowledge.space, samples=knowledge.samples, targets=knowledge.targets, **fields
    )


def combine(bench: Bench, given: Knowledge) -> Knowledge:
    """Return what the rule makes of uploads, as knowledge."""
    made = _made(bench, deepcopy(given))
    if isinstance(made, Tensor):
        assert isinstance(given, SoftLabels)
        return SoftLabels.shared(made, given.samples, given.space)
    assert isinstance(made, KINDS)
    return made


def _made(bench: Bench, given: Knowledge) -> object:
    strategy = bench.strategy
    if type(strategy).aggregate is not DistillationStrategy.aggregate:
        return strategy.aggregate(given)
    if strategy.facts.server_model == "required":
        raise NotApplicable("it has no aggregate, and its update trains the server's model")
    return _updated(bench, given)


def _updated(bench: Bench, given: Knowledge) -> object:
    server = bench.server()
    labels = given if isinstance(given, SoftLabels) else None
    means = given if isinstance(given, ClassMeans) else None
    weights = given if isinstance(given, Weights) else None
    clients = {0: labels, 1: means, 2: weights}
    owner = next(each for each in clients.values() if each is not None)
    ids = next(iter(owner.by_model.values())) if isinstance(owner, Weights) else owner
    replies = Replies(ids.clients.tolist(), labels, means, weights)
    new: Any = bench.strategy.update(replies, server)
    if new is None:
        raise NotApplicable("it has no aggregate, and its update keeps the previous knowledge")
    if not isinstance(new, KINDS):
        return new
    return bench.strategy.personalise(new, 0, server)


# --- Checks ------------------------------------------------------------------------------------------


def types(bench: Bench) -> None:
    """The rule keeps type, device and shape, without the axis of clients; no samples give none."""
    for dtype in (torch.float64, torch.float32):
        given = uploads(bench, dtype, masked=True)
        _check_type(given, _made(bench, deepcopy(given)))
    if isinstance(given, SoftLabels):
        nothing = given.keep(torch.zeros(N, dtype=torch.bool))
        try:
            _check_type(nothing, _made(bench, nothing))
        except (Wrong, NotApplicable):
            raise
        except Exception as error:
            raise Wrong(
                f"the rule raises on soft labels for no samples, N = 0 ({type(error).__name__}: "
                f"{error}): a request may be empty, so return an empty [0, C]"
            ) from error


def _check_type(given: Knowledge, made: object) -> None:
    if isinstance(made, Tensor) and isinstance(given, SoftLabels):
        wanted = given.values.shape[1:]
        if made.shape != wanted:
            raise Wrong(
                f"the rule returns {list(made.shape)} for values {list(given.values.shape)}: must be "
                f"{list(wanted)}, [N, C], so combine over axis 0, the clients"
            )
        tensors = [made]
    elif isinstance(made, KINDS):
        tensors = tensors_of(made)
    else:
        raise Wrong(
            f"the rule returns a {type(made).__name__}: return [N, C] for soft labels, or SoftLabels, "
            "ClassMeans or Weights"
        )
    like = tensors_of(given)[0]
    for tensor in tensors:
        if tensor.is_floating_point() and tensor.dtype != like.dtype:
            raise Wrong(
                f"the rule returns {tensor.dtype} for {like.dtype}: end with .to(labels.values.dtype) "
                "(or that of the means or weights); float64 doubles the bytes on the wire"
            )
        if tensor.device != like.device or tensor.requires_grad:
            raise Wrong(
                f"the rule returns a tensor on {tensor.device} that "
                f"{'wants gradients' if tensor.requires_grad else f'came on {like.device}'}: make new "
                "tensors by labels.values.new_zeros(...) and the like, and detach"
            )


def order(bench: Bench) -> None:
    """The order of replies changes nothing."""
    given = uploads(bench, masked=True)
    expected = combine(bench, given)
    for rows in ([2, 0, 1], [1, 0, 2]):
        gap = distance(combine(bench, take(given, rows)), expected)
        if not gap <= CLOSE:
            raise Wrong(
                f"the rule gives something else (by {gap:.2g}) when the same replies come in another "
                "order: combine clients by sums, means or sorting, never by their position"
            )


def alone(bench: Bench) -> None:
    """One client alone gets its own answer back, or a sharpened form of it."""
    given = uploads(bench)
    for row in range(K):
        one = take(given, [row])
        made = combine(bench, one)
        if isinstance(one, SoftLabels) and isinstance(made, SoftLabels):
            _check_sharpened(one, made)
        elif not distance(made, one) <= 1e-6:
            raise Wrong(
                "one client alone does not get its own answer back (off by "
                f"{distance(made, one):.2g}): divide by the sum of the weights that were used"
            )


def _check_sharpened(one: SoftLabels, made: SoftLabels) -> None:
    own = one.values[0, torch.isin(one.samples, made.samples)]
    ranked = made.values.gather(-1, own.argsort(-1).expand_as(made.values))
    if not bool((ranked.diff(dim=-1) >= -CLOSE).all()):
        raise Wrong(
            "one client alone gets its classes back in another order: a rule may sharpen an answer or "
            "flatten it, but what was more probable stays more probable; look for a wrong axis, "
            "sign or space (logits or probabilities)"
        )


def equal(bench: Bench) -> None:
    """Equal clients are as good as one."""
    given = uploads(bench)
    single = combine(bench, take(given, [1]))
    same_answer = take(given, [1, 1, 1])
    if not isinstance(same_answer, Weights):
        same_answer = _with_clients(same_answer)
    gap = distance(combine(bench, same_answer), single)
    if not gap <= 1e-6:
        raise Wrong(
            f"three clients that say the same do not give what one of them gives (off by {gap:.2g}): "
            "divide by the number of clients (or the sum of the weights) instead of adding up, as "
            "labels.mean_probabilities() and labels.mean_logits() do"
        )


def _with_clients(knowledge: SoftLabels | ClassMeans) -> Knowledge:
    """Give copies of a client's answer to clients of different names."""
    if isinstance(knowledge, ClassMeans):
        return replace(knowledge, clients=torch.arange(K))
    return SoftLabels(
        knowledge.values,
        knowledge.space,
        knowledge.samples,
        torch.arange(K),
        knowledge.num_examples,
        knowledge.mask,
        knowledge.targets,
    )


def mask(bench: Bench) -> None:
    """What a client did not answer, or a class it does not hold, does not count."""
    given = uploads(bench, masked=True)
    if isinstance(given, Weights):
        raise NotApplicable("weights are always complete")
    expected = combine(bench, given)
    _check_hidden(bench, given, expected)
    # What client 2 alone answered is its own answer.
    labels = isinstance(given, SoftLabels)
    keep = torch.tensor([2])
    whole = uploads(bench)
    if isinstance(given, SoftLabels) and isinstance(whole, SoftLabels):
        some = combine(bench, given.keep(keep))
        own = combine(bench, take(whole.keep(keep), [2]))
    else:
        some, own = expected, combine(bench, take(whole, [2]))
    mine, its = tensors_of(some)[0], tensors_of(own)[0]
    rows = slice(None) if labels else slice(2, 3)
    if not torch.allclose(mine[:, rows], its[:, rows], atol=1e-6):
        raise Wrong(
            "a sample or class that one client alone has is not that client's own answer: divide by "
            "the clients that have it, labels.mask.sum(0) or means.present.sum(0), not by all"
        )


def _check_hidden(bench: Bench, given: SoftLabels | ClassMeans, expected: Knowledge) -> None:
    """Change what is not there."""
    there = given.mask if isinstance(given, SoftLabels) else given.present
    (whole,) = tensors_of(uploads(bench))
    values = torch.where(there.unsqueeze(-1), given.values, whole.flip(0))
    if isinstance(given, ClassMeans):
        changed: Knowledge = replace(given, values=values)
        where = "means.present"
    else:
        changed = SoftLabels(
            values, given.space, given.samples, given.clients, given.num_examples, given.mask,
            given.targets,
        )  # fmt: skip
        where = "labels.mask"
    gap = distance(combine(bench, changed), expected)
    if not gap <= CLOSE:
        raise Wrong(
            f"the values of clients that did not answer count (by {gap:.2g}): use {where}, for "
            "instance by labels.mean_probabilities() or labels.mean_logits(), which do"
        )


def simplex(bench: Bench) -> None:
    """Results are finite, and rows of probabilities on the simplex, for one-hot answers as well."""
    given = uploads(bench, masked=True)
    cases = [given]
    if not isinstance(given, Weights):
        hard = torch.nn.functional.one_hot(given.values.argmax(-1), given.values.shape[-1])
        size = 1.0 if _is_probabilities(given) else 1e4
        sure = deepcopy(given)
        sure.values.copy_(torch.where(given.values.sum(-1, keepdim=True) != 0, size * hard, 0.0))
        cases.append(sure)
    for case in cases:
        made = combine(bench, case)
        try:
            check_answer(made)
        except FedkdError as error:
            raise Wrong(
                f"what the rule returns {error}: divide rows by their sum, start from "
                "labels.mean_probabilities(), and keep logarithms and divisions away from 0"
            ) from None


def _is_probabilities(given: SoftLabels | ClassMeans) -> bool:
    return (given.space if isinstance(given, SoftLabels) else given.of) == "probabilities"


def pure(bench: Bench) -> None:
    """The rule changes nothing that it was given, and gives the same when it is asked again."""
    given = uploads(bench, masked=True)
    lent = deepcopy(given)
    first = deepcopy(_made(bench, lent))
    if not same(lent, given):
        raise Wrong(
            "the rule changes what it was given: no method with a trailing underscore and no "
            "assignment to labels.values[...]; work on a copy (.clone())"
        )
    if not same(_made(bench, deepcopy(given)), first):
        raise Wrong(
            "the rule gives something else when it is asked again: it may not draw or remember; draw "
            "by server.generator(purpose) in update, and remember in server.state"
        )

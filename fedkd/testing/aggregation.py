"""Check a strategy's rule, `aggregate`, which is a pure function of what clients upload.

For a strategy without one, what `update` makes of the same uploads is checked, unless it trains a model
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
from fedkd.training.architectures import architectures_of

K, N, D = 3, 5, 11
CLOSE = 1e-9
_MASK = [[1, 1, 0, 0, 1], [1, 0, 0, 1, 1], [1, 1, 1, 0, 1]]
"""Only client 2 answers sample 2, and only client 1 sample 3."""


# --- Uploads and results -----------------------------------------------------------------------------


def uploads(bench: Bench, dtype: torch.dtype = torch.float64, *, masked: bool = False) -> Knowledge:
    """Return what three clients could upload; `masked`: where some lack samples or classes."""
    kind = bench.strategy.uploads()
    if kind is SoftLabels:
        return _labels(bench, dtype, masked)
    if kind is ClassMeans:
        return _means(bench, dtype, masked)
    if kind is Weights:
        return _weights(bench, dtype)
    raise NotApplicable("nothing is uploaded")


def _random(*shape: int) -> Tensor:
    draw = torch.Generator().manual_seed(sum(shape))
    return 3 * torch.randn(*shape, generator=draw, dtype=torch.float64)


def _weights(bench: Bench, dtype: torch.dtype) -> Weights:
    """Return weights of any shape for a rule, and of the students for an update, which may use them."""
    shapes: dict[str, tuple[int, ...]]
    name, shapes = "mlp-8", {"body.weight": (2, 7), "body.bias": (7,), "scale": ()}
    tensors = {n: _random(K, *shape).to(dtype) for n, shape in shapes.items()}
    if not _has_rule(bench.strategy):
        name = bench.experiment.student_of(0)
        tensors = architectures_of(bench.server().data).initial_states(name, 1, K)
        floats = {n: t for n, t in tensors.items() if t.is_floating_point()}
        tensors |= {n: t + _random(*t.shape).to(t.dtype) / 30 for n, t in floats.items()}
    part = ModelWeights(tensors, torch.arange(K), torch.tensor([2, 3, 5]))
    return Weights({name: part})


def _has_rule(strategy: DistillationStrategy) -> bool:
    return type(strategy).aggregate is not DistillationStrategy.aggregate


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
            raise NotApplicable(f"it needs a data set of more than {N} classes")
        counts[:, :N] *= torch.tensor(_MASK)
        counts[:, N] = 0  # a class that no client has
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


def combine(bench: Bench, uploaded: Knowledge) -> Knowledge:
    """Return what the rule makes of uploads, as knowledge."""
    made = _made(bench, deepcopy(uploaded))
    if isinstance(made, Tensor):
        assert isinstance(uploaded, SoftLabels)
        return SoftLabels.shared(made, uploaded.samples, uploaded.space)
    assert isinstance(made, KINDS)
    return made


def _made(bench: Bench, uploaded: Knowledge) -> object:
    strategy = bench.strategy
    if _has_rule(strategy):
        return strategy.aggregate(uploaded)
    if strategy.facts.server_model == "required":
        raise NotApplicable("it has no aggregate, and its update trains the server's model")
    return _updated(bench, uploaded)


def _updated(bench: Bench, uploaded: Knowledge) -> object:
    server = bench.server()
    labels = uploaded if isinstance(uploaded, SoftLabels) else None
    means = uploaded if isinstance(uploaded, ClassMeans) else None
    weights = uploaded if isinstance(uploaded, Weights) else None
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
    """The rule keeps type, device and shape, without the axis of clients, for no samples as well."""
    for dtype in (torch.float64, torch.float32):
        uploaded = uploads(bench, dtype, masked=True)
        _check_type(uploaded, _made(bench, deepcopy(uploaded)))
    if isinstance(uploaded, SoftLabels):
        nothing = uploaded.keep(torch.zeros(N, dtype=torch.bool))
        try:
            _check_type(nothing, _made(bench, nothing))
        except (Wrong, NotApplicable):
            raise
        except Exception as error:
            raise Wrong(
                f"the rule raises on soft labels for no samples, N = 0 ({type(error).__name__}: "
                f"{error}): a request may be empty, so return an empty [0, C]"
            ) from error


def _check_type(uploaded: Knowledge, made: object) -> None:
    if isinstance(made, Tensor) and isinstance(uploaded, SoftLabels):
        shape = uploaded.values.shape[1:]
        if made.shape != shape:
            raise Wrong(
                f"the rule returns {list(made.shape)} for values {list(uploaded.values.shape)}: must be "
                f"{list(shape)}, [N, C], so combine over axis 0, the clients"
            )
        tensors = [made]
    elif isinstance(made, KINDS):
        tensors = tensors_of(made)
    else:
        raise Wrong(
            f"the rule returns a {type(made).__name__}: return [N, C] for soft labels, or SoftLabels, "
            "ClassMeans or Weights"
        )
    like = tensors_of(uploaded)[0]
    is_alike = isinstance(made, Tensor | type(uploaded))
    for tensor in tensors:
        if is_alike and tensor.is_floating_point() and tensor.dtype != like.dtype:
            raise Wrong(
                f"the rule returns {tensor.dtype} for {like.dtype}: end with .to(labels.values.dtype) "
                "(or that of the means or weights); float64 doubles the bytes on the wire"
            )
        if tensor.device != like.device or tensor.requires_grad:
            raise Wrong(
                f"the rule returns a tensor on {tensor.device} that "
                f"{'requires gradients' if tensor.requires_grad else f'came on {like.device}'}: make "
                "new tensors by labels.values.new_zeros(...) and the like, and detach"
            )


def order(bench: Bench) -> None:
    """The order of replies changes nothing."""
    uploaded = uploads(bench, masked=True)
    expected = combine(bench, uploaded)
    for rows in ([2, 0, 1], [1, 0, 2]):
        gap = distance(combine(bench, take(uploaded, rows)), expected)
        if not gap <= CLOSE:
            raise Wrong(
                f"the rule gives something else (by {gap:.2g}) when the same replies come in another "
                "order: combine clients by sums, means or sorting, never by their position"
            )


def alone(bench: Bench) -> None:
    """One client alone gets its own answer back, or a sharpened form of it."""
    uploaded = uploads(bench)
    for row in range(K):
        one = take(uploaded, [row])
        made = combine(bench, one)
        if type(made) is not type(one):
            raise NotApplicable("what clients receive is of another kind than what they send")
        if isinstance(one, SoftLabels) and isinstance(made, SoftLabels):
            _check_sharpened(one, made)
        elif not distance(made, one) <= 1e-6:
            raise Wrong(
                "one client alone does not get its own answer back (off by "
                f"{distance(made, one):.2g}): divide by the sum of the weights that were used"
            )


def _check_sharpened(one: SoftLabels, made: SoftLabels) -> None:
    answer = one.values[0, torch.isin(one.samples, made.samples)]
    ranked = made.values.gather(-1, answer.argsort(-1).expand_as(made.values))
    if not bool((ranked.diff(dim=-1) >= -CLOSE).all()):
        raise Wrong(
            "one client alone gets its classes back in another order: a rule may sharpen an answer or "
            "flatten it, but what was more probable stays more probable; look for a wrong axis, "
            "sign or space (logits or probabilities)"
        )


def equal(bench: Bench) -> None:
    """Equal clients give the same as one."""
    uploaded = uploads(bench)
    single = combine(bench, take(uploaded, [1]))
    same_answer = take(uploaded, [1, 1, 1])
    if not isinstance(same_answer, Weights):
        same_answer = _with_clients(same_answer)
    gap = distance(combine(bench, same_answer), single)
    if not gap <= 1e-6:
        raise Wrong(
            f"three equal answers do not give what one of them gives (off by {gap:.2g}): "
            "divide by the number of clients (or the sum of the weights) instead of adding up, as "
            "labels.mean_probabilities() and labels.mean_logits() do"
        )


def _with_clients(knowledge: SoftLabels | ClassMeans) -> Knowledge:
    """Return copies of a client's answer as those of `K` different clients."""
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
    uploaded = uploads(bench, masked=True)
    if isinstance(uploaded, Weights):
        raise NotApplicable("weights are always complete")
    expected = combine(bench, uploaded)
    _check_hidden(bench, uploaded, expected)
    # What client 2 alone answered is its own answer.
    labels = isinstance(uploaded, SoftLabels)
    keep = torch.tensor([2])
    whole = uploads(bench)
    if isinstance(uploaded, SoftLabels) and isinstance(whole, SoftLabels):
        some = combine(bench, uploaded.keep(keep))
        single = combine(bench, take(whole.keep(keep), [2]))
    else:
        some, single = expected, combine(bench, take(whole, [2]))
    combined, alone = tensors_of(some)[0], tensors_of(single)[0]
    rows = slice(None) if labels else slice(2, 3)
    if not torch.allclose(combined[:, rows], alone[:, rows], atol=1e-6):
        raise Wrong(
            "a sample or class that only one client has is not that client's own answer: divide by "
            "the clients that have it, labels.mask.sum(0) or means.present.sum(0), not by all"
        )


def _check_hidden(bench: Bench, uploaded: SoftLabels | ClassMeans, expected: Knowledge) -> None:
    """Check that changing values that the mask hides changes nothing."""
    present = uploaded.mask if isinstance(uploaded, SoftLabels) else uploaded.present
    (whole,) = tensors_of(uploads(bench))
    values = torch.where(present.unsqueeze(-1), uploaded.values, whole.flip(0))
    if isinstance(uploaded, ClassMeans):
        changed: Knowledge = replace(uploaded, values=values)
        where = "means.present"
    else:
        changed = SoftLabels(
            values, uploaded.space, uploaded.samples, uploaded.clients, uploaded.num_examples,
            uploaded.mask, uploaded.targets,
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
    uploaded = uploads(bench, masked=True)
    cases = [uploaded]
    if not isinstance(uploaded, Weights):
        hard = torch.nn.functional.one_hot(uploaded.values.argmax(-1), uploaded.values.shape[-1])
        size = 1.0 if _is_probabilities(uploaded) else 1e4
        sure = deepcopy(uploaded)
        sure.values.copy_(torch.where(uploaded.values.sum(-1, keepdim=True) != 0, size * hard, 0.0))
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


def _is_probabilities(uploaded: SoftLabels | ClassMeans) -> bool:
    return (uploaded.space if isinstance(uploaded, SoftLabels) else uploaded.of) == "probabilities"


def pure(bench: Bench) -> None:
    """The rule leaves its input unchanged, and gives the same when it is called again."""
    uploaded = uploads(bench, masked=True)
    passed = deepcopy(uploaded)
    first = deepcopy(_made(bench, passed))
    if not same(passed, uploaded):
        raise Wrong(
            "the rule changes its input: no method with a trailing underscore and no "
            "assignment to labels.values[...]; work on a copy (.clone())"
        )
    if not same(_made(bench, deepcopy(uploaded)), first):
        raise Wrong(
            "the rule gives something else when it is called again: it may neither draw nor keep "
            "anything; draw by server.generator(purpose) in update, and keep it in server.state"
        )

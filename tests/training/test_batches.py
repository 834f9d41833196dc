"""Fits from two streams of batches, and their samples, against a plain PyTorch loop."""

from __future__ import annotations

from functools import partial
from typing import Literal

import pytest
import torch
from plain_training import (
    ALPHA,
    LOOP,
    MODELS,
    STACKED_1,
    STACKED_2,
    STACKED_ALL,
    TAU,
    C,
    N,
    Name,
    PlainLoss,
    PlainSide,
    assert_equal_states,
    cohort_of,
    distilling_loss,
    fit,
    fresh,
    images,
    plain,
    plan_name,
    shard,
    soft_labels,
    soft_loss,
    start,
    train_plainly,
)
from torch import Tensor, nn
from torch.nn import functional as F

from fedkd.errors import FedkdError
from fedkd.losses import Term, ce, kl, kl_mean, mae_logits
from fedkd.training.batches import BatchStream
from fedkd.training.parameters import State
from fedkd.training.plans import Plan

# --- The oracle ----------------------------------------------------------------------------------


def soft_part(k: int) -> PlainLoss:
    """α·τ²·KL with client k's own α and τ."""
    return lambda model, x, y, zt: float(ALPHA[k]) * soft_loss(model(x), zt, float(TAU[k]))


def hard_part(k: int) -> PlainLoss:
    """(1−α)·CE with client k's own α."""
    return lambda model, x, y, zt: (1 - float(ALPHA[k])) * F.cross_entropy(model(x), y)


# --- Neighbours ----------------------------------------------------------------------------------


@pytest.mark.parametrize("augment", ["jitter-2", "crop-flip"])
def test_augmented_images_do_not_depend_on_plan_or_neighbours(
    augment: Literal["jitter-2", "crop-flip"],
) -> None:
    def trained(clients: list[int], plan: Plan) -> dict[int, State]:
        cohort = cohort_of(MODELS["mlp"], clients, plan)
        rows = [shard(k) for k in clients]
        fit(cohort, clients, [BatchStream("private", images(), rows, {ce: 1.0}, augment=augment)])
        return {k: cohort.state(i) for i, k in enumerate(clients)}

    together = trained([0, 1, 2], STACKED_ALL)
    for others in (trained([0, 1, 2], LOOP), trained([2, 1], STACKED_1)):
        for k, state in others.items():
            assert_equal_states(state, together[k], 1e-9)
    plainly = plain("mlp", "adam", 2)[0]
    assert not torch.allclose(plainly["head.weight"], together[2]["head.weight"], atol=1e-3)


# --- Distillation --------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", [STACKED_2, STACKED_ALL, LOOP], ids=plan_name)
@pytest.mark.parametrize("name", ["adam", "sgd"])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "personal"])
def test_distillation_with_own_alpha_and_tau_equals_a_plain_loop(
    shared: bool, name: Name, plan: Plan
) -> None:
    clients, build = [4, 1, 0, 2, 5], MODELS["small-cnn"]
    rows = [torch.arange(19) * 3 % N if shared else shard(k) for k in clients]
    teachers = soft_labels(1 if shared else len(clients), 64)
    chosen = torch.tensor(clients)
    alpha = ALPHA[chosen]
    batch_stream = BatchStream("public", images(), rows, {kl: alpha, ce: 1 - alpha}, teachers)
    cohort = cohort_of(build, clients, plan)

    fit(cohort, clients, [batch_stream], name, numbers={"tau": TAU[chosen]})

    for i, k in enumerate(clients):
        module = fresh(build, k)
        own = PlainSide(
            "public", rows[i], partial(distilling_loss, k=k), teachers[0 if shared else i]
        )
        expected, _ = train_plainly(module, k, [own], name)
        assert_equal_states(cohort.state(i), expected, 1e-9)


@pytest.mark.parametrize("plan", [STACKED_2, LOOP], ids=plan_name)
@pytest.mark.parametrize("model", ["mlp", "normed"])
def test_two_sides_in_one_step_equal_a_plain_loop(model: str, plan: Plan) -> None:
    """Unlabelled public images under KL, and a private batch in the same step, wrapping around."""
    clients, build = [0, 6, 1], MODELS[model]
    public, teachers = torch.arange(21) * 2, soft_labels(1, 21)
    chosen = torch.tensor(clients)
    alpha = ALPHA[chosen]
    batch_streams = [
        BatchStream("public", images(labelled=False), [public] * 3, {kl: alpha}, teachers),
        BatchStream("private", images(), [shard(k) for k in clients], {ce: 1 - alpha}),
    ]
    cohort = cohort_of(build, clients, plan)

    losses = fit(cohort, clients, batch_streams, numbers={"tau": TAU[chosen]})

    for i, k in enumerate(clients):
        own = [
            PlainSide("public", public, soft_part(k), teachers[0]),
            PlainSide("private", shard(k), hard_part(k)),
        ]
        expected, loss = train_plainly(fresh(build, k), k, own)
        assert_equal_states(cohort.state(i), expected, 1e-9)
        assert float(losses[i]) == pytest.approx(loss, abs=1e-9)


@pytest.mark.parametrize("plan", [STACKED_ALL, LOOP], ids=plan_name)
@pytest.mark.parametrize("each", [kl_mean, mae_logits], ids=lambda t: t.import_path)
def test_other_digests_equal_a_plain_loop(each: Term, plan: Plan) -> None:
    def loss(model: nn.Module, x: Tensor, y: Tensor, zt: Tensor) -> Tensor:
        if each is mae_logits:
            return F.l1_loss(model(x), zt)
        return soft_loss(model(x), zt, 2.0) / C

    clients, teachers = [0, 1], soft_labels(1, 11)
    rows = torch.arange(11)
    cohort = cohort_of(MODELS["mlp"], clients, plan)
    fit(
        cohort,
        clients,
        [BatchStream("public", images(), [rows] * 2, {each: 1.0}, teachers)],
        numbers={"tau": 2.0},
    )
    for k in clients:
        module = fresh(MODELS["mlp"], k)
        expected, _ = train_plainly(module, k, [PlainSide("public", rows, loss, teachers[0])])
        assert_equal_states(cohort.state(k), expected, 1e-9)


# --- Errors, progress ----------------------------------------------------------------------------


@pytest.mark.parametrize("plan", [STACKED_ALL, LOOP], ids=plan_name)
@pytest.mark.parametrize("empty", [0, 1], ids=["first side", "second side"])
def test_a_client_without_samples_is_refused_before_anything_moves(empty: int, plan: Plan) -> None:
    clients = [0, 1, 2]
    cohort = cohort_of(MODELS["linear"], clients, plan)
    rows = [[shard(k) for k in clients] for _ in range(2)]
    rows[empty][1] = torch.empty(0, dtype=torch.int64)
    names = ["public", "private"]
    batch_streams = [
        BatchStream(n, images(), r, {ce: 1.0}) for n, r in zip(names, rows, strict=True)
    ]
    with pytest.raises(FedkdError, match=f"model 1 .*no {names[empty]} samples"):
        fit(cohort, clients, batch_streams)
    for k in clients:
        assert_equal_states(cohort.state(k), start(MODELS["linear"], k), 0.0)

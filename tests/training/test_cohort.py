"""A cohort beside its neighbours: bits that do not depend on them, predictions, states, refusals."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from plain_training import (
    F64,
    LANES_2,
    LOOP,
    MODELS,
    PLANS,
    SEVEN,
    STACKED_2,
    STACKED_ALL,
    B,
    Builder,
    C,
    Dropping,
    N,
    Name,
    PlainSide,
    assert_equal_states,
    cohort_of,
    fit,
    fresh,
    hard_loss,
    images,
    inputs,
    plan_name,
    private_stream,
    shard,
    start,
    stream,
    train_plainly,
)
from sampling import one_in
from torch import Tensor, nn

from fedkd.randomness import key
from fedkd.training.optimizers import OptimizerSettings
from fedkd.training.parameters import State, initial_state
from fedkd.training.plans import Plan

# --- Neighbours ----------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("name", "batch_size"),
    one_in(2, [("adam", 7), ("adamw", B), ("sgd", B), ("sgd", 1), ("adam", B)]),
)
def test_a_dense_client_s_bits_do_not_depend_on_the_others(
    name: Name, batch_size: int, threads: int
) -> None:
    """Float32 under vmap: alone, reordered, in blocks of other sizes, and in lanes.

    Matrix products differ by where a client's rows begin (batches of odd sizes) and, for a stack of
    one, by the number of threads: a lane has one.
    """
    torch.set_num_threads(threads)

    def trained(clients: list[int], block: int, lanes: int = threads) -> dict[int, State]:
        plan = Plan(True, block, lanes)
        cohort = cohort_of(MODELS["mlp"], clients, plan, torch.float32)
        batch_stream = private_stream(clients, torch.float32)
        fit(cohort, clients, [batch_stream], name, batch_size=batch_size)
        return {k: cohort.state(i) for i, k in enumerate(clients)}

    together = trained(SEVEN, 7)
    for others in (
        *(trained([k], 1) for k in SEVEN),
        trained([4, 0, 6], 7),
        trained([6, 5, 4, 3, 2, 1, 0], 3),
        trained([6, 5, 4, 3, 2, 1, 0], 3, lanes=2),
        trained([2, 1], 2),
        trained([2], 2, lanes=2),
    ):
        for k, state in others.items():
            assert all(torch.equal(state[n], t) for n, t in together[k].items())


@pytest.mark.parametrize("lanes", [1, 2])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_convolutional_client_s_bits_do_not_depend_on_the_others_one_by_one(
    threads: int, lanes: int
) -> None:
    torch.set_num_threads(threads)

    def trained(clients: list[int]) -> dict[int, State]:
        plan = Plan(False, lanes=lanes)
        cohort = cohort_of(MODELS["small-cnn"], clients, plan, torch.float32)
        fit(cohort, clients, [private_stream(clients, torch.float32)])
        return {k: cohort.state(i) for i, k in enumerate(clients)}

    together = trained([0, 1, 2])
    for others in (trained([2, 0]), trained([1])):
        for k, state in others.items():
            assert all(torch.equal(state[n], t) for n, t in together[k].items())


# --- Predicting ----------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", PLANS, ids=plan_name)
@pytest.mark.parametrize("model", ["mlp", "normed", "dropout"])
def test_predictions_are_those_of_the_module_in_evaluation(
    model: str, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "fedkd.training.cohort.IMAGES_AT_ONCE", {True: 13, False: 13}
    )  # 101 images in eight chunks
    build = MODELS.get(model, lambda: Dropping(nn.Dropout(0.5)))
    clients = [0, 1, 2]
    cohort = cohort_of(build, clients, plan)
    fit(cohort, clients, [private_stream(clients)], epochs=1)
    states = [cohort.state(k) for k in clients]
    rows = torch.arange(N).flip(0)[:29]

    every, some = cohort.predict(images()), cohort.predict(images(labelled=False), rows)
    classes, some_classes = cohort.classify(images()), cohort.classify(images(), rows)

    assert every.shape == (3, N, C)
    assert not every.requires_grad
    assert classes.dtype == torch.int16
    for k in clients:
        module = build().double()
        module.load_state_dict(states[k])
        expected = module.eval()(inputs()).detach()
        torch.testing.assert_close(every[k], expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(some[k], expected[rows], rtol=0, atol=1e-12)
        assert torch.equal(classes[k].long(), expected.argmax(-1))
        assert torch.equal(some_classes[k].long(), expected[rows].argmax(-1))
        assert_equal_states(cohort.state(k), states[k], 0.0)  # predicting changes nothing


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("count", [N, 29, 7, 1])
def test_float32_dense_predictions_do_not_depend_on_the_others(count: int, threads: int) -> None:
    torch.set_num_threads(threads)
    rows = torch.arange(N).flip(0)[:count]
    full = cohort_of(MODELS["mlp"], SEVEN, Plan(True, 7, threads), torch.float32)
    together = full.predict(images(torch.float32), rows)
    assert together.shape == (7, count, C)
    for plan in (Plan(True, 7, threads), LANES_2):
        for k in SEVEN:
            alone = cohort_of(MODELS["mlp"], [k], plan, torch.float32)
            assert torch.equal(alone.predict(images(torch.float32), rows)[0], together[k])


class Greedy(nn.Module):
    """Works on its input in place, as a first layer with ``inplace=True`` does."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.mul_(-2.0).flatten(1))  # type: ignore[no-any-return]


@pytest.mark.parametrize("plan", [STACKED_2, LOOP, LANES_2], ids=plan_name)
@pytest.mark.parametrize("rows", [None, torch.arange(29)], ids=["all", "some"])
def test_a_model_that_works_in_place_spoils_no_images(plan: Plan, rows: Tensor | None) -> None:
    """Not for the next block, not for the next look at the same set, not for another model."""
    clients = [0, 1, 2, 4, 5]
    greedy, other = cohort_of(Greedy, clients, plan), cohort_of(MODELS["linear"], clients, plan)
    seen = replace(images())
    first, before = greedy.predict(seen, rows), other.predict(replace(images()), rows)
    assert torch.equal(greedy.predict(seen, rows), first)
    assert torch.equal(other.predict(seen, rows), before)
    for i, k in enumerate(clients):
        module = fresh(Greedy, k).eval()
        expected = module(inputs() if rows is None else inputs()[rows]).detach()
        torch.testing.assert_close(first[i], expected, rtol=0, atol=1e-12)


# --- States --------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["mlp", "resnet"])
def test_initial_state_is_that_of_a_seeded_build_and_leaves_the_global_generator_alone(
    model: str,
) -> None:
    before = torch.get_rng_state()
    given = initial_state(MODELS[model], 5, "client", 2)
    assert torch.equal(torch.get_rng_state(), before)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(5, "client", 2))
        expected = MODELS[model]().state_dict()
    assert set(given) == set(expected)
    assert all(torch.equal(given[n], t) for n, t in expected.items())
    assert not any(t.requires_grad for t in given.values())
    other = initial_state(MODELS[model], 5, "client", 3)
    assert not torch.equal(other["head.weight"], given["head.weight"])


def test_states_go_in_and_come_out_as_copies() -> None:
    cohort = cohort_of(MODELS["resnet"], [0, 1, 2], LOOP)
    taken = cohort.state(1)
    assert_equal_states(taken, start(MODELS["resnet"], 1), 0.0)
    taken["head.bias"].fill_(7.0)
    assert_equal_states(cohort.state(1), start(MODELS["resnet"], 1), 0.0)

    cohort.load(2, {n: t.float() if t.is_floating_point() else t for n, t in taken.items()})
    assert cohort.params["head.bias"].dtype == F64
    assert_equal_states(cohort.state(2), taken, 1e-7)
    assert_equal_states(cohort.state(0), start(MODELS["resnet"], 0), 0.0)
    taken["head.bias"].fill_(9.0)
    assert bool((cohort.state(2)["head.bias"] == 7.0).all())


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, C)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(x.flatten(1)).relu()).relu())  # type: ignore[no-any-return]


class Counting(nn.Module):
    """A buffer that is part of the module but not of its ``state_dict``."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, C)
        self.register_buffer("scale", torch.linspace(0.5, 2.0, 64), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(1) * self.scale)  # type: ignore[no-any-return]


def frozen() -> nn.Module:
    """A trained body that a user fixed: ``requires_grad`` is the way to say so."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 13), nn.ReLU(), nn.Linear(13, C))
    model[1].requires_grad_(False)
    return model


class Spare(nn.Module):
    """A parameter that no loss reaches: ``torch.optim`` leaves it alone, weight decay included."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.spare = nn.Linear(64, C), nn.Parameter(torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(1))  # type: ignore[no-any-return]


def dense_normed() -> nn.Module:
    """Without bias before it: that gradient is zero but for rounding, which Adam blows up."""
    return nn.Sequential(
        *(nn.Flatten(), nn.Linear(64, 13, bias=False)),
        *(nn.BatchNorm1d(13, momentum=0.3), nn.ReLU(), nn.Linear(13, C)),
    )


@pytest.mark.parametrize("plan", [STACKED_2, LOOP], ids=plan_name)
@pytest.mark.parametrize("build", [Tied, Counting, frozen, Spare, dense_normed])
def test_special_modules_train_as_in_plain_pytorch(build: Builder, plan: Plan) -> None:
    """With decay, and shards of 5, 64 and 8 samples: no batch of one, which 1-d norms refuse."""
    clients = [0, 2, 4]
    cohort = cohort_of(build, clients, plan)
    fit(cohort, clients, [private_stream(clients)], "adamw")
    for i, k in enumerate(clients):
        module = fresh(build, k)
        expected, _ = train_plainly(module, k, [PlainSide("private", shard(k), hard_loss)], "adamw")
        trained = {n: t for n, t in cohort.state(i).items() if n in expected}
        assert_equal_states(trained, expected, 1e-9)


def test_a_last_batch_of_one_sample_under_batch_norm_is_the_same_in_both_plans() -> None:
    """PyTorch refuses such a batch; shards of 9 and 17 images have one in every epoch."""
    clients = [1, 5]
    states = []
    for plan in (STACKED_ALL, LOOP):
        cohort = cohort_of(dense_normed, clients, plan)
        fit(cohort, clients, [private_stream(clients)])
        states.append(cohort.state(0))
    assert all(bool(t.isfinite().all()) for t in states[0].values())
    assert_equal_states(states[0], states[1], 1e-9)


# --- Errors, progress ----------------------------------------------------------------------------


@pytest.mark.parametrize("plan", PLANS, ids=plan_name)
def test_progress_rises_to_one(plan: Plan) -> None:
    told: list[float] = []
    clients = [0, 1, 2]
    cohort = cohort_of(MODELS["linear"], clients, plan)
    cohort.fit(
        [private_stream(clients)],
        epochs=1,
        batch_size=B,
        optimizer=OptimizerSettings(),
        streams=[stream(k) for k in clients],
        progress=told.append,
    )
    assert told == sorted(told)
    assert 0 < told[0] < 1
    assert told[-1] == 1

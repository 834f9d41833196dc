"""A client executing phases: its numbers against a float64 step written here, alone and in company.

One step of SGD on a batch that holds everything needs no random draw, so that the reference below
knows nothing of the client but the formula in the paper.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import federation_tools
import pytest
import torch
from federation_tools import P, execute, refuses_nines, tiny
from torch import Tensor, nn
from torch.nn import functional as F

from fedkd.clients.instructions import ClientReport, Failure, Instruction
from fedkd.clients.state_files import StateFiles
from fedkd.clients.state_store import ResidentStates
from fedkd.clients.states import INITIAL
from fedkd.data.federated import FederatedData, federated_data
from fedkd.data.images import Images
from fedkd.experiment import Experiment
from fedkd.knowledge import Knowledge, ModelWeights, SoftLabels, Space, Weights
from fedkd.losses import mae_logits
from fedkd.phases import Digest, Fit, Load, Phase, Predict, Revisit, SendWeights
from fedkd.training.architectures import architectures_of
from fedkd.training.models import build
from fedkd.training.parameters import State

K, C = 3, 10
EVERYTHING = 1000
"""A batch size that holds every shard and the whole public set."""
NOTHING = torch.empty(0, dtype=torch.int64)
ROWS = torch.tensor([31, 2, 17, 5, 3, 29, 11])
"""Public samples in no particular order."""
USUAL: tuple[Phase, ...] = (Digest(), Revisit(), Predict())


def one_step(**keys: Any) -> Experiment:
    """Return an experiment whose fits take a single step of plain SGD."""
    plain: dict[str, Any] = {
        "batch_size": EVERYTHING,
        "optimizer": "sgd",
        "learning_rate": 0.5,
        "alpha": 0.3,
        "tau": 2.0,
    }
    return tiny(**{**plain, **keys})


def received(
    seed: int = 1, samples: Tensor = ROWS, space: Space = "logits", number: float = 3.0
) -> SoftLabels:
    """Return soft labels for some public samples; of probabilities, one is certain."""
    generator = torch.Generator().manual_seed(seed)
    values = number * torch.randn(len(samples), C, generator=generator)
    if space == "probabilities":
        values = values.softmax(-1)
        values[0] = torch.eye(C)[3]
    return SoftLabels.shared(values, samples, space)


def new_store(experiment: Experiment, limit: int = K) -> ResidentStates:
    """Return an empty store whose folder goes with it; up to `limit` clients stay in memory."""
    folder = tempfile.mkdtemp(prefix="fedkd-tests-states-")
    store = ResidentStates(StateFiles(Path(folder), experiment.architecture_period), limit)
    weakref.finalize(store, shutil.rmtree, folder)
    return store


def run(
    experiment: Experiment,
    phases: Sequence[Phase],
    clients: Sequence[int] = range(K),
    *,
    data: FederatedData | None = None,
    store: ResidentStates | None = None,
    **instruction: Any,
) -> tuple[list[ClientReport | Failure], ResidentStates]:
    """Execute the same phases for some clients; the states are those of round 1 by default."""
    store = store or new_store(experiment)
    fields = {"round": 1, "base": INITIAL, "asked": NOTHING, **instruction}
    instructions = [Instruction(client=k, phases=tuple(phases), **fields) for k in clients]
    return execute(experiment, data or federated_data(experiment), instructions, store), store


def reports(results: Sequence[ClientReport | Failure]) -> list[ClientReport]:
    good = [result for result in results if isinstance(result, ClientReport)]
    assert len(good) == len(results), results
    return good


@dataclass(frozen=True)
class Kept:
    """What one client has on disk, without the axis of the stack."""

    models: dict[str, State]
    digested: int


def has(store: ResidentStates, client: int, number: int) -> bool:
    return store.files.load({client: number}).clients == [client]


def state(store: ResidentStates, client: int, number: int = 1) -> Kept:
    found = store.files.load({client: number})
    assert found.clients == [client]
    models = {role: {n: t[0] for n, t in model.items()} for role, model in found.models.items()}
    return Kept(models, found.digested[0])


def assert_same_state(one: Kept, other: Kept) -> None:
    """Compare bit for bit."""
    assert one.digested == other.digested
    assert one.models.keys() == other.models.keys()
    for role, model in one.models.items():
        assert model.keys() == other.models[role].keys()
        for name, tensor in model.items():
            assert tensor.dtype == other.models[role][name].dtype
            assert torch.equal(tensor, other.models[role][name]), (role, name)


def assert_same_report(one: ClientReport | Failure, other: ClientReport | Failure) -> None:
    """Compare bit for bit, seconds aside."""
    assert isinstance(one, ClientReport)
    assert isinstance(other, ClientReport)
    assert (one.client, one.num_examples) == (other.client, other.num_examples)
    assert one.metrics == other.metrics
    assert one.seconds.keys() == other.seconds.keys()
    assert type(one.answer) is type(other.answer)
    if isinstance(one.answer, SoftLabels):
        assert isinstance(other.answer, SoftLabels)
        assert torch.equal(one.answer.values, other.answer.values)
        assert torch.equal(one.answer.samples, other.answer.samples)


# --- The reference: one step in float64 ----------------------------------------------------------


def images(source: Images, rows: Tensor | None = None) -> Tensor:
    """Normalise as the paper of a data set does: pixels over 255, minus mean, over deviation."""
    mean = torch.tensor(source.mean, dtype=torch.float64)[:, None, None]
    std = torch.tensor(source.std, dtype=torch.float64)[:, None, None]
    pixels = source.pixels if rows is None else source.pixels[rows]
    return (pixels.double() / 255 - mean) / std


def module(data: FederatedData, name: str, weights: dict[str, Tensor]) -> nn.Module:
    model = build(name, data.input_shape, data.num_classes).double()
    model.load_state_dict({n: t.double() for n, t in weights.items()})
    return model


def initial(experiment: Experiment, name: str = "mlp-8") -> dict[str, Tensor]:
    return architectures_of(federated_data(experiment)).initial_state(name, experiment.seed)


def stepped(model: nn.Module, loss: Tensor, rate: float = 0.5) -> dict[str, Tensor]:
    """Return the weights after one step of plain SGD."""
    names, params = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad(loss, params)
    return {n: (p - rate * g).detach() for n, p, g in zip(names, params, grads, strict=True)}


def kl_loss(teacher: Tensor, student: Tensor, tau: float, divided: bool = False) -> Tensor:
    """Σ p·log(p/q) at temperature τ, written out, times τ², averaged over samples."""
    p = torch.exp(teacher / tau) / torch.exp(teacher / tau).sum(-1, keepdim=True)
    q = torch.exp(student / tau) / torch.exp(student / tau).sum(-1, keepdim=True)
    per_sample = (p * (p.log() - q.log())).nan_to_num(0.0).sum(-1)
    return tau**2 * per_sample.mean() / (student.shape[-1] if divided else 1)


def ce_loss(logits: Tensor, labels: Tensor) -> Tensor:
    chosen = logits[torch.arange(len(labels)), labels]
    return (torch.log(torch.exp(logits).sum(-1)) - chosen).mean()


def digest_reference(
    experiment: Experiment, client: int, knowledge: SoftLabels
) -> dict[str, Tensor]:
    """Return the student after digesting `knowledge` in one step: α·τ²·KL + (1 − α)·CE."""
    data = federated_data(experiment)
    student = module(data, "mlp-8", initial(experiment))
    rows = knowledge.samples
    logits = student(images(data.public, rows))
    teacher = knowledge.values[0].double()
    if knowledge.space == "probabilities":
        teacher = teacher.log()
    soft = kl_loss(teacher, logits, experiment.tau, experiment.kl_reduction == "mean")
    if data.public.labels is not None:
        hard = ce_loss(logits, data.public.labels[rows])
    else:
        shard = data.shards[client]
        assert data.train.labels is not None
        hard = ce_loss(student(images(data.train, shard)), data.train.labels[shard])
    return stepped(student, experiment.alpha * soft + (1 - experiment.alpha) * hard)


def assert_weights(got: Any, expected: dict[str, Tensor], moved_from: dict[str, Tensor]) -> None:
    """Compare to 1e-5 of a step, and check that there was one."""
    assert list(got) == list(expected)
    moved = max(float((expected[n] - moved_from[n]).abs().max()) for n in expected)
    assert moved > 1e-2
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name].double(), tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("public_labels", [True, False], ids=["labelled", "unlabelled"])
@pytest.mark.parametrize("space", ["logits", "probabilities"])
def test_digest_is_one_step_of_the_formula(space: Space, public_labels: bool) -> None:
    """On an unlabelled public set, cross entropy takes a private batch in the same step."""
    experiment = one_step(public_labels=public_labels)
    knowledge = received(space=space)
    results, store = run(experiment, [Digest()], knowledge=knowledge, knowledge_round=4, round=5)
    for report in reports(results):
        expected = digest_reference(experiment, report.client, knowledge)
        student = state(store, report.client, 5).models["student"]
        assert_weights(student, expected, initial(experiment))
        assert state(store, report.client, 5).digested == 4


@pytest.mark.parametrize("alpha", [0.0, 1.0])
@pytest.mark.parametrize("public_labels", [True, False], ids=["labelled", "unlabelled"])
def test_digest_at_the_ends_of_alpha(alpha: float, public_labels: bool) -> None:
    """At α = 0 the knowledge does not matter, at α = 1 the labels do not."""
    experiment = one_step(alpha=alpha, public_labels=public_labels)
    knowledge = received()
    results, store = run(experiment, [Digest()], knowledge=knowledge, knowledge_round=1)
    for report in reports(results):
        expected = digest_reference(experiment, report.client, knowledge)
        assert_weights(state(store, report.client).models["student"], expected, initial(experiment))
    _, other = run(experiment, [Digest()], knowledge=received(seed=9), knowledge_round=1)
    same = torch.equal(
        state(store, 0).models["student"]["head.bias"],
        state(other, 0).models["student"]["head.bias"],
    )
    assert same == (alpha == 0)
    students = [state(store, k).models["student"]["head.bias"] for k in range(K)]
    assert torch.allclose(students[0], students[1], atol=1e-5) == (alpha == 1 or public_labels)


def test_kl_reduction_mean_divides_the_soft_term_by_the_classes() -> None:
    experiment = one_step(kl_reduction="mean", learning_rate=0.5, alpha=0.9)
    knowledge = received()
    results, store = run(experiment, [Digest()], knowledge=knowledge, knowledge_round=1)
    expected = digest_reference(experiment, 0, knowledge)
    assert_weights(state(store, 0).models["student"], expected, initial(experiment))
    formula = digest_reference(experiment.replace(kl_reduction="batchmean"), 0, knowledge)
    assert float((formula["head.bias"] - expected["head.bias"]).abs().max()) > 1e-3
    assert reports(results)[0].metrics["loss_digest"] > 0


def test_the_loss_that_is_reported_is_that_of_the_formula() -> None:
    experiment = one_step()
    data, knowledge = federated_data(experiment), received()
    results, _ = run(experiment, [Digest()], knowledge=knowledge, knowledge_round=1)
    logits = module(data, "mlp-8", initial(experiment))(images(data.public, ROWS))
    soft = kl_loss(knowledge.values[0].double(), logits, experiment.tau)
    assert data.public.labels is not None
    expected = 0.3 * soft + 0.7 * ce_loss(logits, data.public.labels[ROWS])
    for report in reports(results):
        assert report.metrics["loss_digest"] == pytest.approx(float(expected.detach()), rel=1e-5)


def test_revisit_is_one_step_of_cross_entropy_on_the_private_shard() -> None:
    experiment = one_step()
    data = federated_data(experiment)
    results, store = run(experiment, [Revisit()])
    assert data.train.labels is not None
    for report in reports(results):
        student = module(data, "mlp-8", initial(experiment))
        shard = data.shards[report.client]
        loss = ce_loss(student(images(data.train, shard)), data.train.labels[shard])
        expected = stepped(student, loss)
        assert_weights(state(store, report.client).models["student"], expected, initial(experiment))
        assert report.num_examples == len(shard)


def test_the_authors_digest_is_the_mean_absolute_error_of_logits() -> None:
    experiment = one_step()
    data, knowledge = federated_data(experiment), received()
    results, store = run(
        experiment, [Fit("digest", public={"mae_logits": 1.0})], knowledge=knowledge,
        knowledge_round=1,
    )  # fmt: skip
    reports(results)
    student = module(data, "mlp-8", initial(experiment))
    error = (student(images(data.public, ROWS)) - knowledge.values[0].double()).abs().mean()
    assert_weights(state(store, 0).models["student"], stepped(student, error), initial(experiment))


def test_soft_labels_meet_their_own_samples_whatever_their_order() -> None:
    """Knowledge travels with sample indices, never by order."""
    experiment = one_step()
    knowledge = received()
    instruction = torch.tensor([4, 0, 6, 2, 5, 1, 3])
    _, store = run(experiment, [Digest()], knowledge=knowledge, knowledge_round=1)
    _, permuted = run(
        experiment, [Digest()], knowledge=knowledge.keep(instruction), knowledge_round=1
    )
    for name, tensor in state(store, 0).models["student"].items():
        torch.testing.assert_close(
            state(permuted, 0).models["student"][name], tensor, rtol=1e-5, atol=1e-6
        )


def test_a_transfer_learns_all_public_labels_and_needs_no_knowledge() -> None:
    experiment = one_step()
    data = federated_data(experiment)
    _, store = run(experiment, [Fit("transfer", "teacher", public={"ce": 1.0}, epochs=1)])
    student = module(data, "mlp-8", initial(experiment))
    assert data.public.labels is not None
    assert len(data.public) == P
    expected = stepped(student, ce_loss(student(images(data.public)), data.public.labels))
    assert_weights(state(store, 2).models["student"], expected, initial(experiment))


# --- Local teachers ------------------------------------------------------------------------------


def test_a_local_teacher_revisits_and_answers_while_the_student_digests() -> None:
    experiment = one_step(teacher="mlp-9")
    data, knowledge = federated_data(experiment), received()
    asked = torch.tensor([8, 1, 30])
    results, store = run(
        experiment, USUAL, knowledge=knowledge, knowledge_round=1, asked=asked, round=2
    )
    assert data.train.labels is not None
    for report in reports(results):
        models = state(store, report.client, 2).models
        assert set(models) == {"student", "teacher"}
        assert_weights(
            models["student"],
            digest_reference(experiment, report.client, knowledge),
            initial(experiment),
        )
        teacher = module(data, "mlp-9", initial(experiment, "mlp-9"))
        shard = data.shards[report.client]
        loss = ce_loss(teacher(images(data.train, shard)), data.train.labels[shard])
        taught = stepped(teacher, loss)
        assert_weights(models["teacher"], taught, initial(experiment, "mlp-9"))
        assert isinstance(report.answer, SoftLabels)
        assert report.answer.samples.tolist() == asked.tolist()
        predicted = module(data, "mlp-9", taught)(images(data.public, asked))
        torch.testing.assert_close(
            report.answer.values[0].double(), predicted.detach(), rtol=1e-4, atol=1e-5
        )


def test_without_a_teacher_the_student_is_its_own() -> None:
    experiment = one_step()
    data = federated_data(experiment)
    asked = torch.tensor([8, 1, 30])
    results, store = run(experiment, [Revisit(), Predict("probabilities")], asked=asked)
    for report in reports(results):
        models = state(store, report.client).models
        assert set(models) == {"student"}
        logits = module(data, "mlp-8", dict(models["student"]))(images(data.public, asked))
        assert isinstance(report.answer, SoftLabels)
        assert report.answer.space == "probabilities"
        torch.testing.assert_close(
            report.answer.values[0].double(), logits.softmax(-1).detach(), rtol=1e-4, atol=1e-6
        )
        assert report.answer.num_examples.tolist() == [len(data.shards[report.client])]
        assert report.answer.clients.tolist() == [report.client]


def test_a_teacher_for_some_leaves_the_others_their_own() -> None:
    experiment = tiny(teacher="mlp-9,none,lenet")
    results, store = run(experiment, [Revisit(), Predict()], asked=ROWS)
    reports(results)
    roles = [set(state(store, k).models) for k in range(K)]
    assert roles == [{"student", "teacher"}, {"student"}, {"student", "teacher"}]


# --- Where everybody starts ----------------------------------------------------------------------


def test_all_clients_start_from_the_same_weights_which_follow_from_the_seed() -> None:
    results, _ = run(tiny(), [SendWeights()])
    for report in reports(results):
        assert isinstance(report.answer, Weights)
        sent = report.answer.by_model["mlp-8"].tensors
        for name, tensor in initial(tiny()).items():
            assert torch.equal(sent[name][0], tensor)
    other = architectures_of(federated_data(tiny())).initial_state("mlp-8", 6)
    assert not torch.equal(other["head.weight"], initial(tiny())["head.weight"])


def test_loading_replaces_the_student_and_leaves_the_teacher() -> None:
    experiment = tiny(teacher="mlp-9")
    weights = {n: torch.full_like(t, 0.25).unsqueeze(0) for n, t in initial(experiment).items()}
    part = ModelWeights(weights, torch.tensor([0]), torch.tensor([1]))
    results, store = run(
        experiment, [Load()], knowledge=Weights({"mlp-8": part}), knowledge_round=1
    )
    reports(results)
    for k in range(K):
        models = state(store, k).models
        assert all(bool((t == 0.25).all()) for t in models["student"].values())
        for name, tensor in initial(experiment, "mlp-9").items():
            assert torch.equal(models["teacher"][name], tensor)


def test_nothing_to_load_is_no_failure_and_the_wrong_thing_is_one() -> None:
    reports(run(tiny(), [Load()])[0])
    part = ModelWeights({}, torch.tensor([0]), torch.tensor([1]))
    wrong: list[Knowledge] = [Weights({"lenet": part}), received()]
    for knowledge in wrong:
        results, _ = run(tiny(), [Load()], knowledge=knowledge, knowledge_round=1)
        assert all(isinstance(r, Failure) and "weights of mlp-8" in r.reason for r in results)


def test_a_lost_state_is_a_failure_that_names_the_round() -> None:
    results, _ = run(tiny(), USUAL, base=4, round=5)
    assert [isinstance(r, Failure) and r.reason for r in results] == [
        "has no state of round 4 to start from"
    ] * K


@pytest.mark.parametrize("limit", [0, K])
def test_one_clients_lost_state_does_not_touch_the_others(limit: int) -> None:
    store = new_store(tiny(), limit)
    run(tiny(), [Revisit()], [0, 2], store=store)
    results, _ = run(tiny(), [Revisit()], base=1, round=2, store=store)
    assert [type(r) for r in results] == [ClientReport, Failure, ClientReport]
    whole, other = run(tiny(), [Revisit()])
    reports(whole)
    run(tiny(), [Revisit()], base=1, round=2, store=other)
    for k in (0, 2):
        assert_same_state(state(store, k, 2), state(other, k, 2))


# --- Knowledge is digested once ------------------------------------------------------------------


def test_knowledge_that_was_digested_is_not_digested_again() -> None:
    experiment = tiny()
    results, store = run(experiment, [Digest()], knowledge=received(), knowledge_round=3, round=4)
    assert all("loss_digest" in r.metrics for r in reports(results))
    again, _ = run(
        experiment,
        [Digest()],
        knowledge=received(),
        knowledge_round=3,
        round=5,
        base=4,
        store=store,
    )
    assert all(r.metrics == {} for r in reports(again))
    for k in range(K):
        assert_same_state(state(store, k, 4), state(store, k, 5))
    newer, _ = run(
        experiment,
        [Digest()],
        knowledge=received(),
        knowledge_round=5,
        round=6,
        base=5,
        store=store,
    )
    assert all("loss_digest" in r.metrics for r in reports(newer))
    assert state(store, 0, 6).digested == 5


def test_without_knowledge_a_digest_is_skipped() -> None:
    for public_labels in (True, False):
        experiment = tiny(public_labels=public_labels)
        results, store = run(experiment, [Digest()])
        assert all(r.metrics == {} for r in reports(results))
        assert torch.equal(
            state(store, 0).models["student"]["head.weight"], initial(experiment)["head.weight"]
        )
        assert state(store, 0).digested == 0


def test_a_term_that_needs_logits_refuses_probabilities() -> None:
    results, _ = run(
        tiny(),
        [Digest(mae_logits)],
        knowledge=received(space="probabilities"),
        knowledge_round=1,
    )
    assert all(isinstance(r, Failure) and "needs logits" in r.reason for r in results)


def test_a_term_that_needs_soft_labels_refuses_weights() -> None:
    part = ModelWeights(
        {n: t.unsqueeze(0) for n, t in initial(tiny()).items()},
        torch.tensor([0]),
        torch.tensor([1]),
    )
    results, _ = run(tiny(), [Digest()], knowledge=Weights({"mlp-8": part}), knowledge_round=1)
    assert all(isinstance(r, Failure) and "needs soft labels" in r.reason for r in results)


# --- In company and alone ------------------------------------------------------------------------


COMPANY: dict[str, dict[str, Any]] = {
    "mlp": {},
    "teacher": {"teacher": "mlp-12", "public_labels": False},
    "mixed": {"student": "mlp-8,lenet", "partition": "dirichlet"},
    "resnet": {"student": "resnet-8", "teacher": "mlp-8"},
    "augmented": {"student": "lenet", "augment": "jitter-2"},
    "odd": {"batch_size": 7, "optimizer": "sgd"},
    "lanes": {"plan": "stacked-2x2"},
    "loops": {"student": "lenet", "plan": "loopx2"},
}


@pytest.mark.parametrize(
    ("keys", "threads"),
    [
        *(pytest.param(keys, 1, id=name) for name, keys in COMPANY.items()),
        *(pytest.param(COMPANY[n], 2, id=f"{n}-2") for n in ("mlp", "resnet", "loops")),
    ],
)
def test_a_clients_numbers_do_not_depend_on_who_else_takes_part(
    keys: dict[str, Any], threads: int
) -> None:
    """Bit for bit, through two rounds; seven samples are asked for, and not all take equal steps."""
    torch.set_num_threads(threads)
    experiment = tiny(local_epochs=2, **keys)
    first: dict[str, Any] = {"asked": ROWS}
    second: dict[str, Any] = {
        "asked": ROWS,
        "round": 2,
        "base": 1,
        "knowledge": received(),
        "knowledge_round": 1,
    }
    together, store = run(experiment, USUAL, **first)
    together_again, _ = run(experiment, USUAL, store=store, **second)
    for k in (2, 1):  # where students differ, one of each
        alone, own = run(experiment, USUAL, [k], **first)
        alone_again, _ = run(experiment, USUAL, [k], store=own, **second)
        assert_same_report(alone[0], together[k])
        assert_same_report(alone_again[0], together_again[k])
        assert_same_state(state(own, k, 2), state(store, k, 2))


def test_rows_of_odd_width_stay_within_rounding_of_a_clients_own() -> None:
    """Rows of a stack that are not aligned take other kernels: bits may differ, numbers may not."""
    experiment = tiny(student="mlp-13", local_epochs=2)
    together, store = run(experiment, USUAL, asked=ROWS)
    for k, report in enumerate(reports(together)):
        alone, own = run(experiment, USUAL, [k], asked=ROWS)
        assert report.metrics["accuracy_after_revisit"] == pytest.approx(
            reports(alone)[0].metrics["accuracy_after_revisit"], abs=1 / 61 + 1e-9
        )
        for name, tensor in state(store, k).models["student"].items():
            torch.testing.assert_close(
                state(own, k).models["student"][name], tensor, rtol=1e-5, atol=1e-5
            )


def test_results_come_in_the_order_of_the_orders() -> None:
    forth, _ = run(tiny(student="mlp-8,lenet"), USUAL, [0, 1, 2], asked=ROWS)
    back, _ = run(tiny(student="mlp-8,lenet"), USUAL, [2, 1, 0], asked=ROWS)
    assert [r.client for r in back] == [2, 1, 0]
    for one, other in zip(forth, reversed(back), strict=True):
        assert_same_report(one, other)


def test_clients_have_draws_of_their_own_in_every_round_and_phase() -> None:
    """The same images for all, so that only the draws can differ."""
    experiment = tiny(local_epochs=1, batch_size=5)
    data = federated_data(experiment)
    data = replace(data, shards=(data.shards[0],) * K)

    def weight(number: int, client: int, phase: str = "revisit") -> tuple[float, ...]:
        fit = Fit(phase, private={"ce": 1.0})
        _, store = run(experiment, [fit], [client], data=data, round=number)
        bias = state(store, client, number).models["student"]["head.bias"]
        return tuple(bias.tolist())

    drawn = {weight(1, 0), weight(2, 0), weight(1, 1), weight(1, 0, "again")}
    assert len(drawn) == 4
    assert weight(1, 0) == weight(1, 0)


def test_personal_knowledge_is_digested_by_its_recipient_alone() -> None:
    experiment = tiny()
    own = {k: received(seed=k) for k in range(K)}
    instructions = [
        Instruction(k, 1, INITIAL, (Digest(),), NOTHING, own[k], knowledge_round=1)
        for k in range(K)
    ]
    store = new_store(experiment)
    results = execute(experiment, federated_data(experiment), instructions, store)
    for k, result in enumerate(results):
        alone, other = run(experiment, [Digest()], [k], knowledge=own[k], knowledge_round=1)
        assert_same_report(alone[0], result)
        assert_same_state(state(other, k), state(store, k))


# --- One of three fails --------------------------------------------------------------------------


def raised(text: str) -> str:
    """Return where the tools raise an error of this text, as a reason says it."""
    lines = Path(federation_tools.__file__).read_text(encoding="utf-8").splitlines()
    (number,) = (n for n, line in enumerate(lines, 1) if f'raise ArithmeticError("{text}' in line)
    return f"(federation_tools.py, line {number})"


def assert_only_the_second_fails(
    experiment: Experiment, data: FederatedData, phases: Sequence[Phase], reason: str
) -> None:
    """Check the reason of client 1, and the others' numbers against a run without it."""
    common: dict[str, Any] = {
        "data": data,
        "asked": ROWS,
        "knowledge": received(),
        "knowledge_round": 1,
    }
    results, store = run(experiment, phases, round=2, **common)
    assert [type(r) for r in results] == [ClientReport, Failure, ClientReport]
    assert results[1] == Failure(1, reason)
    assert not has(store, 1, 2)
    others, their_store = run(experiment, phases, [0, 2], round=2, **common)
    for k, other in zip((0, 2), others, strict=True):
        assert_same_report(results[k], other)
        assert_same_state(state(store, k, 2), state(their_store, k, 2))


@pytest.mark.parametrize("student", ["mlp-8", "lenet"], ids=["stacked", "loop"])
def test_a_client_without_data_fails_alone(student: str) -> None:
    experiment = tiny(student=student)
    data = federated_data(experiment)
    data = replace(data, shards=(data.shards[0], NOTHING, data.shards[2]))
    assert_only_the_second_fails(
        experiment, data, USUAL, "model 0 of the cohort has no private samples"
    )


def test_a_client_whose_term_raises_fails_alone() -> None:
    """Client 1 holds all the nines."""
    experiment = tiny(plan="loop", client_code="federation_tools")
    data = federated_data(experiment)
    assert data.train.labels is not None
    private = torch.cat(data.shards)
    nines = data.train.labels[private] == 9
    first, third = private[~nines].chunk(2)
    data = replace(data, shards=(first, private[nines], third))
    phases: list[Phase] = [Digest(), Revisit({refuses_nines: 1.0}), Predict()]
    assert_only_the_second_fails(
        experiment,
        data,
        phases,
        f"ArithmeticError: a nine of all things {raised('a nine')}",
    )


def test_a_client_whose_model_raises_fails_alone() -> None:
    """Client 1 holds an image that is white all over."""
    experiment = tiny(plan="loop", student="federation_tools:fragile")
    data = federated_data(experiment)
    pixels = data.train.pixels.clone()
    pixels[data.shards[1][3]] = 255
    data = replace(data, train=replace(data.train, pixels=pixels))
    assert_only_the_second_fails(
        experiment, data, USUAL, f"ArithmeticError: blinded {raised('blinded')}"
    )


def test_code_that_a_client_does_not_allow_is_a_failure_that_says_so() -> None:
    phases = [Revisit({"federation_tools:refuses_nines": 1.0})]
    for result in run(tiny(), phases)[0]:
        assert isinstance(result, Failure)
        assert "federation_tools:refuses_nines" in result.reason
        assert "client-code" in result.reason


def test_samples_that_do_not_exist_are_a_failure() -> None:
    for result in run(tiny(), [Predict()], asked=torch.tensor([0, P]))[0]:
        assert isinstance(result, Failure)
        assert result.reason


# --- Evaluation ----------------------------------------------------------------------------------


def test_accuracy_is_the_share_of_test_images_that_are_right() -> None:
    experiment = tiny(local_epochs=4, partition="dirichlet", student="mlp-8,lenet")
    data = federated_data(experiment)
    results, store = run(experiment, [Revisit()])
    assert data.test.labels is not None
    assert data.train.labels is not None
    for report in reports(results):
        name = experiment.student_of(report.client)
        model = module(data, name, dict(state(store, report.client).models["student"])).eval()
        predicted = model(images(data.test)).argmax(-1)
        right = (predicted == data.test.labels).tolist()
        accuracy = sum(right) / len(right)
        assert report.metrics["accuracy_after_revisit"] == pytest.approx(accuracy, abs=1e-12)
        # Own accuracy: by class on the test set, weighted by the client's own classes.
        mine = data.train.labels[data.shards[report.client]].tolist()
        by_class = []
        for label in range(C):
            of_class = [
                r for r, t in zip(right, data.test.labels.tolist(), strict=True) if t == label
            ]
            by_class.append(sum(of_class) / len(of_class))
        own = sum(by_class[label] for label in mine) / len(mine)
        assert report.metrics["own_accuracy"] == pytest.approx(own, abs=1e-12)


def test_agreement_is_the_share_of_digested_labels_that_the_student_now_gives() -> None:
    experiment = tiny(distill_epochs=30, alpha=1.0)
    data, knowledge = federated_data(experiment), received()
    results, store = run(experiment, [Digest()], knowledge=knowledge, knowledge_round=1)
    for report in reports(results):
        model = module(data, "mlp-8", dict(state(store, report.client).models["student"]))
        predicted = model(images(data.public, ROWS)).argmax(-1)
        agree = (predicted == knowledge.values[0].argmax(-1)).double().mean()
        assert report.metrics["agreement"] == pytest.approx(float(agree))
        assert 0.3 < report.metrics["agreement"] <= 1


def test_testing_is_done_when_it_is_asked_for() -> None:
    def names(evaluate: str) -> set[str]:
        results, _ = run(
            tiny(), USUAL, asked=ROWS, knowledge=received(), knowledge_round=1, evaluate=evaluate
        )
        (metrics,) = {frozenset(r.metrics) for r in reports(results)}
        return set(metrics)

    losses = {
        f"{of}_{phase}" for of in ("loss", "gradient_norm") for phase in ("digest", "revisit")
    }
    assert names("none") == losses
    assert names("phases") == losses | {
        "accuracy_after_digest", "accuracy_after_revisit", "own_accuracy", "agreement"
    }  # fmt: skip
    assert {"accuracy", "own_accuracy"} <= names("end")
    assert not any(name.startswith("accuracy_after") for name in names("end"))


def test_after_the_last_training_phase_alone() -> None:
    """The digest is tested, and compared with what it digested, only where it comes last."""

    def names(*phases: Phase, base: int = INITIAL, **instruction: Any) -> set[str]:
        results, _ = run(tiny(), phases, asked=ROWS, base=base, evaluate="last", **instruction)
        (metrics,) = {frozenset(r.metrics) for r in reports(results)}
        return {name for name in metrics if not name.startswith(("loss_", "gradient_norm_"))}

    news: dict[str, Any] = {"knowledge": received(), "knowledge_round": 1}
    assert names(*USUAL, **news) == {"accuracy_after_revisit", "own_accuracy"}
    assert names(Revisit(), Digest(), Predict(), **news) == {
        "accuracy_after_digest", "own_accuracy", "agreement"
    }  # fmt: skip
    assert names(Predict(), Revisit(), SendWeights()) == {"accuracy_after_revisit", "own_accuracy"}
    assert names(Predict()) == set()


def test_a_digest_without_news_is_not_the_last_to_train() -> None:
    results, _ = run(tiny(), [Revisit(), Digest(), Predict()], asked=ROWS, evaluate="last")
    for report in reports(results):
        assert "accuracy_after_revisit" in report.metrics


def test_accuracy_after_the_last_phase_is_what_it_is_after_all_of_them() -> None:
    instructions: dict[str, Any] = {"asked": ROWS, "knowledge": received(), "knowledge_round": 1}
    every, _ = run(tiny(), USUAL, evaluate="phases", **instructions)
    last, _ = run(tiny(), USUAL, evaluate="last", **instructions)
    for one, other in zip(reports(every), reports(last), strict=True):
        skipped = {"accuracy_after_digest", "agreement"}
        assert other.metrics == {n: v for n, v in one.metrics.items() if n not in skipped}


def test_testing_does_not_change_what_is_learnt() -> None:
    stores = []
    for evaluate in ("none", "phases", "last", "end"):
        _, store = run(
            tiny(student="resnet-8"),
            USUAL,
            asked=ROWS,
            knowledge=received(),
            knowledge_round=1,
            evaluate=evaluate,
        )
        stores.append(store)
    for k in range(K):
        assert_same_state(state(stores[0], k), state(stores[1], k))
        assert_same_state(state(stores[0], k), state(stores[2], k))
        assert_same_state(state(stores[0], k), state(stores[3], k))


def test_seconds_are_those_of_the_phases() -> None:
    results, _ = run(tiny(), USUAL, asked=ROWS)
    for report in reports(results):
        assert list(report.seconds) == ["digest", "revisit", "predict"]
        assert all(spent >= 0 for spent in report.seconds.values())


@pytest.mark.parametrize("plan", ["stacked", "stacked-1x2", "loop"])
def test_a_profile_names_the_parts_of_the_phases_and_changes_nothing(plan: str) -> None:
    experiment = tiny(plan=plan)
    plain, _ = run(experiment, USUAL, asked=ROWS)
    results, _ = run(experiment.replace(profile=True), USUAL, asked=ROWS)
    parts = ("data", "forward", "backward", "optimizer", "evaluate", "predict")
    for one, report in zip(reports(plain), reports(results), strict=True):
        assert list(report.seconds)[:3] == list(one.seconds)
        assert set(list(report.seconds)[3:]) == {f"part {name}" for name in parts}
        assert report.metrics == one.metrics


# --- States --------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [0, 1, K])
def test_an_order_can_be_repeated_from_its_base(limit: int) -> None:
    """After a lost round the next one starts from the same state."""
    experiment = tiny()
    store = new_store(experiment, limit)
    run(experiment, [Revisit()], store=store)
    lost, _ = run(experiment, [Revisit()], base=1, round=2, store=store)
    next_one, _ = run(experiment, [Revisit()], base=1, round=3, store=store)
    again, other = run(experiment, [Revisit()])
    direct, _ = run(experiment, [Revisit()], base=1, round=3, store=other)
    reports(lost)
    reports(again)
    for one, two in zip(next_one, direct, strict=True):
        assert_same_report(one, two)


@pytest.mark.parametrize("limit", [1, 2, K])
def test_states_in_memory_and_states_on_disk_give_the_same_run(limit: int) -> None:
    """Two clients share a stack, and the third has models of its own."""
    experiment = tiny(student="resnet-8,mlp-8,resnet-8", teacher="mlp-9,none,mlp-9")
    disk, memory = new_store(experiment, 0), new_store(experiment, limit)
    for number in (1, 2, 3):
        instruction: dict[str, Any] = {"asked": ROWS, "round": number, "base": number - 1}
        if number > 1:
            instruction |= {"knowledge": received(seed=number), "knowledge_round": number - 1}
        one, _ = run(experiment, USUAL, store=disk, **instruction)
        two, _ = run(experiment, USUAL, store=memory, **instruction)
        for a, b in zip(one, two, strict=True):
            assert_same_report(a, b)
    for k in range(K):
        assert_same_state(state(disk, k, 3), state(memory, k, 3))
        assert_same_state(state(disk, k, 2), state(memory, k, 2))
        assert not has(memory, k, 1)


def test_states_on_disk_hold_no_pickle_and_leave_no_scraps(tmp_path: Path) -> None:
    experiment = tiny(student="mlp-8,mlp-7")
    files = StateFiles(tmp_path / "clients", experiment.architecture_period)
    run(experiment, USUAL, asked=ROWS, store=ResidentStates(files, K))
    found = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    assert found == ["clients/0-0.safetensors", "clients/1-0.safetensors"]


@pytest.mark.parametrize("limit", [0, K])
def test_what_is_stored_is_not_what_is_trained_on(limit: int) -> None:
    """A stack may not write into a state that another round may start from."""
    experiment = tiny(student="resnet-8")
    store = new_store(experiment, limit)
    run(experiment, [Revisit()], store=store)
    before = {n: t.clone() for n, t in state(store, 0).models["student"].items()}
    run(experiment, [Revisit(epochs=2), SendWeights()], base=1, round=2, store=store)
    taken = store.take(dict.fromkeys(range(K), 1), torch.device("cpu")).models["student"]
    moved = state(store, 0, 2).models["student"]
    assert not torch.equal(moved["head.bias"], before["head.bias"])
    for name, tensor in state(store, 0, 1).models["student"].items():
        assert torch.equal(tensor, before[name])
        assert torch.equal(taken[name][0], before[name])


def test_temperature_is_the_experiments_unless_a_phase_has_its_own() -> None:
    fit = Fit("digest", public={"kl": 1.0}, numbers={"tau": 7.0})
    keys: dict[str, Any] = {"knowledge": received(), "knowledge_round": 1}
    _, by_phase = run(one_step(tau=2.0), [fit], **keys)
    _, by_experiment = run(one_step(tau=7.0), [Fit("digest", public={"kl": 1.0})], **keys)
    assert_same_state(state(by_phase, 0), state(by_experiment, 0))


def test_reference_agrees_with_torchs_own_losses() -> None:
    """The reference above is itself checked, once."""
    generator = torch.Generator().manual_seed(3)
    teacher, student = torch.randn(2, 7, C, generator=generator, dtype=torch.float64) * 3
    labels = torch.randint(0, C, (7,), generator=generator)
    torch.testing.assert_close(ce_loss(student, labels), F.cross_entropy(student, labels))
    soft = F.kl_div((student / 2).log_softmax(-1), (teacher / 2).softmax(-1), reduction="batchmean")
    torch.testing.assert_close(kl_loss(teacher, student, 2.0), 4 * soft)


def test_a_term_that_vmap_refuses_is_run_client_by_client() -> None:
    """``.item()`` cannot be mapped; one by one the numbers are those of the mean absolute error."""
    experiment = tiny(plan="auto", client_code="federation_tools")
    data = federated_data(experiment)
    values = torch.randn(1, len(data.public), 10, generator=torch.Generator().manual_seed(3))
    instructions = {
        name: [
            Instruction(
                k, 2, INITIAL, (Fit("digest", public={name: 1.0}),), torch.empty(0).long(),
                SoftLabels(values, "logits"), 1,
            )
            for k in range(3)
        ]
        for name in ("mae_logits", "federation_tools:mae_by_item")
    }  # fmt: skip
    easy = execute(experiment, data, instructions["mae_logits"], new_store(experiment))
    hard = execute(
        experiment, data, instructions["federation_tools:mae_by_item"], new_store(experiment)
    )
    for once, again in zip(easy, hard, strict=True):
        assert isinstance(once, ClientReport)
        assert isinstance(again, ClientReport), again
        assert again.metrics["loss_digest"] == pytest.approx(once.metrics["loss_digest"], rel=1e-5)

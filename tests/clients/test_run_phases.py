"""A client executing phases: its numbers against a float64 step written here, alone and in company.

One step of SGD on a batch that holds everything needs no random draw, so that the reference below
knows nothing of the client but the formula in the paper.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from executing import (
    ROWS,
    USUAL,
    C,
    K,
    assert_same_state,
    images,
    initial,
    module,
    received,
    reports,
    run,
    state,
)
from federation_tools import P, tiny
from torch import Tensor, nn
from torch.nn import functional as F

from fedkd.clients.instructions import Failure
from fedkd.data.federated import federated_data
from fedkd.experiment import Experiment
from fedkd.knowledge import ModelWeights, SoftLabels, Space, Weights
from fedkd.losses import mae_logits
from fedkd.phases import Digest, Fit, Predict, Revisit

EVERYTHING = 1000
"""A batch size that holds every shard and the whole public set."""


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


# --- The reference: one step in float64 ----------------------------------------------------------


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


# --- States --------------------------------------------------------------------------------------


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

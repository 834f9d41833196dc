"""What clients do beyond training on soft labels: procedures, resets, means by class, features."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from federation_tools import C, P, execute, federate, tiny
from torch import Tensor, nn

from fedkd.clients.instructions import ClientReport, Instruction
from fedkd.clients.memories import Memory
from fedkd.clients.state_files import StateFiles
from fedkd.clients.state_store import ResidentStates
from fedkd.data.federated import federated_data
from fedkd.errors import FedkdError
from fedkd.federation.server import Replies, Server
from fedkd.knowledge import ClassMeans, Knowledge, SoftLabels
from fedkd.losses import Step, term
from fedkd.phases import (
    Apply,
    ClassifyByMeans,
    Digest,
    Fit,
    LocalClient,
    MeanByClass,
    Phase,
    Predict,
    Reset,
    Revisit,
    procedure,
)
from fedkd.strategy import DistillationStrategy, Facts
from fedkd.training.architectures import architectures_of

K = 3
HERE = __name__
NO_FACTS = Facts(paper="none", up="0", down="0")


@procedure
def count_calls(client: LocalClient, start: float) -> None:
    """Count in the client's state, from `start`; mark the first of its public samples so often."""
    calls = client.state.get("calls", torch.tensor(start)) + 1
    client.state["calls"] = calls
    client.state["marked"] = torch.arange(len(client.public)) < calls


@procedure
def draw_from_torch(client: LocalClient) -> None:
    """Draw what depends on who else draws."""
    client.state["noise"] = torch.rand(3)


@procedure
def draw_from_numpy(client: LocalClient) -> None:
    """The same."""
    client.state["noise"] = torch.tensor(np.random.normal(size=3))


@procedure
def keep_last(client: LocalClient) -> None:
    """Of several sets of soft labels keep the last."""
    if client.received is not None:
        last = client.received
        client.received = SoftLabels(last.values[-1:], last.space, last.samples)


@procedure
def look(client: LocalClient) -> None:
    """Keep what there is to see."""
    drawn = torch.rand(3, generator=client.generator("look"))
    client.state |= {
        "images": client.images.double().sum(),
        "labels": client.labels.double().sum(),
        "public": client.public.double().sum(),
        "logits": client.predict(torch.tensor([5, 3])),
        "drawn": drawn,
    }


@procedure
def leave_a_tensor(client: LocalClient) -> None:
    client.received = torch.zeros(3)  # type: ignore[assignment]


def not_a_procedure(client: LocalClient) -> None:
    raise AssertionError("never called")


@term(needs="class-means")
def towards_mean(step: Step) -> Tensor:
    """Squared distance of logits to the class's mean; 0 where it is absent."""
    assert step.class_means is not None
    assert step.class_counts is not None
    there = (step.class_counts[step.labels] > 0).to(step.logits.dtype)
    return there * (step.logits - step.class_means[step.labels]).square().sum(-1)


@term(needs=None, needs_features=True)
def small_features(step: Step) -> Tensor:
    assert step.features is not None
    return step.features.square().mean(-1)


def make_store(folder: Any) -> ResidentStates:
    return ResidentStates(StateFiles(folder), 0)


def ordered(
    store: ResidentStates,
    phases: list[Phase],
    *,
    round: int = 1,
    knowledge: Knowledge | None = None,
    asked: Tensor | None = None,
    evaluate: Any = "none",
    **keys: Any,
) -> list[Any]:
    """Have all clients execute phases, from the state of the round before."""
    experiment = tiny(client_code=HERE, **keys)
    nothing = torch.empty(0, dtype=torch.int64)
    instructions = [
        Instruction(
            client=k,
            round=round,
            base=round - 1,
            phases=tuple(phases),
            asked=nothing if asked is None else asked,
            knowledge=knowledge,
            knowledge_round=round - 1,
            evaluate=evaluate,
        )
        for k in range(K)
    ]
    return execute(experiment, federated_data(experiment), instructions, store)


def memory(store: ResidentStates, client: int, round: int) -> Memory:
    return store.memories.load({client: round})[client]


def labels(seed: int = 1, sets: int = 1) -> SoftLabels:
    drawn = torch.randn(sets, P, C, generator=torch.Generator().manual_seed(seed))
    return SoftLabels(drawn.softmax(-1), "probabilities")


# --- Procedures ----------------------------------------------------------------------------------


def test_a_procedures_state_is_kept_by_round(tmp_path: Any) -> None:
    store = make_store(tmp_path)
    phases: list[Phase] = [Apply(count_calls, {"start": 10.0}), Revisit()]
    for round in (1, 2):
        assert all(not hasattr(r, "reason") for r in ordered(store, phases, round=round))
    for client in range(K):
        assert memory(store, client, 1)["own"]["calls"] == 11
        assert memory(store, client, 2)["own"]["calls"] == 12
    ordered(store, phases, round=2)  # once more from round 1: a reply was lost
    assert memory(store, 0, 2)["own"]["calls"] == 12


def test_a_memory_outlives_rounds_that_do_not_touch_it(tmp_path: Any) -> None:
    store = make_store(tmp_path)
    ordered(store, [Apply(count_calls, {"start": 0.0})])
    ordered(store, [Revisit()], round=2)
    ordered(store, [Revisit()], round=3)
    assert memory(store, 1, 3)["own"]["calls"] == 1


def test_a_client_answers_only_the_samples_that_its_state_marks(tmp_path: Any) -> None:
    phases: list[Phase] = [Apply(count_calls, {"start": 2.0}), Predict(only="marked")]
    asked = torch.tensor([4, 2, 0, 31])
    reports = ordered(make_store(tmp_path), phases, asked=asked)
    every = ordered(make_store(tmp_path / "all"), [Predict()], asked=asked)
    for report, whole in zip(reports, every, strict=True):
        assert report.answer.samples.tolist() == [2, 0]
        assert torch.equal(report.answer.values, whole.answer.values[:, [1, 2]])


def test_a_procedure_sees_its_own_client_alone(tmp_path: Any) -> None:
    store = make_store(tmp_path)
    ordered(store, [Revisit(), Apply(look), Predict()], asked=torch.tensor([5, 3]))
    again = make_store(tmp_path / "again")
    reports = ordered(again, [Revisit(), Apply(look), Predict()], asked=torch.tensor([5, 3]))
    experiment = tiny()
    data = federated_data(experiment)
    draws = set()
    for client, report in enumerate(reports):
        seen = memory(store, client, 1)["own"]
        shard = data.shards[client]
        assert data.train.labels is not None
        assert float(seen["images"]) == pytest.approx(float(data.train.batch(shard).double().sum()))
        assert float(seen["labels"]) == float(data.train.labels[shard].sum())
        assert float(seen["public"]) == pytest.approx(
            float(data.public.batch(torch.arange(P)).double().sum())
        )
        assert torch.allclose(seen["logits"], report.answer.values[0], atol=1e-6)
        assert torch.equal(seen["drawn"], memory(again, client, 1)["own"]["drawn"])
        draws.add(tuple(seen["drawn"].tolist()))
    assert len(draws) == K


def test_several_sets_of_labels_are_digested_as_the_one_that_was_chosen(tmp_path: Any) -> None:
    sets = labels(sets=3)
    chosen: list[Phase] = [Apply(keep_last), Fit("digest", public={"kl": 1.0}), Predict()]
    alone: list[Phase] = [Fit("digest", public={"kl": 1.0}), Predict()]
    last = SoftLabels(sets.values[-1:], sets.space)
    base = [Revisit()]
    first, second = make_store(tmp_path / "1"), make_store(tmp_path / "2")
    for store in (first, second):
        ordered(store, list(base))
    asked = torch.arange(P)
    ours = ordered(first, chosen, round=2, knowledge=sets, asked=asked)
    theirs = ordered(second, alone, round=2, knowledge=last, asked=asked)
    for one, other in zip(ours, theirs, strict=True):
        assert one.metrics["loss_digest"] == other.metrics["loss_digest"]
        assert torch.equal(one.answer.values, other.answer.values)


@pytest.mark.parametrize(
    ("phases", "knowledge", "reason"),
    [
        ([Fit("digest", public={"kl": 1.0})], labels(sets=2), "must choose among them"),
        ([Apply(leave_a_tensor)], None, "sets received to a Tensor"),
        (
            [Apply(f"{HERE}:not_a_procedure")],
            None,
            "is not a procedure: declare it with @procedure",
        ),
        ([Apply("os:system")], None, "only runs code of"),
        ([Predict(only="marked")], None, "no such tensor"),
        ([Apply(count_calls, {"stop": 1})], None, r"TypeError.*stop"),
        ([Apply(draw_from_torch)], None, "draws from a global generator .* use client.generator"),
        ([Apply(draw_from_numpy)], None, "draws from a global generator .* use client.generator"),
    ],
)
def test_what_a_client_cannot_do_is_its_failure_and_says_why(
    phases: list[Phase], knowledge: Knowledge | None, reason: str, tmp_path: Any
) -> None:
    store = make_store(tmp_path)
    ordered(store, [Revisit()])
    results = ordered(store, phases, round=2, knowledge=knowledge, asked=torch.tensor([3]))
    for result in results:
        assert hasattr(result, "reason"), result
        assert re.search(reason, result.reason), result.reason


# --- Reset ---------------------------------------------------------------------------------------


def test_after_a_reset_a_student_is_as_new_and_digests_what_it_knew(tmp_path: Any) -> None:
    store, fresh = make_store(tmp_path / "1"), make_store(tmp_path / "2")
    told, asked = labels(), torch.arange(P)
    ordered(store, [Revisit()])
    ordered(store, [Digest(), Revisit()], round=2, knowledge=told)
    phases: list[Phase] = [Reset(), Fit("digest", public={"kl": 1.0}), Predict()]
    ordered(fresh, [Predict()], asked=asked)  # initial weights, saved as round 1
    ordered(fresh, [Predict()], round=2, asked=asked)
    ours = ordered(store, phases, round=3, knowledge=told, asked=asked)
    theirs = ordered(fresh, phases[1:], round=3, knowledge=told, asked=asked)
    for one, other in zip(ours, theirs, strict=True):
        assert one.metrics["loss_digest"] == other.metrics["loss_digest"]
        assert torch.equal(one.answer.values, other.answer.values)


# --- Means by class ------------------------------------------------------------------------------


@pytest.mark.parametrize("of", ["probabilities", "logits", "features"])
@pytest.mark.parametrize("plan", ["loop", "stacked"])
def test_means_by_class_are_those_of_a_loop_over_images(of: Any, plan: str, tmp_path: Any) -> None:
    store = make_store(tmp_path)
    reports = ordered(store, [Revisit(), MeanByClass(of)], plan=plan)
    data = federated_data(tiny())
    for client, report in enumerate(reports):
        state = store.files.load({client: 1}).models["student"]
        model: Any = architectures_of(data).model("mlp-8").double().eval()
        model.load_state_dict({name: tensor[0].double() for name, tensor in state.items()})
        rows: dict[int, list[Tensor]] = {}
        for row in data.shards[client].tolist():
            image = data.train.batch(torch.tensor([row])).double()
            features = model.body(image)
            output = features if of == "features" else model.head(features)
            output = output.softmax(-1) if of == "probabilities" else output
            assert data.train.labels is not None
            rows.setdefault(int(data.train.labels[row]), []).append(output[0].detach())
        answer = report.answer
        assert isinstance(answer, ClassMeans)
        assert answer.of == of
        for label in range(C):
            mine = rows.get(label, [])
            assert int(answer.counts[0, label]) == len(mine)
            expected = torch.stack(mine).mean(0) if mine else torch.zeros(answer.values.shape[-1])
            assert torch.allclose(answer.values[0, label].double(), expected.double(), atol=1e-5)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("plan", ["loop", "stacked"])
def test_a_term_on_class_means_trains_as_plain_pytorch_does(
    plan: str, shared: bool, tmp_path: Any
) -> None:
    """One step over the whole shard, against autograd in float64."""
    drawn = torch.Generator().manual_seed(3)
    counts = torch.tensor([[4, 0, 1, 7, 2, 0, 3, 1, 5, 2]])
    told = [
        ClassMeans(torch.randn(1, C, C, generator=drawn), counts, torch.tensor([0]), "logits")
        for _ in range(K)
    ]
    mine = [told[0]] * K if shared else told
    experiment = tiny(
        client_code=HERE, batch_size=200, optimizer="sgd", learning_rate=0.05, plan=plan
    )
    data = federated_data(experiment)
    fit = Revisit({"ce": 1.0, towards_mean: 0.25})
    nothing = torch.empty(0, dtype=torch.int64)
    instructions = [Instruction(k, 1, 0, (fit,), nothing, mine[k], 1, "none") for k in range(K)]
    store = make_store(tmp_path)
    execute(experiment, data, instructions, store)
    for client in range(K):
        model = architectures_of(data).model("mlp-8").double()
        start = architectures_of(data).initial_state("mlp-8", experiment.seed)
        model.load_state_dict({name: tensor.double() for name, tensor in start.items()})
        shard = data.shards[client]
        assert data.train.labels is not None
        y, z = data.train.labels[shard], model(data.train.batch(shard).double())
        means = mine[client].values[0].double()
        there = (counts[0][y] > 0).double()
        distance = there * (z - means[y]).square().sum(-1)
        loss = nn.functional.cross_entropy(z, y) + 0.25 * distance.mean()
        loss.backward()
        after = store.files.load({client: 1}).models["student"]
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            expected = parameter.detach() - 0.05 * parameter.grad
            assert torch.allclose(after[name][0].double(), expected, atol=2e-6), name


def test_a_term_on_class_means_is_skipped_until_there_are_some(tmp_path: Any) -> None:
    with_term = ordered(make_store(tmp_path / "1"), [Revisit({"ce": 1.0, towards_mean: 9.0})])
    without = ordered(make_store(tmp_path / "2"), [Revisit()])
    for one, other in zip(with_term, without, strict=True):
        assert one.metrics["loss_revisit"] == other.metrics["loss_revisit"]


@pytest.mark.parametrize("plan", ["loop", "stacked"])
def test_features_are_what_the_head_takes(plan: str, tmp_path: Any) -> None:
    """One step of a loss on features alone moves the body and leaves the head."""
    experiment: dict[str, Any] = {
        "batch_size": 200,
        "optimizer": "sgd",
        "learning_rate": 0.1,
        "plan": plan,
    }
    store = make_store(tmp_path)
    ordered(store, [Revisit({small_features: 1.0})], **experiment)
    start = architectures_of(federated_data(tiny())).initial_state("mlp-8", tiny().seed)
    after = store.files.load({0: 1}).models["student"]
    for name, tensor in start.items():
        assert torch.equal(after[name][0], tensor) == name.startswith("head"), name


def test_a_model_without_a_body_has_no_features(tmp_path: Any) -> None:
    results = ordered(
        make_store(tmp_path),
        [Revisit({small_features: 1.0})],
        student="federation_tools:choosy",
        plan="loop",
    )
    assert all("has no features" in result.reason for result in results)


@pytest.mark.parametrize("of", ["probabilities", "features"])
def test_a_client_can_be_tested_by_the_nearest_class_mean(of: Any, tmp_path: Any) -> None:
    """Against a loop over images and classes; a class without a mean is never predicted."""
    width = C if of == "probabilities" else 8
    drawn = torch.randn(1, C, width, generator=torch.Generator().manual_seed(5))
    counts = torch.tensor([[3, 0, 2, 5, 7, 1, 0, 2, 3, 11]])
    means = ClassMeans(
        drawn.softmax(-1) if of == "probabilities" else drawn, counts, torch.tensor([0]), of
    )
    store = make_store(tmp_path)
    experiment = tiny(client_code=HERE)
    data = federated_data(experiment)
    phases = (ClassifyByMeans(), Revisit())
    nothing = torch.empty(0, dtype=torch.int64)
    instructions = [Instruction(k, 1, 0, phases, nothing, means, 1, "phases") for k in range(K)]
    reports = execute(experiment, data, instructions, store)
    for client, report in enumerate(reports):
        assert isinstance(report, ClientReport)
        state = store.files.load({client: 1}).models["student"]
        model: Any = architectures_of(data).model("mlp-8").eval()
        model.load_state_dict({name: tensor[0] for name, tensor in state.items()})
        right = 0
        assert data.test.labels is not None
        for row, label in enumerate(data.test.labels.tolist()):
            with torch.no_grad():
                features = model.body(data.test.batch(torch.tensor([row])))
            output = features if of == "features" else model.head(features).softmax(-1).detach()
            gaps = {
                c: float((output[0] - means.values[0, c]).square().sum())
                for c in range(C)
                if counts[0, c]
            }
            right += min(gaps, key=lambda c: gaps[c]) == label
        assert report.metrics["accuracy_after_revisit"] == pytest.approx(right / len(data.test))


def test_without_class_means_a_client_is_tested_by_its_head(tmp_path: Any) -> None:
    plain = ordered(make_store(tmp_path / "1"), [Revisit()], evaluate="phases")
    asked = ordered(make_store(tmp_path / "2"), [ClassifyByMeans(), Revisit()], evaluate="phases")
    for one, other in zip(plain, asked, strict=True):
        assert one.metrics == other.metrics


def test_fedproto_ends_with_the_prototypes_and_fd_with_nothing() -> None:
    proto = federate(tiny(strategy="FedProto", num_server_rounds=2))
    assert proto.exchanges[-1].instructions[0].phases == (ClassifyByMeans(),)
    assert isinstance(proto.exchanges[-1].instructions[0].knowledge, ClassMeans)
    alone = federate(tiny(strategy="FD", num_server_rounds=2))
    assert alone.exchanges[-1].instructions[0].phases == ()
    assert alone.exchanges[-1].instructions[0].knowledge is None


# --- In a federation -----------------------------------------------------------------------------


class Gathering(DistillationStrategy):
    """Hand on the class means of all, each client's neighbour's to it."""

    facts = NO_FACTS

    def phases(self, round: int) -> list[Phase]:
        return [Revisit({"ce": 1.0, towards_mean: 0.1}), MeanByClass("logits")]

    def update(self, replies: Replies, server: Server) -> Knowledge | None:
        return replies.class_means

    def personalise(self, knowledge: Knowledge, client: int, server: Server) -> Knowledge:
        assert isinstance(knowledge, ClassMeans)
        row = (client + 1) % K
        return ClassMeans(
            knowledge.values[row : row + 1],
            knowledge.counts[row : row + 1],
            knowledge.clients[row : row + 1],
            knowledge.of,
        )


def test_class_means_travel_both_ways() -> None:
    done = federate(tiny(num_server_rounds=2, client_code=HERE), strategy=Gathering())
    first, second = done.exchanges[0], done.exchanges[1]
    for client in range(K):
        received = second.instructions[client].knowledge
        sent = first.report((client + 1) % K).answer
        assert isinstance(received, ClassMeans)
        assert isinstance(sent, ClassMeans)
        assert torch.equal(received.values, sent.values)
        assert torch.equal(received.counts, sent.counts)
    assert done.rows[1]["bytes_up_by_client"] == [C * C * 4 + C * 4] * K
    assert done.rows[1]["bytes_up_by_tensor"] == {"values": K * C * C * 4, "counts": K * C * 4}


def test_students_whose_features_cannot_be_averaged_are_refused(tmp_path: Any) -> None:
    from fedkd.engines.preflight import check

    with pytest.raises(FedkdError, match=r"mlp-8 has 8.*mlp-5 has 5|mlp-5 has 5.*mlp-8 has 8"):
        check(tiny(strategy="FedProto", student="mlp-8,mlp-5"))


# --- What is refused before anything runs ---------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Revisit(model="techer"), "model = 'techer'.*'teacher'"),  # type: ignore[arg-type]
        (lambda: Fit("digest", public={"ce": "aplha"}), "coefficient 'aplha' of ce"),  # type: ignore[dict-item]
        (lambda: Fit("digest", public={"ce": float("nan")}), "coefficient nan"),
        (lambda: Revisit(epochs=0), "epochs = 0"),
        (lambda: Revisit(numbers={"mu": float("inf")}), "mu = inf"),
        (lambda: Predict("probability"), "space = 'probability'"),  # type: ignore[arg-type]
        (lambda: MeanByClass("logit"), "of = 'logit'"),  # type: ignore[arg-type]
        (lambda: Apply(count_calls, {"start": torch.ones(2)}), "numbers of apply"),  # type: ignore[dict-item]
        (lambda: Apply(not_a_procedure), "neither a loss term"),  # type: ignore[arg-type]
    ],
)
def test_a_phase_that_makes_no_sense_cannot_be_made(make: Any, reason: str) -> None:
    with pytest.raises(FedkdError, match=reason):
        make()


class Asking(DistillationStrategy):
    """Say what a test wants."""

    facts = NO_FACTS
    said: str = "two"

    def phases(self, round: int) -> list[Phase]:
        if self.said == "two":
            return [Predict(), MeanByClass()]
        if self.said == "numbers":
            return [Apply(count_calls, {"strat": 1.0}), Predict()]
        return [Fit("digest", public={towards_mean: 1.0}), Predict()]


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("two", "Predict and MeanByClass: a client answers once"),
        ("numbers", r"numbers of apply: .*missing.*start"),
        ("public", "needs class means, which public samples do not have"),
    ],
)
def test_a_strategy_that_no_client_could_follow_is_refused_before_any_work(
    said: str, reason: str
) -> None:
    from fedkd.engines.preflight import check

    with pytest.raises(FedkdError, match=reason):
        check(tiny(strategy=f"{HERE}:Asking", strategy_config=f"said={said}", client_code=HERE))


@procedure
def forget(client: LocalClient) -> None:
    client.state.clear()


@procedure
def grow(client: LocalClient) -> None:
    client.state["calls"] = torch.zeros(len(client.state.get("calls", torch.zeros(1))) + 1)


@procedure
def keep_a_number(client: LocalClient) -> None:
    client.state["calls"] = 3  # type: ignore[assignment]


@procedure
def keep_no_sample(client: LocalClient) -> None:
    assert client.received is not None
    client.received = client.received.keep(torch.zeros(P, dtype=torch.bool))


def test_a_procedure_can_empty_its_state(tmp_path: Any) -> None:
    store = make_store(tmp_path)
    ordered(store, [Apply(count_calls, {"start": 1.0})])
    ordered(store, [Apply(forget)], round=2)
    assert memory(store, 0, 2) == {}


@pytest.mark.parametrize(
    ("does", "reason"),
    [
        (grow, "type and shape must not change"),
        (keep_a_number, "to int"),
        (keep_no_sample, "keep at least one"),
    ],
)
def test_what_a_procedure_leaves_behind_is_checked_client_by_client(
    does: Any, reason: str, tmp_path: Any
) -> None:
    store = make_store(tmp_path)
    ordered(store, [Revisit()])
    first = ordered(store, [Apply(does)], round=2, knowledge=labels())
    results = ordered(store, [Apply(does)], round=3, knowledge=labels()) if does is grow else first
    assert all(reason in result.reason for result in results), results


def test_two_procedures_of_one_name_draw_other_numbers(tmp_path: Any) -> None:
    store = make_store(tmp_path)
    ordered(store, [Apply(look), Apply(look_again)])
    kept = memory(store, 0, 1)["own"]
    assert not torch.equal(kept["drawn"], kept["again"])


@procedure
def look_again(client: LocalClient) -> None:
    client.state["again"] = torch.rand(3, generator=client.generator("look"))

"""FedDF against a float64 loop written from the paper: two architectures, one prototype each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from federation_tools import Finished, P, federate, tiny
from torch import Tensor, nn

from fedkd.data.federated import federated_data
from fedkd.data.images import Images
from fedkd.errors import FedkdError
from fedkd.experiment import Experiment
from fedkd.federation.server import Replies, Server
from fedkd.knowledge import ModelWeights, Weights
from fedkd.phases import Load, Revisit, SendWeights, closing
from fedkd.training.architectures import architectures_of
from fedkd.training.models import build
from strategies.fedavg import FedAvg
from strategies.feddf import FedDF

K = 5
F64 = torch.float64
MODELS = ["mlp-8", "lenet"]
SIZES = [2, 3, 5, 7, 11]


def experiment_of(**keys: Any) -> Experiment:
    """Return an experiment of which a pass over the public set is one step of plain SGD."""
    plain = {"batch_size": 1000, "optimizer": "sgd", "learning_rate": 0.1, "num_clients": K}
    return tiny(**{**plain, "student": ",".join(MODELS), "num_server_rounds": 2, **keys})


def server_of(experiment: Experiment, number: int = 1) -> Server:
    return Server(experiment, federated_data(experiment), round=number)


def replies_of(experiment: Experiment, clients: list[int], spread: float = 0.1) -> Replies:
    """Return weights around the initial ones, each client's its own."""
    data = federated_data(experiment)
    parts: dict[str, list[Weights]] = {}
    for k in clients:
        generator = torch.Generator().manual_seed(k)
        name = experiment.student_of(k)
        state = {
            n: (t + spread * torch.randn(t.shape, generator=generator)).unsqueeze(0)
            for n, t in architectures_of(data).initial_state(name, experiment.seed).items()
        }
        one = ModelWeights(state, torch.tensor([k]), torch.tensor([SIZES[k]]))
        parts.setdefault(name, []).append(Weights({name: one}))
    stacks = [Weights.stack(part) for part in parts.values()]
    joined = {name: part for stack in stacks for name, part in stack.by_model.items()}
    return Replies(clients, weights=Weights(joined))


def pixels(images: Images, rows: Tensor) -> Tensor:
    """Return normalised images in float64."""
    mean, std = (torch.tensor(v, dtype=F64)[:, None, None] for v in (images.mean, images.std))
    return (images.pixels[rows].to(F64) / 255 - mean) / std


def module(experiment: Experiment, name: str, state: dict[str, Tensor]) -> nn.Module:
    data = federated_data(experiment)
    model = build(name, data.input_shape, data.num_classes).double()
    model.load_state_dict({n: t.to(F64) for n, t in state.items()})
    return model


# --- The paper's algorithm -----------------------------------------------------------------------


def prototypes_of_the_paper(
    experiment: Experiment, replies: Replies, drawn: Tensor, epochs: int
) -> dict[str, dict[str, Tensor]]:
    """Algorithm 3: average within an architecture, then learn the mean logits of all clients."""
    assert replies.weights is not None
    x = pixels(federated_data(experiment).public, drawn)
    logits = []
    averages: dict[str, dict[str, Tensor]] = {}
    for name, part in replies.weights.by_model.items():
        total = int(part.num_examples.sum())
        averages[name] = {}
        for k in range(len(part.clients)):
            one = {n: t[k].to(F64) for n, t in part.tensors.items()}
            with torch.no_grad():
                logits.append(module(experiment, name, one)(x))
            for n, t in one.items():
                share = int(part.num_examples[k]) / total
                averages[name][n] = averages[name].get(n, torch.zeros_like(t)) + share * t
    assert len(logits) == len(replies.clients)
    teacher = sum(logits[1:], logits[0]) / len(logits)
    taught = {}
    for name, average in averages.items():
        model = module(experiment, name, average)
        for _ in range(epochs):
            log_q, p = model(x).log_softmax(-1), teacher.softmax(-1)
            loss = (p * (p.log() - log_q)).sum(-1).mean()
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            with torch.no_grad():
                for weight, gradient in zip(model.parameters(), gradients, strict=True):
                    weight.sub_(experiment.learning_rate * gradient)
        taught[name] = {n: t.detach() for n, t in model.state_dict().items()}
    return taught


def assert_prototypes(got: object, expected: dict[str, dict[str, Tensor]]) -> None:
    assert isinstance(got, Weights)
    assert set(got.by_model) == set(expected)
    for name, state in expected.items():
        for n, tensor in got.by_model[name].tensors.items():
            assert tensor.shape == (1, *state[n].shape)
            torch.testing.assert_close(tensor[0].double(), state[n], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("clients", [[0, 1, 2, 3, 4], [1, 2, 4]], ids=str)
def test_each_prototype_learns_the_mean_logits_of_all_clients(
    clients: list[int], labelled: bool
) -> None:
    """Labels of the public set have no part in it, and neither have α, τ and the distill epochs."""
    experiment = experiment_of(public_labels=labelled, tau=5.0, alpha=0.3, distill_epochs=4)
    replies = replies_of(experiment, clients)
    got = FedDF(server_epochs=3).update(replies, server_of(experiment))
    expected = prototypes_of_the_paper(experiment, replies, torch.arange(P), epochs=3)
    assert set(expected) == set(MODELS)
    assert_prototypes(got, expected)
    average = prototypes_of_the_paper(experiment, replies, torch.arange(P), epochs=0)
    for name in MODELS:
        moved = [(expected[name][n] - t).abs().max() for n, t in average[name].items()]
        assert float(torch.stack(moved).max()) > 1e-3


def test_only_the_samples_of_the_round_are_used() -> None:
    experiment = experiment_of(public_per_round=11)
    replies = replies_of(experiment, [0, 1, 2])
    for number in (1, 2):
        server = server_of(experiment, number)
        got = FedDF(server_epochs=2).update(replies, server)
        assert_prototypes(
            got, prototypes_of_the_paper(experiment, replies, server.draw(), epochs=2)
        )
    assert not torch.equal(server_of(experiment, 1).draw(), server_of(experiment, 2).draw())


def test_one_client_is_its_own_teacher_and_stays_as_it_is() -> None:
    """The student starts where the teacher is: the loss is 0 and has no gradient."""
    experiment = experiment_of()
    replies = replies_of(experiment, [0])
    got = FedDF(server_epochs=3).update(replies, server_of(experiment))
    assert replies.weights is not None
    alone = {n: t[0] for n, t in replies.weights.by_model["mlp-8"].tensors.items()}
    assert_prototypes(got, {"mlp-8": {n: t.to(F64) for n, t in alone.items()}})


def test_an_architecture_with_one_client_learns_from_the_others() -> None:
    experiment = experiment_of()
    replies = replies_of(experiment, [0, 1])
    assert replies.weights is not None
    got = FedDF(server_epochs=3).update(replies, server_of(experiment))
    assert isinstance(got, Weights)
    for name in MODELS:
        before, after = replies.weights.by_model[name].tensors, got.by_model[name].tensors
        assert any(float((after[n] - before[n]).abs().max()) > 1e-3 for n in before)


def test_the_ensemble_is_not_weighted_by_images_and_the_average_is() -> None:
    """AvgLogits (section 3) is a plain mean, unlike the weights from which its student starts."""
    experiment = experiment_of(student="mlp-8")
    replies = replies_of(experiment, [0, 4])
    assert replies.weights is not None
    part = replies.weights.by_model["mlp-8"]
    even = ModelWeights(part.tensors, part.clients, torch.tensor([6, 6]))
    evenly = Replies([0, 4], weights=Weights({"mlp-8": even}))
    for given in (replies, evenly):
        got = FedDF(server_epochs=2).update(given, server_of(experiment))
        assert_prototypes(
            got, prototypes_of_the_paper(experiment, given, torch.arange(P), epochs=2)
        )


def test_the_order_of_clients_does_not_matter_and_nothing_given_changes() -> None:
    experiment = experiment_of(student="mlp-8")
    replies = replies_of(experiment, [0, 1, 2])
    assert replies.weights is not None
    part = replies.weights.by_model["mlp-8"]
    before = {n: t.clone() for n, t in part.tensors.items()}
    rows = torch.tensor([2, 0, 1])
    permuted = ModelWeights(
        {n: t[rows] for n, t in part.tensors.items()}, part.clients[rows], part.num_examples[rows]
    )
    one = FedDF().update(replies, server_of(experiment))
    other = FedDF().update(
        Replies([2, 0, 1], weights=Weights({"mlp-8": permuted})), server_of(experiment)
    )
    assert isinstance(one, Weights)
    assert isinstance(other, Weights)
    for n, tensor in one.by_model["mlp-8"].tensors.items():
        torch.testing.assert_close(other.by_model["mlp-8"].tensors[n], tensor, rtol=1e-4, atol=1e-5)
        assert torch.equal(part.tensors[n], before[n])


# --- The strategy --------------------------------------------------------------------------------


def test_clients_do_what_those_of_fedavg_do() -> None:
    assert FedDF().phases(1) == [Load(), Revisit(model="student"), SendWeights()]
    assert FedDF().phases(1) == FedAvg().phases(1)
    assert closing(FedDF().phases(5), FedDF.closes) == [Load()]


def test_its_pure_rule_is_the_mean_of_weights() -> None:
    weights = replies_of(experiment_of(), [0, 1, 2, 3]).weights
    assert weights is not None
    mine, theirs = FedDF().aggregate(weights).by_model, FedAvg().aggregate(weights).by_model
    for name in MODELS:
        for n, tensor in mine[name].tensors.items():
            assert torch.equal(tensor, theirs[name].tensors[n])


@pytest.mark.parametrize("epochs", [0, -1])
def test_no_passes_at_the_server_are_refused(epochs: int) -> None:
    with pytest.raises(FedkdError, match="server-epochs"):
        FedDF(server_epochs=epochs)


# --- A federation --------------------------------------------------------------------------------


def received(done: Finished, number: int, client: int) -> dict[str, Tensor]:
    """Return the weights that a client was sent in a round."""
    knowledge = done.exchanges[number].instructions[client].knowledge
    assert isinstance(knowledge, Weights)
    (part,) = knowledge.by_model.values()
    return {n: t[0] for n, t in part.tensors.items()}


def test_clients_receive_the_prototype_of_their_architecture() -> None:
    experiment = experiment_of()
    done = federate(experiment, strategy=FedDF(server_epochs=2))
    assert [row["dropped"] for row in done.rows] == [{}] * 2
    for number in (0, 1):
        said = done.exchanges[number].answers(list(range(K)))
        assert isinstance(said, Weights)
        replies = Replies(list(range(K)), weights=said)
        expected = prototypes_of_the_paper(experiment, replies, torch.arange(P), epochs=2)
        for k in range(K):
            for n, tensor in received(done, number + 1, k).items():
                torch.testing.assert_close(
                    tensor.double(), expected[experiment.student_of(k)][n], rtol=1e-4, atol=2e-5
                )
    assert all("server_accuracy" in row for row in done.rows)


def test_its_bytes_are_those_of_the_weights() -> None:
    """Soft labels stay at the server."""
    experiment = experiment_of()
    distilled, averaged = (federate(experiment, strategy=s).rows for s in (FedDF(), FedAvg()))
    for mine, theirs in zip(distilled, averaged, strict=True):
        assert mine["bytes_up"] == theirs["bytes_up"] > 0
        assert mine["bytes_down"] == theirs["bytes_down"]

"""FD against float64 loops written from the paper, alone and in a federation of three."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from federation_tools import C as CLASSES
from federation_tools import Exchange, Finished, federate, one_step, shard, starting, tiny
from torch import Tensor, nn
from torch.func import vmap

from fedkd.data.federated import federated_data
from fedkd.errors import FedkdError
from fedkd.experiment import Experiment
from fedkd.federation.server import Replies, Server
from fedkd.knowledge import ClassMeans
from fedkd.losses import Step, cross_entropy
from fedkd.phases import MeanByClass, Revisit, closing
from strategies.fd import FD, towards_class_mean

K, B, C = 3, 5, 7
F64 = torch.float64
COUNTS = torch.tensor([[4, 0, 1, 2, 0, 9, 3], [1, 0, 5, 0, 0, 2, 8], [2, 0, 0, 6, 3, 1, 1]])
"""Images by client and class: class 1 is nobody's, class 4 that of client 2 alone."""
LABELS = torch.tensor([[0, 1, 5, 2, 5], [6, 3, 4, 1, 0], [2, 2, 6, 4, 3]])


def rand(*shape: int, seed: int = 1) -> Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def means(
    counts: Tensor = COUNTS, seed: int = 1, clients: Sequence[int] | None = None
) -> ClassMeans:
    """Return mean probabilities of K clients, zeros where a class is absent."""
    k, c = counts.shape
    values = rand(k, c, c, seed=seed).softmax(-1) * (counts > 0).unsqueeze(-1)
    return ClassMeans(values, counts, torch.tensor(clients or range(k)), "probabilities")


def step(logits: Tensor, labels: Tensor, values: Tensor, counts: Tensor) -> Step:
    return Step(logits, labels, None, {}, {}, {}, None, values, counts)


def server() -> Server:
    """Return a server that the rules of FD must not look at."""
    return None  # type: ignore[return-value]


def received(given: ClassMeans, client: int) -> ClassMeans:
    """Return what a client receives, which must be for it alone."""
    mine = FD().personalise(given, client, server())
    assert isinstance(mine, ClassMeans)
    assert mine.values.shape == (1, *given.values.shape[1:])
    assert mine.of == "probabilities"
    return mine


# --- The loss term -------------------------------------------------------------------------------


def log_softmax_loop(row: list[float]) -> list[float]:
    total = math.fsum(math.exp(v - max(row)) for v in row)
    return [v - max(row) - math.log(total) for v in row]


def term_loop(logits: Tensor, labels: Tensor, values: Tensor, counts: Tensor) -> list[float]:
    """φ(F(w, b), F̂_y) sample by sample, in Python's own arithmetic."""
    losses = []
    for z, y in zip(logits.tolist(), labels.tolist(), strict=True):
        log_q = log_softmax_loop(z)
        target = values[y].tolist()
        loss = -math.fsum(p * q for p, q in zip(target, log_q, strict=True))
        losses.append(loss if counts[y] > 0 else 0.0)
    return losses


@pytest.mark.parametrize("k", range(K))
def test_the_term_is_the_cross_entropy_to_the_mean_of_the_labels_class(k: int) -> None:
    logits, given = rand(B, C, seed=k), means()
    values, counts = given.values[k], given.counts[k]
    losses = towards_class_mean(step(logits, LABELS[k], values, counts))
    expected = torch.tensor(term_loop(logits, LABELS[k], values, counts), dtype=F64)
    assert losses.shape == (B,)
    torch.testing.assert_close(losses, expected, rtol=1e-13, atol=1e-13)
    is_absent = counts[LABELS[k]] == 0
    assert bool(is_absent.any())
    assert torch.equal(losses == 0, is_absent)


@pytest.mark.parametrize("k", range(K))
def test_its_gradient_is_output_minus_target(k: int) -> None:
    """Closed form: ∂/∂z = softmax(z) − F̂_y, and nothing where the class is absent."""
    logits, given = rand(B, C, seed=k).requires_grad_(), means()
    towards_class_mean(step(logits, LABELS[k], given.values[k], given.counts[k])).sum().backward()
    present = (given.counts[k][LABELS[k]] > 0).unsqueeze(-1)
    expected = (logits.detach().softmax(-1) - given.values[k][LABELS[k]]) * present
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("shared", [True, False])
def test_mapped_over_clients_it_is_what_it_is_in_a_loop(shared: bool) -> None:
    """With what all receive, and with what each receives, values and gradients."""
    logits, given = rand(K, B, C, seed=4).requires_grad_(), means()
    values, counts = (given.values[2], given.counts[2]) if shared else (given.values, given.counts)
    axis = None if shared else 0
    mapped = vmap(lambda *s: towards_class_mean(step(*s)), in_dims=(0, 0, axis, axis))(
        logits, LABELS, values, counts
    )
    looped = torch.stack(
        [
            towards_class_mean(
                step(
                    logits[k],
                    LABELS[k],
                    given.values[2 if shared else k],
                    given.counts[2 if shared else k],
                )
            )
            for k in range(K)
        ]
    )
    torch.testing.assert_close(mapped, looped, rtol=1e-14, atol=1e-14)
    weights = rand(K, B, seed=5)
    for_mapped, for_looped = (
        torch.autograd.grad((weights * losses).sum(), logits)[0] for losses in (mapped, looped)
    )
    torch.testing.assert_close(for_mapped, for_looped, rtol=1e-13, atol=1e-14)
    assert float(for_looped.abs().max()) > 0.1


def test_what_stands_in_the_place_of_an_absent_class_does_not_count() -> None:
    logits, values = rand(B, C), means(torch.ones(K, C).long()).values[0]
    counts = (torch.arange(C) != 5).long()
    losses = towards_class_mean(step(logits, LABELS[0], values, counts))
    assert torch.equal(losses == 0, LABELS[0] == 5)


def test_to_one_hot_means_it_is_the_cross_entropy_with_the_labels() -> None:
    logits, labels = rand(B, C), LABELS[0]
    losses = towards_class_mean(step(logits, labels, torch.eye(C, dtype=F64), torch.ones(C)))
    torch.testing.assert_close(losses, cross_entropy(logits, labels), rtol=1e-14, atol=0)


def test_to_means_that_tie_it_pulls_every_class_alike() -> None:
    uniform = torch.full((C, C), 1 / C, dtype=F64)
    flat = torch.zeros(B, C, dtype=F64, requires_grad=True)
    losses = towards_class_mean(step(flat, LABELS[0], uniform, torch.ones(C)))
    torch.testing.assert_close(losses, torch.full((B,), math.log(C), dtype=F64))
    (gradient,) = torch.autograd.grad(losses.sum(), flat)
    torch.testing.assert_close(gradient, torch.zeros(B, C, dtype=F64), rtol=0, atol=1e-15)


@pytest.mark.parametrize("scale", [1e4, 1e30])
def test_huge_logits_and_absent_classes_leave_it_finite(scale: float) -> None:
    logits = (scale * rand(B, C).float()).requires_grad_()
    values = torch.eye(C) * (torch.arange(C) != 5).unsqueeze(-1)
    losses = towards_class_mean(step(logits, LABELS[0], values, (torch.arange(C) != 5).long()))
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    assert bool(losses.isfinite().all())
    assert bool(gradient.isfinite().all())
    assert losses[2] == losses[4] == 0


# --- Leave one out -------------------------------------------------------------------------------


def leave_one_out_loop(given: ClassMeans, client: int) -> tuple[Tensor, list[bool]]:
    """F̂_l = (Σ_j F̄_l^j − F̄_l^i) / (M − 1), over the M that have class l, in Python's arithmetic."""
    clients = given.clients.tolist()
    rows, found = [], []
    for label in range(given.values.shape[1]):
        having = [k for k in range(len(clients)) if given.counts[k, label] > 0]
        others = [k for k in having if clients[k] != client]
        own = [k for k in having if clients[k] == client]
        row = []
        for c in range(given.values.shape[2]):
            total = math.fsum(float(given.values[k, label, c]) for k in having)
            total -= math.fsum(float(given.values[k, label, c]) for k in own)
            row.append(total / len(others) if others else 0.0)
        rows.append(row)
        found.append(bool(others))
    return torch.tensor(rows, dtype=F64), found


@pytest.mark.parametrize("clients", [[0, 1, 2], [11, 5, 8]], ids=str)
@pytest.mark.parametrize("counts", [COUNTS, torch.ones_like(COUNTS)], ids=["some", "all"])
def test_a_client_receives_the_mean_of_the_others_by_class(
    counts: Tensor, clients: list[int]
) -> None:
    given = means(counts, clients=clients)
    for client in [*clients, 77]:
        expected, found = leave_one_out_loop(given, client)
        mine = received(given, client)
        torch.testing.assert_close(mine.values[0], expected, rtol=1e-12, atol=1e-15)
        assert mine.present[0].tolist() == found


def test_who_did_not_answer_receives_the_mean_of_all() -> None:
    given = means()
    everybody = FD().aggregate(given)
    assert torch.equal(received(given, 3).values, everybody.values)
    assert torch.equal(received(given, 3).counts, everybody.counts)
    for client in range(K):
        assert not torch.equal(received(given, client).values, everybody.values)


def test_one_client_alone_has_nobody_to_learn_from() -> None:
    given = means(COUNTS[:1])
    mine = received(given, 0)
    assert not bool(mine.present.any())
    assert bool((mine.values == 0).all())
    logits = rand(B, C).requires_grad_()
    losses = towards_class_mean(step(logits, LABELS[0], mine.values[0], mine.counts[0]))
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    assert bool((losses == 0).all())
    assert bool((gradient == 0).all())
    torch.testing.assert_close(FD().aggregate(given).values, given.values, rtol=1e-15, atol=0)


def test_a_class_that_only_the_recipient_has_is_absent_for_it_alone() -> None:
    given = means()
    assert [bool(received(given, k).present[0, 4]) for k in range(K)] == [True, True, False]
    assert [bool(received(given, k).present[0, 1]) for k in (*range(K), 9)] == [False] * 4


def test_means_are_not_weighted_by_images() -> None:
    """Unlike in FedProto: one image and a thousand have the same say."""
    given = means(torch.tensor([[1] * C, [1000] * C, [7] * C]))
    torch.testing.assert_close(received(given, 2).values[0], given.values[:2].mean(0))
    torch.testing.assert_close(FD().aggregate(given).values[0], given.values.mean(0))


def test_one_hot_means_stay_one_hot_and_ties_stay_ties() -> None:
    eye = torch.eye(C, dtype=F64).expand(K, C, C)
    certain = ClassMeans(eye, torch.ones(K, C).long(), torch.arange(K), "probabilities")
    assert torch.equal(received(certain, 1).values, eye[:1])
    swapped = eye[0][[1, 0, *range(2, C)]]
    split = ClassMeans(
        torch.stack([eye[0], swapped, eye[0]]),
        torch.ones(K, C).long(),
        torch.arange(K),
        "probabilities",
    )
    torch.testing.assert_close(
        received(split, 2).values[0, 0, :2], torch.tensor([0.5, 0.5]).double()
    )


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_rows_stay_on_the_simplex_and_keep_their_type(dtype: torch.dtype) -> None:
    given = means()
    given = ClassMeans(given.values.to(dtype), given.counts, given.clients, given.of)
    for client in range(K + 1):
        mine = received(given, client)
        assert mine.values.dtype == dtype
        rows = mine.values[mine.present]
        torch.testing.assert_close(rows.sum(-1), torch.ones(len(rows), dtype=dtype))
        assert bool((rows >= 0).all())


def test_neither_rule_depends_on_the_order_of_clients_or_changes_what_it_is_given() -> None:
    given, before = means(), means()
    order = torch.tensor([2, 0, 1])
    permuted = ClassMeans(given.values[order], given.counts[order], given.clients[order], given.of)
    for client in range(K + 1):
        torch.testing.assert_close(
            received(permuted, client).values, received(given, client).values, rtol=1e-14, atol=0
        )
    torch.testing.assert_close(FD().aggregate(permuted).values, FD().aggregate(given).values)
    assert torch.equal(given.values, before.values)
    assert torch.equal(given.counts, before.counts)


# --- What other implementations of FD got wrong ----------------------------------------------------


def test_targets_are_probabilities_and_never_logits() -> None:
    """With raw logits for a target, the loss has no floor: it pushes an output away for ever."""
    assert MeanByClass("probabilities") in FD().phases(2)
    given = means(torch.ones(K, C).long())
    target, label = given.values[0], torch.tensor([2])
    at_target = target[2].log().unsqueeze(0).requires_grad_()
    loss = towards_class_mean(step(at_target, label, target, torch.ones(C)))
    (gradient,) = torch.autograd.grad(loss.sum(), at_target)
    assert float(gradient.abs().max()) < 1e-15  # the minimum is where the output is the target
    entropy = -float((target[2] * target[2].log()).sum())
    assert float(loss.detach()) == pytest.approx(entropy, rel=1e-12)
    for seed in range(20):
        elsewhere = towards_class_mean(step(rand(1, C, seed=seed), label, target, torch.ones(C)))
        assert float(elsewhere) > entropy


def test_clients_without_a_class_do_not_dilute_its_mean() -> None:
    """Zero vectors of absent classes must not count: 1 of 100 clients has the class."""
    counts = torch.zeros(100, C).long()
    counts[:, 0] = 1
    counts[13, 3] = 2
    given = means(counts)
    torch.testing.assert_close(
        FD().aggregate(given).values[0, 3], given.values[13, 3], rtol=1e-14, atol=0
    )
    torch.testing.assert_close(
        received(given, 5).values[0, 3], given.values[13, 3], rtol=1e-14, atol=0
    )
    assert not bool(received(given, 13).present[0, 3])


def test_a_clients_own_output_is_no_part_of_what_it_receives() -> None:
    given, other = means(), means(seed=2)
    values = torch.stack([given.values[0], other.values[1], given.values[2]])
    changed = ClassMeans(values, given.counts, given.clients, given.of)
    assert torch.equal(received(changed, 1).values, received(given, 1).values)
    assert not torch.equal(received(changed, 0).values, received(given, 0).values)


# --- The strategy --------------------------------------------------------------------------------


def test_fd_revisits_under_both_terms_and_answers_with_means() -> None:
    revisit = Revisit({"ce": 1.0, towards_class_mean: 0.3}, model="student")
    assert FD(gamma=0.3).phases(1) == [revisit, MeanByClass("probabilities")]
    assert revisit.private == {"ce": 1.0, "strategies.fd:towards_class_mean": 0.3}
    assert closing(FD().phases(5), FD.closes) == []  # no client trains more than its rounds


def test_it_keeps_what_each_client_said() -> None:
    given = means()
    replies = Replies([0, 1, 2], class_means=given)
    assert FD().update(replies, server()) is given


@pytest.mark.parametrize("gamma", [-1.0, 0.0, math.nan])
def test_a_gamma_that_is_not_above_0_is_refused(gamma: float) -> None:
    with pytest.raises(FedkdError, match="gamma"):
        FD(gamma=gamma)


# --- A federation of three -----------------------------------------------------------------------


def softmax_means(model: nn.Module, x: Tensor, y: Tensor) -> dict[int, Tensor]:
    with torch.no_grad():
        outputs = model(x).softmax(-1)
    return {label: outputs[y == label].mean(0) for label in y.unique().tolist()}


def rounds_of_the_paper(experiment: Experiment, gamma: float) -> list[list[dict[int, Tensor]]]:
    """Run algorithm 1 as it stands: F̄ by round, client and label."""
    data = federated_data(experiment)
    clients = range(experiment.num_clients)
    models = [starting(experiment, k) for k in clients]
    said: list[list[dict[int, Tensor]]] = []
    for _ in range(experiment.num_server_rounds):
        now = []
        for k in clients:
            x, y = shard(data, k)
            log_q = models[k](x).log_softmax(-1)
            loss = -log_q[torch.arange(len(y)), y].mean()
            for label in y.unique().tolist():
                heard = (
                    [m[label] for j, m in enumerate(said[-1]) if j != k and label in m]
                    if said
                    else []
                )
                if heard:
                    target = torch.stack(heard).mean(0)
                    loss = loss - gamma * (log_q[y == label] @ target).sum() / len(y)
            gradients = torch.autograd.grad(loss, list(models[k].parameters()))
            with torch.no_grad():
                for weight, gradient in zip(models[k].parameters(), gradients, strict=True):
                    weight.sub_(experiment.learning_rate * gradient)
            now.append(softmax_means(models[k], x, y))
        said.append(now)
    return said


def answers(exchange: Exchange) -> ClassMeans:
    """Stack what clients sent, in order of partition."""
    given = [exchange.report(k).answer for k in sorted(exchange.instructions)]
    found = [answer for answer in given if isinstance(answer, ClassMeans)]
    assert len(found) == len(given)
    return ClassMeans.stack(found)


def assert_said(done: Finished, number: int, expected: Sequence[dict[int, Tensor]]) -> None:
    """Compare what clients sent in a round, in float32, with the paper's in float64."""
    for k, by_label in enumerate(expected):
        answer = done.exchanges[number].report(k).answer
        assert isinstance(answer, ClassMeans)
        assert answer.present[0].nonzero().flatten().tolist() == sorted(by_label)
        for label, mean in by_label.items():
            torch.testing.assert_close(answer.values[0, label].double(), mean, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("student", "plan"), [("mlp-8", "stacked"), ("mlp-8", "loop"), ("mlp-8,lenet,mlp-5", "loop")]
)
def test_three_rounds_are_those_of_the_papers_algorithm(student: str, plan: str) -> None:
    """Architectures may be mixed: only outputs are shared."""
    experiment = one_step(student=student, plan=plan)
    done = federate(experiment, strategy=FD(gamma=0.7))
    assert [row["dropped"] for row in done.rows] == [{}] * 3
    expected = rounds_of_the_paper(experiment, gamma=0.7)
    for number in range(3):
        assert_said(done, number, expected[number])
    alone = rounds_of_the_paper(experiment, gamma=0.0)
    apart = [(expected[2][0][y] - alone[2][0][y]).abs().max() for y in expected[2][0]]
    assert float(torch.stack(apart).max()) > 1e-3  # the others did teach something


def test_counts_are_those_of_the_shards_and_bytes_those_of_the_table() -> None:
    experiment = one_step()
    data = federated_data(experiment)
    done = federate(experiment, strategy=FD())
    for k in range(K):
        answer = done.exchanges[1].report(k).answer
        assert isinstance(answer, ClassMeans)
        assert torch.equal(answer.counts[0], data.private_label_counts[k])
    assert bool((data.private_label_counts[:K] == 0).any())
    for row in done.rows:
        assert row["bytes_up"] == K * (CLASSES * CLASSES * 4 + CLASSES * 4)
    assert done.rows[0]["bytes_down"] == 0
    assert done.rows[2]["bytes_down"] == K * (CLASSES * CLASSES * 4 + CLASSES * 4)


def test_what_crosses_the_wire_down_is_the_mean_of_the_others() -> None:
    done = federate(one_step(), strategy=FD())
    said = answers(done.exchanges[0])
    for k in range(K):
        heard = done.exchanges[1].instructions[k].knowledge
        assert isinstance(heard, ClassMeans)
        expected, found = leave_one_out_loop(said, k)
        assert heard.present[0].tolist() == found
        torch.testing.assert_close(heard.values[0].double(), expected, rtol=0, atol=1e-6)


def test_a_federation_of_one_is_training_alone() -> None:
    experiment = tiny(num_clients=1, num_server_rounds=3)
    together = federate(experiment, strategy=FD()).rows
    alone = federate(experiment.replace(strategy="LocalOnly")).rows
    for mine, theirs in zip(together, alone, strict=True):
        assert mine["accuracy_after_revisit"] == theirs["accuracy_after_revisit"]
        assert mine["loss_revisit"] == theirs["loss_revisit"]


def test_clients_that_were_not_drawn_learn_from_all_who_were() -> None:
    experiment = tiny(num_clients=5, fraction_train=0.4, num_server_rounds=4)
    done = federate(experiment, strategy=FD())
    assert [row["dropped"] for row in done.rows] == [{}] * 4
    checked = 0
    for before, now in zip(done.exchanges[:3], done.exchanges[1:4], strict=True):
        said = answers(before)
        for k, order in now.instructions.items():
            assert isinstance(order.knowledge, ClassMeans)
            expected, _ = leave_one_out_loop(said, k)
            torch.testing.assert_close(
                order.knowledge.values[0].double(), expected, rtol=0, atol=1e-6
            )
            checked += k not in before.instructions
    assert checked > 0

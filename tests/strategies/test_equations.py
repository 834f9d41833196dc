"""Every strategy against its paper's equation in float64 loops, and what is true of all of them."""

from __future__ import annotations

import copy
import math
import pickle
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from federation_tools import C as CLASSES
from federation_tools import P, federate, tiny
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import strategy as flower
from loops import mean_loop
from torch import Tensor

import strategies as package
from fedkd.errors import FedkdError
from fedkd.experiment import Experiment
from fedkd.federation.flower_internals.local_grid import task_identity
from fedkd.knowledge import Knowledge, ModelWeights, SoftLabels, Space, Weights
from fedkd.phases import Fit, Load, Predict, Revisit, SendWeights
from fedkd.registry import find, strategies
from fedkd.strategy import DistillationStrategy, Facts
from fedkd.training.models import build
from strategies.dsfl import DSFL
from strategies.fedavg import FedAvg
from strategies.fedmd import FedMD
from strategies.localonly import LocalOnly

K, N, C = 3, 5, 7
F64 = torch.float64
MASK = torch.tensor([[1, 1, 0, 0, 1], [1, 0, 0, 1, 1], [1, 1, 1, 0, 1]]).bool()
EXAMPLES = [2, 3, 5]
ALL = [(cls.name(), cls) for cls in (DSFL, FedAvg, FedMD, LocalOnly)]
ASKING = [(n, cls) for n, cls in ALL if cls().uploads() is SoftLabels]
VARIANTS: list[DistillationStrategy] = [
    FedMD(),
    FedMD(digest="mae", transfer_epochs=2),
    DSFL(),
    DSFL(sharpening="mean"),
    DSFL(era_temperature=0.5),
    FedAvg(),
]
LABELLING = [s for s in VARIANTS if s.uploads() is SoftLabels]
ON_THE_SIMPLEX = [s for s in LABELLING if Predict("probabilities") in s.phases(2)]
STUDENTS = ["mlp-8", "lenet", "resnet-8"]
BYTES = [
    (name, student)
    for name, cls in ALL
    for student in (STUDENTS if cls().uploads() is Weights else STUDENTS[:1])
]
"""Strategies, with more than one student where it crosses the wire; the last has a counter."""


def rand(*shape: int, seed: int = 1) -> Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def labels(space: Space = "logits", seed: int = 1, **keys: Any) -> SoftLabels:
    logits = rand(K, N, C, seed=seed)
    return SoftLabels(logits if space == "logits" else logits.softmax(-1), space, **keys)


def weights(seed: int = 1, examples: list[int] | None = None) -> Weights:
    shapes = {"body.weight": (2, C), "body.bias": (C,), "scale": ()}
    tensors = {name: rand(K, *shape, seed=seed + len(shape)) for name, shape in shapes.items()}
    return Weights(
        {"mlp-3": ModelWeights(tensors, torch.arange(K), torch.tensor(examples or EXAMPLES))}
    )


def knowledge_for(strategy: DistillationStrategy, seed: int = 1) -> Knowledge:
    """Return what K clients could have sent for `strategy`."""
    if strategy.uploads() is Weights:
        return weights(seed)
    return labels(space_of(strategy), seed)


def space_of(strategy: DistillationStrategy) -> Space:
    return next(p.space for p in strategy.phases(2) if isinstance(p, Predict))


def tensors_of(knowledge: Tensor | Knowledge) -> dict[str, Tensor]:
    if isinstance(knowledge, Tensor):
        return {"": knowledge}
    if isinstance(knowledge, SoftLabels):
        return {"": knowledge.values}
    assert isinstance(knowledge, Weights)
    return {
        f"{model}/{name}": tensor
        for model, part in knowledge.by_model.items()
        for name, tensor in part.tensors.items()
    }


def rows_of(knowledge: Knowledge, rows: list[int]) -> Knowledge:
    """Return the knowledge of some clients, in the order of `rows`."""
    if isinstance(knowledge, SoftLabels):
        return SoftLabels(
            knowledge.values[rows],
            knowledge.space,
            knowledge.samples,
            knowledge.clients[rows],
            knowledge.num_examples[rows],
            knowledge.mask[rows],
        )
    assert isinstance(knowledge, Weights)
    return Weights(
        {
            model: ModelWeights(
                {name: tensor[rows] for name, tensor in part.tensors.items()},
                part.clients[rows],
                part.num_examples[rows],
            )
            for model, part in knowledge.by_model.items()
        }
    )


def cast(knowledge: Knowledge, dtype: torch.dtype) -> Knowledge:
    if isinstance(knowledge, SoftLabels):
        return SoftLabels(knowledge.values.to(dtype), knowledge.space, mask=knowledge.mask)
    assert isinstance(knowledge, Weights)
    return Weights(
        {
            model: ModelWeights(
                {name: tensor.to(dtype) for name, tensor in part.tensors.items()},
                part.clients,
                part.num_examples,
            )
            for model, part in knowledge.by_model.items()
        }
    )


def variant_name(strategy: object) -> str:
    return repr(strategy)


# --- The papers' equations -----------------------------------------------------------------------


def softmax_loop(row: list[float]) -> list[float]:
    exponentials = [math.exp(v - max(row)) for v in row]
    return [e / math.fsum(exponentials) for e in exponentials]


@pytest.mark.parametrize("mask", [torch.ones(K, N).bool(), MASK], ids=["all", "some"])
def test_fedmd_is_the_mean_of_logits(mask: Tensor) -> None:
    given = labels("logits", mask=mask)
    expected = torch.tensor(mean_loop(given.values, mask), dtype=F64)
    torch.testing.assert_close(FedMD().aggregate(given), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mask", [torch.ones(K, N).bool(), MASK], ids=["all", "some"])
@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0])
def test_dsfl_is_a_cold_softmax_of_the_mean_of_probabilities(
    mask: Tensor, temperature: float
) -> None:
    given = labels("probabilities", mask=mask)
    mean = mean_loop(given.values, mask)
    torch.testing.assert_close(
        DSFL(sharpening="mean").aggregate(given), torch.tensor(mean, dtype=F64)
    )
    sharpened = [softmax_loop([p / temperature for p in row]) for row in mean]
    torch.testing.assert_close(
        DSFL(era_temperature=temperature).aggregate(given), torch.tensor(sharpened, dtype=F64)
    )


@pytest.mark.parametrize("temperature", [0.1, 0.05, 1.0])
def test_the_sharpest_label_of_dsfl_is_that_of_its_closed_form(temperature: float) -> None:
    one_hot = torch.eye(C, dtype=F64).expand(K, C, C)
    era = DSFL(era_temperature=temperature).aggregate(SoftLabels(one_hot, "probabilities"))
    exponential = math.exp(1 / temperature)
    top, rest = exponential / (exponential + C - 1), 1 / (exponential + C - 1)
    torch.testing.assert_close(era, rest + (top - rest) * torch.eye(C, dtype=F64))
    mean = DSFL(sharpening="mean").aggregate(SoftLabels(one_hot, "probabilities"))
    assert torch.equal(mean, torch.eye(C, dtype=F64))


def test_dsfl_keeps_uncertain_labels_uncertain_and_the_order_of_classes() -> None:
    uniform = SoftLabels(torch.full((K, N, C), 1 / C, dtype=F64), "probabilities")
    torch.testing.assert_close(DSFL().aggregate(uniform), uniform.values[0])
    mean = labels("probabilities").mean_probabilities()
    assert torch.equal(DSFL().aggregate(labels("probabilities")).argsort(-1), mean.argsort(-1))


def test_mean_of_probabilities_and_mean_of_logits_are_two_things() -> None:
    """One client is sure of class 0, two lean to class 1: the means disagree on the winner."""
    logits = torch.tensor([[[9.0, 0.0]], [[0.0, 2.0]], [[0.0, 2.0]]], dtype=F64)
    probs = SoftLabels(logits.softmax(-1), "probabilities")
    by_logits = FedMD().aggregate(SoftLabels(logits, "logits")).softmax(-1)
    by_probs = DSFL(sharpening="mean").aggregate(probs)
    assert by_logits.argmax() == 0
    assert by_probs.argmax() == 1
    assert float((by_logits - by_probs).abs().max()) > 0.3


def test_dsfl_refuses_logits_as_its_rule_is_for_probabilities() -> None:
    with pytest.raises(FedkdError, match="probabilities"):
        DSFL().aggregate(labels("logits"))


def flowers_average(given: Weights) -> dict[str, np.ndarray[Any, Any]]:
    """Let Flower's own FedAvg aggregate the same weights."""
    (part,) = given.by_model.values()
    replies = []
    with task_identity():
        for k in range(len(part.clients)):
            arrays = ArrayRecord(
                {name: Array(tensor[k].numpy()) for name, tensor in part.tensors.items()}
            )
            metrics = MetricRecord({"num-examples": int(part.num_examples[k])})
            instruction = Message(RecordDict(), k + 1, "train")
            content = RecordDict({"arrays": arrays, "metrics": metrics})
            replies.append(Message(content, reply_to=instruction))
    averaged, _ = flower.FedAvg().aggregate_train(1, replies)
    assert averaged is not None
    return {name: array.numpy() for name, array in averaged.items()}


@pytest.mark.parametrize("examples", [[2, 3, 5], [1, 1, 1], [1, 10_000, 3], [7, 0, 2]])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_fedavg_is_flowers_own(examples: list[int], dtype: torch.dtype) -> None:
    given = cast(weights(examples=examples), dtype)
    assert isinstance(given, Weights)
    ours = FedAvg().aggregate(given).by_model["mlp-3"].tensors
    theirs = flowers_average(given)
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        np.testing.assert_allclose(tensor[0].numpy(), theirs[name], rtol=1e-6, atol=1e-6)


def test_local_only_exchanges_nothing() -> None:
    assert LocalOnly().uploads() is None
    assert LocalOnly().phases(1) == [Revisit(model="student")]


# --- What is true of every strategy --------------------------------------------------------------


@pytest.mark.parametrize("strategy", VARIANTS, ids=variant_name)
def test_aggregate_is_pure(strategy: DistillationStrategy) -> None:
    given = knowledge_for(strategy)
    before = copy.deepcopy(tensors_of(given))
    first, again = strategy.aggregate(given), strategy.aggregate(given)
    for name, tensor in tensors_of(given).items():
        assert torch.equal(tensor, before[name])
    for name, tensor in tensors_of(first).items():
        assert torch.equal(tensor, tensors_of(again)[name])


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("strategy", VARIANTS, ids=variant_name)
def test_aggregate_keeps_the_type_and_drops_the_client_axis(
    strategy: DistillationStrategy, dtype: torch.dtype
) -> None:
    given = cast(knowledge_for(strategy), dtype)
    combined = strategy.aggregate(given)
    exact = tensors_of(strategy.aggregate(knowledge_for(strategy)))
    for name, tensor in tensors_of(combined).items():
        shape = tensors_of(given)[name].shape[1:]
        assert tensor.shape == (shape if isinstance(combined, Tensor) else (1, *shape))
        assert tensor.dtype == dtype
        assert tensor.device.type == "cpu"
        torch.testing.assert_close(tensor.double(), exact[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("strategy", VARIANTS, ids=variant_name)
def test_the_order_of_clients_does_not_matter(strategy: DistillationStrategy) -> None:
    given = knowledge_for(strategy)
    combined = tensors_of(strategy.aggregate(given))
    for order in ([2, 0, 1], [1, 0, 2]):
        permuted = tensors_of(strategy.aggregate(rows_of(given, order)))
        for name, tensor in combined.items():
            torch.testing.assert_close(permuted[name], tensor, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("strategy", VARIANTS, ids=variant_name)
def test_one_client_gets_itself_back_or_its_sharpening(strategy: DistillationStrategy) -> None:
    for k in range(K):
        alone = rows_of(knowledge_for(strategy), [k])
        combined = tensors_of(strategy.aggregate(alone))
        for name, tensor in tensors_of(alone).items():
            expected = tensor[0]
            if isinstance(strategy, DSFL) and strategy.sharpening == "era":
                expected = (expected / strategy.era_temperature).softmax(-1)
            got = combined[name]
            torch.testing.assert_close(got.reshape(expected.shape), expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("strategy", VARIANTS, ids=variant_name)
def test_equal_clients_are_as_good_as_one(strategy: DistillationStrategy) -> None:
    given = knowledge_for(strategy)
    alone = tensors_of(strategy.aggregate(rows_of(given, [1])))
    thrice = tensors_of(strategy.aggregate(rows_of(given, [1, 1, 1])))
    for name, tensor in alone.items():
        torch.testing.assert_close(thrice[name], tensor, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("strategy", LABELLING, ids=variant_name)
def test_soft_labels_for_no_samples_are_aggregated_to_none(strategy: DistillationStrategy) -> None:
    empty = SoftLabels(torch.zeros(K, 0, C), space_of(strategy))
    assert strategy.aggregate(empty).shape == (0, C)


@pytest.mark.parametrize("strategy", ON_THE_SIMPLEX, ids=variant_name)
def test_rows_of_probabilities_stay_on_the_simplex(strategy: DistillationStrategy) -> None:
    combined = strategy.aggregate(labels("probabilities", mask=MASK))
    torch.testing.assert_close(combined.sum(-1), torch.ones(N, dtype=F64))
    assert bool((combined >= 0).all())


@pytest.mark.parametrize("strategy", VARIANTS, ids=variant_name)
def test_the_wrong_kind_is_a_type_error_that_names_the_right_one(
    strategy: DistillationStrategy,
) -> None:
    wanted = strategy.uploads()
    assert wanted is not None
    wrong: list[object] = [None, torch.zeros(K, N, C), [1.0]]
    wrong.append(weights() if wanted is SoftLabels else labels())
    for knowledge in wrong:
        with pytest.raises(TypeError, match=f"{strategy.name()}.aggregate.*{wanted.__name__}"):
            strategy.aggregate(knowledge)


@pytest.mark.parametrize(("name", "cls"), ALL)
def test_strategies_are_frozen_keyword_only_and_can_be_hashed_and_pickled(
    name: str, cls: type[DistillationStrategy]
) -> None:
    strategy = cls()
    assert strategy == cls()
    assert hash(strategy) == hash(cls())
    assert pickle.loads(pickle.dumps(strategy)) == strategy
    assert copy.deepcopy(strategy) == strategy
    assert strategy.name() == name
    with pytest.raises(TypeError):
        cls("positional")  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        cls(no_such_setting=1)
    for setting in fields(cls):  # type: ignore[arg-type]
        assert isinstance(getattr(strategy, setting.name), bool | int | float | str)
        with pytest.raises(FedkdError, match=r"keep what lasts .* in server.state"):
            setattr(strategy, setting.name, getattr(strategy, setting.name))
    assert strategy.settings() == {
        f.name: f.default
        for f in fields(cls)  # type: ignore[arg-type]
    }


def test_strategies_differ_by_their_settings() -> None:
    assert DSFL() != DSFL(sharpening="mean")
    assert len({DSFL(), DSFL(era_temperature=0.1), DSFL(era_temperature=0.2)}) == 2
    different: list[DistillationStrategy] = [FedMD(), DSFL(), FedAvg(), LocalOnly()]
    assert len(set(different)) == 4


@pytest.mark.parametrize(
    ("cls", "settings"),
    [
        (DSFL, {"sharpening": "avg"}),
        (DSFL, {"era_temperature": 0.0}),
        (DSFL, {"era_temperature": -0.1}),
        (DSFL, {"era_temperature": math.nan}),
        (FedMD, {"digest": "l1"}),
        (FedMD, {"transfer_epochs": -1}),
    ],
)
def test_settings_that_would_be_silently_wrong_are_refused(
    cls: type[DistillationStrategy], settings: dict[str, Any]
) -> None:
    ((name, _),) = settings.items()
    with pytest.raises(FedkdError, match=name.replace("_", ".")):
        cls(**settings)


# --- Files, names and facts ----------------------------------------------------------------------


def test_every_file_holds_one_strategy_which_is_exported_and_registered() -> None:
    folder = Path(package.__file__ or "").parent
    names = []
    for path in sorted(folder.glob("*.py")):
        if path.stem == "__init__":
            continue
        module = import_module(f"strategies.{path.stem}")
        own = [
            value
            for value in vars(module).values()
            if isinstance(value, type)
            and issubclass(value, DistillationStrategy)
            and value.__module__ == module.__name__
        ]
        assert len(own) == 1, path.name
        assert own[0].__name__.lower() == path.stem
        names.append(own[0].__name__)
    assert sorted(package.__all__) == sorted(names)
    for name in names:
        assert strategies()[name] is getattr(package, name)
        assert type(find(name)) is getattr(package, name)


@pytest.mark.parametrize(("name", "cls"), ALL)
def test_a_strategy_is_final_and_says_what_it_is(
    name: str, cls: type[DistillationStrategy]
) -> None:
    assert cls.__bases__ == (DistillationStrategy,)
    assert isinstance(cls.facts, Facts)
    assert cls.__doc__
    source = import_module(cls.__module__).__doc__ or ""
    assert cls.facts.paper == "none" or cls.facts.paper in source


@pytest.mark.parametrize(("name", "student"), BYTES)
def test_a_strategy_moves_the_bytes_that_it_declares(name: str, student: str) -> None:
    """From the second round on: in the first there is no knowledge to send down yet."""
    cls = strategies()[name]
    model = build(student, (1, 8, 8), CLASSES)
    sizes = {
        "P": P,
        "C": CLASSES,
        "I": 0,
        "S": sum(t.numel() * t.element_size() for t in model.state_dict().values()),
    }
    up, down = (eval(formula, {}, sizes) for formula in (cls.facts.up, cls.facts.down))
    rows = federate(tiny(strategy=name, student=student, num_server_rounds=3)).rows
    assert [row["dropped"] for row in rows] == [{}] * 3
    for row in rows:
        assert row["bytes_up"] == K * up
        assert sum(row["bytes_up_by_tensor"].values()) == K * up
        assert row["wire_bytes_up"] > row["bytes_up"]
    for row in rows[1:]:
        assert row["bytes_down"] == K * down
        assert row["wire_bytes_down"] > row["bytes_down"]
    assert rows[0]["bytes_down"] == 0  # all are asked for, which takes no list


@pytest.mark.parametrize(("name", "cls"), ASKING)
def test_fewer_samples_cost_fewer_bytes(name: str, cls: type[DistillationStrategy]) -> None:
    asked = 11
    sizes = {"P": asked, "C": CLASSES, "I": math.ceil(P / 8)}
    rows = federate(tiny(strategy=name, public_per_round=asked, num_server_rounds=2)).rows
    assert rows[1]["bytes_up"] == K * eval(cls.facts.up, {}, sizes)
    assert rows[1]["bytes_down"] == K * eval(cls.facts.down, {}, sizes)


def test_facts_that_an_experiment_does_not_meet_are_refused() -> None:
    class NeedsBoth(DistillationStrategy):
        facts = Facts("none", "0", "0", public_labels=True, server_model="required")

    NeedsBoth().check(Experiment(server_model="mlp-20"))
    with pytest.raises(FedkdError, match=r"public-labels = false.*NeedsBoth"):
        NeedsBoth().check(Experiment(public_labels=False, server_model="mlp-20"))
    with pytest.raises(FedkdError, match=r"server-model = 'none'.*NeedsBoth"):
        NeedsBoth().check(Experiment())


# --- FedMD's and DS-FL's rounds ------------------------------------------------------------------


def test_fedmd_begins_with_transfer_learning() -> None:
    first = FedMD(transfer_epochs=3).phases(1)
    transfer = Fit("transfer", "teacher", public={"ce": 1.0}, epochs=3)
    assert first == [transfer, Revisit(), Predict()]
    assert FedMD.closes == "revisit"
    for number in (2, 3, 10):
        assert [type(p) for p in FedMD().phases(number)] == [Fit, Fit, Predict]
        assert FedMD().phases(number)[0] == Fit("digest", public={"kl": "alpha", "ce": "1-alpha"})
        assert FedMD(digest="mae").phases(number)[0] == Fit("digest", public={"mae_logits": 1.0})


def test_fedmds_transfer_trains_on_public_labels_and_is_skipped_without() -> None:
    with_labels = federate(tiny(strategy="FedMD")).rows[0]
    assert "accuracy_after_transfer" in with_labels
    without = federate(tiny(strategy="FedMD", public_labels=False)).rows[0]
    assert "accuracy_after_transfer" not in without
    assert without["dropped"] == {}


def test_no_transfer_epochs_are_no_transfer() -> None:
    try:
        strategy = FedMD(transfer_epochs=0)
    except FedkdError:
        return  # refusing is as good
    row = federate(tiny(), strategy=strategy).rows[0]
    assert "loss_transfer" not in row


def test_dsfl_digests_revisits_and_answers_with_probabilities() -> None:
    kinds = [getattr(p, "name", "") for p in DSFL().phases(1)]
    assert kinds == ["digest", "revisit", "predict"]
    assert DSFL().phases(1)[-1] == Predict("probabilities")
    assert DSFL.closes == "digest"


def test_fedavg_loads_trains_the_student_and_sends_it() -> None:
    assert FedAvg().phases(1) == [Load(), Revisit(model="student"), SendWeights()]


@pytest.mark.parametrize("digest", ["kl", "mae"])
def test_fedmd_runs_with_either_digest(digest: str) -> None:
    strategy = find("FedMD", f"digest={digest}")
    done = federate(tiny(num_server_rounds=2), strategy=strategy)
    assert done.rows[1]["dropped"] == {}
    assert 0 <= done.rows[1]["accuracy_after_digest"] <= 1
    assert done.rows[1]["loss_digest"] > 0


# --- A strategy of one's own ---------------------------------------------------------------------


def test_a_strategy_without_a_rule_says_so_when_it_has_something_to_aggregate() -> None:
    class Lazy(DistillationStrategy):
        facts = Facts("none", "0", "0")

    with pytest.raises(FedkdError, match="Lazy defines neither aggregate nor update"):
        federate(tiny(), strategy=Lazy())


def test_the_base_is_abstract() -> None:
    with pytest.raises(TypeError):
        DistillationStrategy()


def test_a_strategy_without_facts_is_refused_by_name() -> None:
    class Silent(DistillationStrategy):
        def aggregate(self, knowledge: SoftLabels) -> Tensor:
            return knowledge.mean_logits()

    with pytest.raises((FedkdError, TypeError), match=r"Silent.*facts"):
        federate(tiny(), strategy=Silent())


def test_a_rule_may_return_fewer_samples_or_none_at_all() -> None:
    """`update` may drop samples (SelectiveFD); with none left, the clients just do not digest."""

    class Picky(DistillationStrategy):
        facts = Facts("none", "P*C*4", "0")
        rows: int = 0

        def update(self, replies: Any, server: Any) -> SoftLabels:
            kept: SoftLabels = replies.labels.keep(torch.arange(self.rows))
            return SoftLabels.shared(kept.mean_logits(), kept.samples, "logits")

    for rows in (5, 0):
        done = federate(tiny(num_server_rounds=3), strategy=Picky(rows=rows))
        assert [row["dropped"] for row in done.rows] == [{}] * 3
        assert ("loss_digest" in done.rows[1]) == (rows > 0)


def test_a_request_may_be_empty() -> None:
    """SCARLET asks for nothing when all is cached, FedGEMS when all is known."""

    class Sated(DistillationStrategy):
        facts = Facts("none", "0", "0")

        def request(self, server: Any) -> Tensor:
            return torch.empty(0, dtype=torch.int64)

        def update(self, replies: Any, server: Any) -> None:
            assert replies.labels.values.shape == (K, 0, CLASSES)

    for student in ("mlp-8", "lenet"):
        done = federate(tiny(student=student, num_server_rounds=2), strategy=Sated())
        assert [row["dropped"] for row in done.rows] == [{}] * 2
        assert [row["bytes_up"] for row in done.rows] == [0, 0]


def test_a_strategy_can_be_pickled_and_used_again_after_a_run() -> None:
    strategy = DSFL()
    first = federate(tiny(num_server_rounds=2), strategy=strategy)
    assert pickle.loads(pickle.dumps(strategy)) == DSFL()
    assert len(pickle.dumps(strategy)) < 1000
    second = federate(tiny(num_server_rounds=2), strategy=strategy)
    for once, again in zip(first.rows, second.rows, strict=True):
        assert {**once, "seconds": 0} == {**again, "seconds": 0}

"""What a client measures: accuracy and agreement, when it is asked for."""

from __future__ import annotations

from typing import Any

import pytest
from executing import (
    ROWS,
    USUAL,
    C,
    K,
    assert_same_state,
    images,
    module,
    received,
    reports,
    run,
    state,
)
from federation_tools import tiny

from fedkd.clients.states import INITIAL
from fedkd.data.federated import federated_data
from fedkd.phases import Digest, Phase, Predict, Revisit, SendWeights


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

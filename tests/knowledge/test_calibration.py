"""What soft labels say, against scipy, plain loops and numbers worked out by hand."""

from __future__ import annotations

import json
from math import log
from typing import Any

import numpy as np
import pytest
import torch
from federation_tools import tiny
from scipy.special import softmax
from scipy.stats import entropy as scipy_entropy
from torch import Tensor

import fedkd
from fedkd.data.federated import federated_data
from fedkd.knowledge import SoftLabels
from fedkd.knowledge.calibration import HISTOGRAM_BINS, entropy, label_details, label_statistics
from fedkd.records import Run

N, C, P = 53, 7, 97


def drawn(count: int = 1, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(count, N, C, generator=torch.Generator().manual_seed(3))


def samples() -> Tensor:
    return torch.randperm(P, generator=torch.Generator().manual_seed(2))[:N]


def truth() -> Tensor:
    return torch.randint(0, C - 1, (P,), generator=torch.Generator().manual_seed(5))


def slow_error(probabilities: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
    """Guo et al. 2017, equation 3, image by image."""
    total = 0.0
    for m in range(bins):
        inside = [
            n for n, row in enumerate(probabilities) if m / bins < row.max() <= (m + 1) / bins
        ]
        if inside:
            right = np.mean([probabilities[n].argmax() == labels[n] for n in inside])
            sure = np.mean([probabilities[n].max() for n in inside])
            total += len(inside) / len(probabilities) * abs(right - sure)
    return total


@pytest.mark.parametrize("scale", [0.1, 3.0, 40.0])
def test_entropy_is_that_of_scipy(scale: float) -> None:
    logits = drawn(3, scale).double()
    expected = scipy_entropy(softmax(logits.numpy(), -1), axis=-1)
    assert entropy(logits).numpy() == pytest.approx(expected, abs=1e-12)
    assert entropy(logits).shape == (3, N)


def test_entropy_of_what_is_certain_is_nothing_and_of_what_is_open_ln_c() -> None:
    certain = torch.tensor([[1e30, 0.0, -1e30]])
    assert float(entropy(certain)) == 0
    assert float(entropy(torch.full((C,), -3.0).double())) == pytest.approx(log(C))


@pytest.mark.parametrize("space", ["logits", "probabilities"])
@pytest.mark.parametrize("tau", [1.0, 4.0, 0.5])
def test_the_numbers_of_a_round_are_those_of_a_plain_loop(space: Any, tau: float) -> None:
    logits = drawn()
    values = logits if space == "logits" else logits.double().softmax(-1).float()
    said = label_statistics(SoftLabels(values, space, samples()), truth(), tau)
    p = softmax(logits[0].double().numpy(), -1)
    at_tau = softmax(logits[0].double().numpy() / tau, -1)
    labels = truth()[samples()].numpy()
    assert said["knowledge_entropy"] == pytest.approx(scipy_entropy(p, axis=1).mean(), rel=1e-5)
    assert said["knowledge_entropy_at_tau"] == pytest.approx(
        scipy_entropy(at_tau, axis=1).mean(), rel=1e-5
    )
    assert said["knowledge_accuracy"] == np.mean(p.argmax(1) == labels)
    assert said["knowledge_ece"] == pytest.approx(slow_error(p, labels), abs=1e-6)


def test_of_several_sets_all_rows_that_are_there_count() -> None:
    logits = drawn(3)
    mask = torch.rand(3, N, generator=torch.Generator().manual_seed(1)) > 0.4
    logits[~mask] = torch.nan
    said = label_statistics(SoftLabels(logits, "logits", samples(), mask=mask), truth(), 2.0)
    rows = [
        (logits[k, n].double().numpy(), int(truth()[samples()[n]]))
        for k in range(3)
        for n in range(N)
        if mask[k, n]
    ]
    p = softmax(np.stack([row for row, _ in rows]), -1)
    labels = np.array([label for _, label in rows])
    assert said["knowledge_entropy"] == pytest.approx(scipy_entropy(p, axis=1).mean())
    assert said["knowledge_accuracy"] == pytest.approx(np.mean(p.argmax(1) == labels))
    assert said["knowledge_ece"] == pytest.approx(slow_error(p, labels))
    more = label_details(SoftLabels(logits, "logits", samples(), mask=mask), truth())
    assert sum(more["entropy_histogram"]) == len(rows) == sum(more["reliability"]["count"])


def test_where_nobody_knows_the_classes_there_is_no_accuracy() -> None:
    labels = SoftLabels(drawn(), "logits", samples())
    said = label_statistics(labels, None, 2.0)
    assert said["knowledge_accuracy"] is None
    assert said["knowledge_ece"] is None
    assert said["knowledge_entropy"] > 0
    more = label_details(labels, None)
    assert more["by"] == "predicted"
    assert more["reliability"] is None
    p = softmax(drawn()[0].double().numpy(), -1)
    for c, row in enumerate(more["by_class"]):
        chosen = p[p.argmax(1) == c]
        assert row == pytest.approx(chosen.mean(0), abs=1e-6) if len(chosen) else row is None


def test_of_no_samples_nothing_is_said() -> None:
    assert label_statistics(SoftLabels(torch.zeros(1, 0, C), "logits"), truth(), 2.0) == {}


def test_means_by_class_stand_in_the_row_of_the_true_class() -> None:
    said = label_details(SoftLabels(drawn(), "logits", samples()), truth())
    p, labels = softmax(drawn()[0].double().numpy(), -1), truth()[samples()].numpy()
    assert said["by"] == "label"
    assert len(said["by_class"]) == C
    for c, row in enumerate(said["by_class"]):
        if c == C - 1:  # a class without images
            assert row is None
        else:
            assert row == pytest.approx(p[labels == c].mean(0), abs=1e-6)
            assert sum(row) == pytest.approx(1, abs=1e-5)


def test_the_histogram_is_that_of_numpy() -> None:
    said = label_details(SoftLabels(drawn(), "logits", samples()), truth())
    bits = scipy_entropy(softmax(drawn()[0].double().numpy(), -1), axis=1)
    expected, _ = np.histogram(bits, HISTOGRAM_BINS, (0, log(C)))
    assert said["entropy_histogram"] == expected.tolist()
    assert json.dumps(said, allow_nan=False)


@pytest.mark.parametrize("classes", [2, 5, 7, 10, 13, 47, 100])
@pytest.mark.parametrize("space", ["logits", "probabilities"])
def test_every_sample_is_in_the_histogram_also_the_one_that_is_quite_open(
    classes: int, space: Any
) -> None:
    """Whose entropy is ln C, and after rounding perhaps a bit more."""
    values = torch.full((1, 3, classes), 1 / classes)
    said = label_details(SoftLabels(values, space), None)
    assert said["entropy_histogram"] == [0] * (HISTOGRAM_BINS - 1) + [3]


@pytest.mark.parametrize("classes", [2, 5, 10])
def test_and_the_one_that_is_certain(classes: int) -> None:
    values = torch.eye(classes)[None]  # as of one bit a class
    labels = SoftLabels(values, "probabilities")
    assert label_details(labels, None)["entropy_histogram"] == [classes] + [0] * (
        HISTOGRAM_BINS - 1
    )
    said = label_statistics(labels, torch.arange(classes), 5.0)
    assert said["knowledge_entropy"] == pytest.approx(0, abs=1e-9)
    assert (said["knowledge_accuracy"], said["knowledge_ece"]) == (1.0, pytest.approx(0))


# --- In a run ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    folder = str(tmp_path_factory.mktemp("runs"))
    return {
        name: fedkd.run(tiny(strategy=name, run_dir=folder, num_server_rounds=3, tau=3.0, **keys))
        for name, keys in (
            ("DSFL", {"public_labels": False}),
            ("FedMD", {}),
            ("FedAvg", {}),
            ("KTpFL", {"fraction_train": 0.67}),
        )
    }


def knowledge_of(run: Run) -> list[dict[str, Any]]:
    path = run.path / "knowledge.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_rounds_with_new_soft_labels_have_a_line(runs: dict[str, Run]) -> None:
    for name, run in runs.items():
        lines = knowledge_of(run)
        fields = [[f for f in row if f.startswith("knowledge_e")] for row in run.rounds]
        if name == "FedAvg":
            assert lines == []
            assert fields == [[], [], []]
            continue
        assert [line["round"] for line in lines] == [1, 2, 3]
        for line, row in zip(lines, run.rounds, strict=True):
            reliability = line["reliability"]
            count = sum(reliability["count"])
            assert sum(line["entropy_histogram"]) == count
            right = sum(
                n * (a or 0)
                for n, a in zip(reliability["count"], reliability["accuracy"], strict=True)
            )
            assert right / count == pytest.approx(row["knowledge_accuracy"])
            assert 0 < row["knowledge_entropy"] < row["knowledge_entropy_at_tau"] < log(10)
            assert line["by"] == "label"  # which the simulator knows also where the clients do not


def test_who_holds_what_is_written_down(runs: dict[str, Run]) -> None:
    run = runs["DSFL"]
    said, data = json.loads((run.path / "shards.json").read_text()), federated_data(run.experiment)
    assert data.train.labels is not None
    for shard, counts in zip(data.shards, said["counts"], strict=True):
        drawn = data.train.labels[shard].tolist()
        assert counts == [drawn.count(c) for c in range(10)]
    assert sum(said["public"]) == 37
    assert sum(said["test"]) == 61
    assert said["classes"] == [str(c) for c in range(10)]

"""One experiment, two engines: the same accuracies and soft labels, in this process and on Ray."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, Literal

import pytest
import torch
from federation_tools import ROUGH, tiny
from torch import Tensor

import fedkd
from fedkd.engines.preflight import check
from fedkd.engines.run import run
from fedkd.errors import FedkdError
from fedkd.experiment import Experiment
from fedkd.federation import acceptance
from fedkd.federation.server import Replies
from fedkd.knowledge import ClassMeans, Knowledge, SoftLabels, Weights
from fedkd.records import Row, Run
from fedkd.records.callbacks import EachRound

Engine = Literal["cohort", "flower"]
K, ROUNDS = 3, 3

# Without a plan each engine would measure its own, and plans differ by more than engines do.
CASES: dict[str, dict[str, Any]] = {
    "DSFL": {
        "strategy": "DSFL",
        "public_per_round": 11,
        "server_model": "mlp-12",
        "plan": "stacked",
    },
    "FedMD-teacher": {
        "strategy": "FedMD",
        "teacher": "mlp-64",
        "public_labels": False,
        "plan": "stacked-2",
    },
    "FedMD-mixed": {
        "strategy": "FedMD",
        "student": "mlp-20,lenet,resnet-8",
        "plan": "mlp-20=stacked, lenet=loop, resnet-8=loop",
    },
    "CFD": {  # codecs, memories and a model at the server
        "strategy": "CFD",
        "distill_epochs": 30,
        "local_epochs": 3,
        "server_model": "mlp-20",
        "public_labels": False,
        "fraction_train": 0.6,
        "plan": "stacked",
    },
    "SelectiveFD": {  # a procedure with a state, and answers to some of the samples
        "strategy": "SelectiveFD",
        "strategy_config": "ambiguity=2",
        "public_labels": False,
        "plan": "stacked",
    },
    "FedProto": {"strategy": "FedProto", "student": "mlp-20", "plan": "stacked"},
    "FedAvg": {
        "strategy": "FedAvg",
        "student": "mlp-20,mlp-20,lenet",
        "fraction_train": 0.6,
        "plan": "mlp-20=stacked, lenet=loop",
    },
}


@dataclass(frozen=True)
class Told:
    """A run and what its clients told the server, round by round."""

    run: Run
    answers: list[dict[str, Tensor]]


def told(experiment: Experiment, monkeypatch: pytest.MonkeyPatch) -> Told:
    """Run an experiment by its public name and listen in on the server."""
    answers: list[dict[str, Tensor]] = []
    gather = acceptance._replies

    def listen(*arguments: Any) -> Replies:
        replies = gather(*arguments)
        answers.append(tensors_of(replies.knowledge))
        return replies

    with monkeypatch.context() as patch:
        patch.setattr(acceptance, "_replies", listen)
        return Told(run(experiment), answers)


def tensors_of(knowledge: Knowledge | None) -> dict[str, Tensor]:
    if isinstance(knowledge, ClassMeans):
        return {"values": knowledge.values, "counts": knowledge.counts}
    if isinstance(knowledge, SoftLabels):
        return {
            "values": knowledge.values,
            "samples": knowledge.samples,
            "clients": knowledge.clients,
            "num_examples": knowledge.num_examples,
        }
    assert isinstance(knowledge, Weights)
    return {
        f"{model}/{name}": tensor
        for model, part in knowledge.by_model.items()
        for name, tensor in part.tensors.items()
    }


def experiment_of(case: str, engine: Engine, folder: Path) -> Experiment:
    return tiny(
        **CASES[case],
        engine=engine,
        num_server_rounds=ROUNDS,
        partition="dirichlet",
        run_dir=str(folder),
        name=f"{case}-{engine}",
    )


@cache
def reference(case: str) -> Told:
    """Run a case in this process, once."""
    with pytest.MonkeyPatch.context() as patch:
        return told(experiment_of(case, "cohort", Path(mkdtemp())), patch)


def assert_same_row(got: Row, expected: Row) -> None:
    assert got.keys() == expected.keys()
    for name in got.keys() - set(ROUGH):
        if name.startswith("loss_") or name == "agreement":
            assert got[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-5), name
        else:
            assert got[name] == expected[name], name


QUICK = "FedMD-mixed"
"""The case of `make test`; `make test-slow` has all."""


def slow(case: str) -> list[pytest.MarkDecorator]:
    return [pytest.mark.slow] * (case != QUICK)


@pytest.mark.parametrize(
    ("case", "engine"),
    [
        *(pytest.param(case, "cohort", marks=slow(case)) for case in ("CFD", QUICK)),
        *(pytest.param(case, "flower", marks=[pytest.mark.ray, *slow(case)]) for case in CASES),
    ],
)
def test_both_engines_give_the_same_run(
    case: str, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accuracies by client and round, bytes, and every number that a client sends to 1e-5."""
    expected = reference(case)
    got = told(experiment_of(case, engine, tmp_path), monkeypatch)
    assert len(got.run.rounds) == ROUNDS
    for row, other in zip(got.run.rounds, expected.run.rounds, strict=True):
        assert row["dropped"] == {}
        assert_same_row(row, other)
    assert len(got.answers) == ROUNDS
    for answer, other_answer in zip(got.answers, expected.answers, strict=True):
        assert answer.keys() == other_answer.keys()
        for name, tensor in answer.items():
            torch.testing.assert_close(tensor, other_answer[name], rtol=0, atol=1e-5)
    assert_same_result(got.run, expected.run)
    assert got.run.experiment.engine == engine
    assert got.run.experiment.plan == CASES[case]["plan"]
    architectures = len(CASES[case].get("student", "mlp-8").split(","))
    states = sorted(p.name for p in (got.run.path / "clients").glob("*.safetensors"))
    assert states == [f"{residue}-0.safetensors" for residue in range(architectures)]


def assert_same_result(got: Run, expected: Run) -> None:
    assert got.client_accuracy == expected.client_accuracy
    assert got.server_accuracy == expected.server_accuracy
    assert got.accuracy == pytest.approx(expected.accuracy, abs=1e-12)
    assert (got.bytes_up, got.bytes_down) == (expected.bytes_up, expected.bytes_down)
    assert got.result["client_own_accuracy"] == expected.result["client_own_accuracy"]


@pytest.mark.parametrize("case", [pytest.param(case, marks=slow(case)) for case in CASES])
def test_a_case_is_worth_comparing(case: str) -> None:
    """Clients differ, rounds differ, and knowledge is digested."""
    found = reference(case)
    accuracies = [row["client_accuracy_after_revisit"] for row in found.run.rounds]
    assert len({tuple(row) for row in accuracies}) > 1
    assert len({value for row in accuracies for value in row}) > 2
    if CASES[case]["strategy"] not in ("FedAvg", "FedProto"):
        assert all("loss_digest" in row for row in found.run.rounds[1:])
        first, second = found.answers[0]["values"], found.answers[1]["values"]
        assert not torch.equal(first, second)
        assert not torch.equal(first[0], first[1])


@pytest.mark.slow
def test_the_engine_in_this_process_knows_nothing_of_ray() -> None:
    code = (
        "import sys; import fedkd; assert 'torch' not in sys.modules; import fedkd.engines.in_process;"
        "assert 'torch' in sys.modules; assert 'ray' not in sys.modules"
    )
    root = str(Path(fedkd.__file__).parent.parent)
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)


# --- Running an experiment -----------------------------------------------------------------------


def test_a_run_is_in_its_folder_when_it_comes_back(tmp_path: Path) -> None:
    seen: list[Row] = []
    experiment = tiny(
        strategy="ds-fl", num_server_rounds=2, plan="stacked", run_dir=str(tmp_path), name="mine"
    )
    found = run(experiment, [EachRound(seen.append)])
    assert found.path == tmp_path / "mine"
    assert found.rounds == seen
    assert Run.load(tmp_path / "mine") == found
    assert found.experiment == experiment.replace(strategy="DSFL")
    assert (
        found.client_accuracy
        == json.loads((found.path / "result.json").read_text())["client_accuracy"]
    )
    assert fedkd.run is run


def test_a_nameless_run_is_called_after_what_it_does(tmp_path: Path) -> None:
    experiment = tiny(strategy="local-only", run_dir=str(tmp_path))
    first, second = run(experiment), run(experiment)
    assert first.path.name == "localonly-digits-seed5"
    assert second.path.name == "localonly-digits-seed5-2"
    assert first.client_accuracy == second.client_accuracy
    assert first.experiment.name == "localonly-digits-seed5"


def test_a_strategy_from_a_file_runs_and_is_recorded_as_it_was_given(tmp_path: Path) -> None:
    path = tmp_path / "first_client.py"
    path.write_text(
        "from fedkd.strategy import DistillationStrategy, Facts\n\n"
        "class First(DistillationStrategy):\n"
        "    facts = Facts('none', 'P*C*4', 'P*C*4')\n\n"
        "    def aggregate(self, labels):\n"
        "        return labels.values[0]\n"
    )
    name = f"{path}:First"
    found = run(tiny(strategy=name, num_server_rounds=2, run_dir=str(tmp_path / "runs")))
    assert found.experiment.strategy == name
    assert found.rounds[1]["dropped"] == {}


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"strategy": "FedMB"}, r"strategy = 'FedMB'.*did you mean 'FedMD'"),
        ({"strategy": "DSFL", "strategy_config": "era=1"}, "strategy-config = 'era=1'"),
        ({"student": "mlp-8,lenett"}, r"student = 'lenett'.*did you mean 'lenet'"),
        ({"student": "mlp-8,,lenet"}, "student = ''"),
        ({"teacher": "mlp"}, "teacher = 'mlp'"),
        ({"server_model": "resnet8"}, "server-model = 'resnet8'.*did you mean 'resnet-8'"),
        ({"student": "federation_tools:bomb"}, r"student = 'federation_tools:bomb'.*shape"),
        (
            {"student": "federation_tools:nothing"},
            "student = 'federation_tools:nothing'.*no .*'nothing'",
        ),
        ({"public_size": None, "public_per_round": 31}, r"public-per-round = 31.*has 30 images"),
        ({"train_size": 5000}, "train-size = 5000"),
        ({"dataset": "digitz"}, "did you mean 'digits'"),
        ({"device": "abacus"}, "device = 'abacus'"),
    ],
)
def test_what_is_wrong_is_found_before_anything_is_written(
    tmp_path: Path, keys: dict[str, Any], reason: str
) -> None:
    experiment = tiny(**{"run_dir": str(tmp_path / "runs"), "name": "x", **keys})
    for attempt in (check, run):
        with pytest.raises(FedkdError, match=reason) as caught:
            attempt(experiment)
        assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_run_does_not_go_into_a_folder_that_exists(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious").write_text("keep me")
    with pytest.raises(FedkdError, match=r"name = 'mine'.*exists"):
        run(tiny(run_dir=str(tmp_path), name="mine"))
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["precious"]

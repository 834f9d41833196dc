"""Clients whose process dies or who raise: the round names them, and they are back in the next."""

from __future__ import annotations

from pathlib import Path

import pytest
from accident_models import FOLDER

import fedkd


def _experiment(folder: Path, engine: str) -> fedkd.Experiment:
    return fedkd.Experiment(
        dataset="digits",
        num_clients=3,
        student="mlp-20,accident_models:dying,accident_models:raising",
        strategy="LocalOnly",
        num_server_rounds=5,
        public_size=97,
        min_partition_size=11,
        batch_size=37,
        engine=engine,
        plan="loop",  # not measured, as these students count how often they are trained
        run_dir=str(folder / "runs"),
        name="failures",
    )


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    monkeypatch.setenv("FEDKD_DATA_DIR", str(tmp_path / "data"))
    return tmp_path


@pytest.mark.ray
@pytest.mark.slow
def test_a_dead_process_costs_one_round_of_one_client(folder: Path) -> None:
    run = fedkd.run(_experiment(folder, "flower"))
    assert [row["dropped"] for row in run.rounds] == [
        {},
        {"1": "client process died"},
        {"2": "RuntimeError: out of luck (accident_models.py, line 207)"},
        {},
        {},
    ]
    assert [row["events"] for row in run.rounds] == [{}, {"client-died": 1}, {}, {}, {}]
    assert [row["answered"] for row in run.rounds] == [
        [0, 1, 2],
        [0, 2],
        [0, 1],
        [0, 1, 2],
        [0, 1, 2],
    ]
    assert None not in run.client_accuracy


def test_in_process_a_client_that_raises_costs_nobody_else(folder: Path) -> None:
    student = "mlp-20,mlp-7,accident_models:raising"
    run = fedkd.run(_experiment(folder, "cohort").replace(student=student))
    alone = fedkd.run(
        _experiment(folder, "cohort").replace(student="mlp-20,mlp-7,mlp-7", name="healthy")
    )
    assert [row["dropped"] for row in run.rounds] == [
        {},
        {},
        {"2": "RuntimeError: out of luck (accident_models.py, line 207)"},
        {},
        {},
    ]
    assert run.client_accuracy[:2] == alone.client_accuracy[:2]

"""What a round and a run leave in their records."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from exchanges import SENDING, K
from federation_tools import (
    P,
    federate,
    tiny,
)
from flwr.app import Message

from fedkd.clients.instructions import Instruction
from fedkd.records.folder import RunFolder


def no_constants(name: str) -> None:
    raise AssertionError(f"{name} in JSON")


def test_a_rounds_record_is_on_disk_before_the_next_begins(tmp_path: Path) -> None:
    experiment = tiny(strategy="DSFL", num_server_rounds=4, run_dir=str(tmp_path), name="run")
    path = RunFolder.create(experiment, "").path / "rounds.jsonl"
    found: dict[int, int] = {}

    def count(instruction: Instruction, message: Message, reply: Message) -> Message:
        lines = path.read_text().splitlines() if path.exists() else []
        found[instruction.round] = len(lines)
        assert [json.loads(line)["round"] for line in lines] == list(range(1, instruction.round))
        return reply

    done = federate(experiment, count)
    assert found == {number: number - 1 for number in range(1, 6)}
    text = path.read_text()
    assert text.endswith("\n")
    written = [json.loads(line, parse_constant=no_constants) for line in text.splitlines()]
    assert written == done.rows
    result = json.loads((path.parent / "result.json").read_text(), parse_constant=no_constants)
    assert result["rounds"] == 4


def test_a_record_has_the_fields_that_were_promised(tmp_path: Path) -> None:
    done = federate(tiny(strategy="DSFL", num_server_rounds=2, num_clients=4, fraction_train=0.5))
    row = done.rows[1]
    promised = {
        "round", "sampled", "answered", "dropped", "knowledge_round", "accuracy_after_digest",
        "accuracy_after_revisit", "client_accuracy_after_digest", "client_accuracy_after_revisit",
        "own_accuracy", "server_accuracy", "agreement", "bytes_up", "bytes_down",
        "wire_bytes_up", "wire_bytes_down", "seconds", "accepted",
    }  # fmt: skip
    assert promised <= set(row)
    assert row["round"] == 2
    assert row["knowledge_round"] == 1
    assert row["server_accuracy"] is None
    for name in ("accuracy_after_digest", "accuracy_after_revisit", "own_accuracy"):
        listed = row[f"client_{name}"]
        assert len(listed) == len(row["answered"]) == 2
        assert all(0 <= value <= 1 for value in listed)
        assert row[name] == pytest.approx(sum(listed) / 2)
    for direction in ("up", "down"):
        by_tensor = row[f"bytes_{direction}_by_tensor"]
        assert row[f"bytes_{direction}"] == sum(by_tensor.values())
        for kind in ("bytes", "wire_bytes"):
            by_client = row[f"{kind}_{direction}_by_client"]
            assert len(by_client) == len(row["sampled"]) == 2
            assert row[f"{kind}_{direction}"] == sum(by_client)
        assert all(type(size) is int for size in by_tensor.values())
    assert {"digest", "revisit", "predict", "aggregate", "round"} <= set(row["seconds"])
    assert all(value >= 0 for value in row["seconds"].values())


def test_the_result_sums_up_the_run(tmp_path: Path) -> None:
    experiment = tiny(strategy="DSFL", num_server_rounds=3, run_dir=str(tmp_path), name="run")
    folder = RunFolder.create(experiment, "")
    done = federate(experiment)
    result = json.loads((folder.path / "result.json").read_text())
    assert len(result["client_accuracy"]) == K
    assert result["accuracy"] == pytest.approx(sum(result["client_accuracy"]) / K)
    assert result["own_accuracy"] == pytest.approx(sum(result["client_own_accuracy"]) / K)
    assert result["test_size"] == 61
    assert result["reports"] == "server"
    assert result["dropped"] == {}
    assert result["bytes_up"] == sum(row["bytes_up"] for row in done.rows)
    closing = K * P * 10 * 4  # values, and nothing asked
    assert result["bytes_down"] == sum(row["bytes_down"] for row in done.rows) + closing
    assert result["wire_bytes_up"] > sum(row["wire_bytes_up"] for row in done.rows)
    assert result["wire_bytes_down"] > sum(row["wire_bytes_down"] for row in done.rows) + closing
    assert result["environment"]["device"] == "cpu"


@pytest.mark.parametrize("name", [*SENDING, "LocalOnly"])
def test_the_closing_exchange_ends_with_the_strategys_last_phase(name: str) -> None:
    done = federate(tiny(strategy=name, num_server_rounds=2))
    expected = {
        "FedMD": ["digest", "revisit"],
        "DSFL": ["digest"],
        "FedAvg": ["load"],
        "LocalOnly": [],
    }
    closing = done.exchanges[-1]
    for instruction in closing.instructions.values():
        assert [phase.name for phase in instruction.phases] == expected[name]
        assert instruction.evaluate == "end"
        assert instruction.round == 3
        assert instruction.base == 2
        assert len(instruction.asked) == 0
    if name == "FedAvg":  # every client equals the server
        accuracies = {closing.report(k).metrics["accuracy"] for k in range(K)}
        assert accuracies == {done.rows[-1]["server_accuracy"]}

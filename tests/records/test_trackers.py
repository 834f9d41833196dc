"""Trackers: what they show is what the records say; and the pages' examples do what they say."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from paths import DOCS
from small_runs import Hopeless, lines, tiny

import fedkd
from fedkd.experiment import read_toml
from fedkd.records import Row, Run
from fedkd.records.callbacks import Callback, EachRound, replay
from fedkd.records.trackers import (
    TensorBoard,
    WeightsAndBiases,
    by_client,
    of_result,
    scalars,
    trackers,
)

PAGE = DOCS / "trackers.md"


def leaves(row: Row) -> dict[str, float]:
    """Flatten a record's numbers, in another way: by what JSON has at its leaves."""
    found: dict[str, float] = {}
    for field, value in row.items():
        if isinstance(value, dict) and field != "dropped":
            found.update({f"{field}/{key}": number for key, number in value.items()})
        elif isinstance(value, bool | int | float):
            found[field] = float(value)
    for field in ("sampled", "answered", "dropped", "enrolled_again"):
        found[field] = len(row[field])
    del found["round"]
    return found


def without_group(name: str, fields: Mapping[str, Any]) -> str:
    """Return the field that a name stands for: the name itself, or what follows its group."""
    return name if name in fields else name.partition("/")[2]


# --- Names ---------------------------------------------------------------------------------------


def test_names_are_those_of_the_records_and_no_number_is_left_out(tmp_path: Path) -> None:
    run = fedkd.run(tiny(tmp_path, teacher="mlp-11"))
    for row in run.rounds:
        expected, found = leaves(row), scalars(row)
        assert {without_group(name, expected): value for name, value in found.items()} == expected
        assert len(found) == len(expected)
        assert {type(value) for value in found.values()} == {int, float}
    names = {*scalars(run.rounds[0]), *scalars(run.rounds[1])}
    assert {
        *("accuracy/accuracy_after_digest", "accuracy/own_accuracy", "accuracy/agreement"),
        *("loss/loss_digest", "seconds/digest", "seconds/round", "clients/dropped"),
        *("bytes/bytes_up", "bytes/wire_bytes_down", "bytes/bytes_up_by_tensor/values"),
        *("knowledge/knowledge_round", "clients/accepted"),
    } <= names
    assert {name.partition("/")[0] for name in names} <= {
        *("accuracy", "bytes", "clients", "gradient_norm", "knowledge", "loss", "seconds"),
    }


def test_lists_by_client_leave_out_who_has_none() -> None:
    record = {"client_accuracy": [0.5, None, 0.25], "client_own_accuracy": [None, None], "round": 3}
    assert by_client(record) == {"clients/client_accuracy": [0.5, 0.25]}
    assert by_client(record, "result") == {"result/client_accuracy": [0.5, 0.25]}
    assert of_result({"accuracy": 0.5, "server_accuracy": None, "reports": "clients"}) == {
        "result/accuracy": 0.5
    }
    assert scalars({"round": 3, "sampled": [1, 2], "dropped": {"1": "late"}, "new_thing": 7}) == {
        "clients/sampled": 2,
        "clients/dropped": 1,
        "other/new_thing": 7,
    }


# --- TensorBoard ---------------------------------------------------------------------------------


def events(folder: Path) -> Any:
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    ).EventAccumulator(str(folder), size_guidance={"scalars": 0, "histograms": 0, "tensors": 0})
    accumulator.Reload()
    return accumulator


def check_events(folder: Path, rounds: list[Row], result: Mapping[str, Any] | None) -> None:
    """Compare event files with the records, both ways: nothing is missing and nothing is added."""
    found = events(folder)
    expected: dict[tuple[str, int], float] = {
        (name, row["round"]): value for row in rounds for name, value in leaves(row).items()
    }
    if result is not None:
        numbers = {k: v for k, v in result.items() if isinstance(v, int | float)}
        expected |= {(f"result/{k}", result["rounds"]): v for k, v in numbers.items()}
    fields = dict.fromkeys(name for name, _ in expected)
    read = {
        (without_group(tag, fields), event.step): event.value
        for tag in found.Tags()["scalars"]
        for event in found.Scalars(tag)
    }
    assert read == {key: float(np.float32(value)) for key, value in expected.items()}


@pytest.fixture
def tensorboard() -> None:
    pytest.importorskip("tensorboard")


@pytest.mark.usefixtures("tensorboard")
def test_event_files_hold_what_the_records_hold(tmp_path: Path) -> None:
    run = fedkd.run(tiny(tmp_path), callbacks=[TensorBoard()])
    folder = run.path / "tensorboard"
    check_events(folder, run.rounds, run.result)
    found = events(folder)
    for row in run.rounds:
        for field in ("client_accuracy_after_revisit", "client_own_accuracy"):
            (histogram,) = (
                event.histogram_value
                for event in found.Histograms(f"clients/{field}")
                if event.step == row["round"]
            )
            assert histogram.num == len(row[field]) == 3
            assert histogram.sum == pytest.approx(math.fsum(row[field]), rel=1e-9)
            assert (histogram.min, histogram.max) == (min(row[field]), max(row[field]))
    (last,) = found.Histograms("result/client_accuracy")
    assert (last.step, last.histogram_value.num) == (2, 3)
    assert last.histogram_value.sum == pytest.approx(math.fsum(run.result["client_accuracy"]))
    (text,) = found.Tensors("experiment/text_summary")
    shown = text.tensor_proto.string_val[0].decode()
    assert all(line.startswith("    ") for line in shown.splitlines())
    assert "".join(line[4:] + "\n" for line in shown.splitlines()) == (
        run.path / "experiment.toml"
    ).read_text(encoding="utf-8")


@pytest.mark.usefixtures("tensorboard")
def test_the_experiment_is_there_as_hyperparameters(tmp_path: Path) -> None:
    data = pytest.importorskip("tensorboard.plugins.hparams.plugin_data_pb2")
    run = fedkd.run(tiny(tmp_path), callbacks=[TensorBoard()])
    content = events(run.path / "tensorboard").PluginTagToContent("hparams")
    start = data.HParamsPluginData.FromString(content["_hparams_/session_start_info"])
    kept = {
        name: getattr(value, value.WhichOneof("kind"))
        for name, value in start.session_start_info.hparams.items()
    }
    assert kept == run.experiment.flat()


@pytest.mark.usefixtures("tensorboard")
def test_a_round_can_be_seen_before_the_next(tmp_path: Path) -> None:
    path = tmp_path / "tiny"

    def look(row: Row) -> None:
        check_events(path / "tensorboard", lines(path), None)
        found = events(path / "tensorboard")  # histograms are logged last
        for name in by_client(row):
            assert found.Histograms(name)[-1].step == row["round"]

    fedkd.run(tiny(tmp_path), callbacks=[TensorBoard(), EachRound(look)])


@pytest.mark.usefixtures("tensorboard")
def test_what_was_logged_before_an_error_is_kept(tmp_path: Path) -> None:
    def fail(row: Row) -> None:
        if row["round"] == 2:
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        fedkd.run(tiny(tmp_path), callbacks=[EachRound(fail), TensorBoard()])
    rows = lines(tmp_path / "tiny")
    assert len(rows) == 2
    check_events(tmp_path / "tiny" / "tensorboard", rows, None)


@pytest.mark.usefixtures("tensorboard")
def test_one_tracker_follows_several_runs_each_in_its_folder(tmp_path: Path) -> None:
    tracker = TensorBoard(tmp_path / "board")
    runs = [fedkd.run(tiny(tmp_path, name=f"seed{n}", seed=n), [tracker]) for n in (0, 1)]
    assert runs[0].rounds[1]["loss_digest"] != runs[1].rounds[1]["loss_digest"]
    for run in runs:
        check_events(tmp_path / "board" / run.path.name, run.rounds, run.result)
        assert not (run.path / "tensorboard").exists()


@pytest.mark.usefixtures("tensorboard")
def test_telling_a_run_again_shows_it_once(tmp_path: Path) -> None:
    run = fedkd.run(tiny(tmp_path))
    for _ in range(2):
        replay(run, [TensorBoard()])
    found = events(run.path / "tensorboard")
    assert [event.step for event in found.Scalars("bytes/bytes_up")] == [1, 2]
    check_events(run.path / "tensorboard", run.rounds, run.result)


# --- Weights & Biases ----------------------------------------------------------------------------


class StandIn:
    """Records what is asked of wandb: all that the tracker uses of it, as wandb 0.31 takes it."""

    class Error(Exception):
        pass

    def __init__(self) -> None:
        self.init_arguments: dict[str, Any] = {}
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.summary: dict[str, Any] = {}
        self.exit_codes: list[int] = []
        self.refuses = ""
        self.cut_off = False

    def init(self, **arguments: Any) -> StandIn:
        if self.refuses:
            raise self.Error(self.refuses)
        self.init_arguments = arguments
        return self

    def log(self, data: dict[str, Any], *, step: int) -> None:
        if self.cut_off:
            raise ConnectionError("no network")
        self.logged.append((step, data))

    def finish(self, exit_code: int = 0) -> None:
        self.exit_codes.append(exit_code)

    @staticmethod
    def Histogram(values: list[float]) -> tuple[str, list[float]]:
        return "histogram", values


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    stand_in = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    monkeypatch.setattr(
        "fedkd.records.trackers.find_spec", lambda _: SimpleNamespace(origin="wandb.py")
    )
    return stand_in


def test_wandb_gets_the_experiment_the_rounds_and_the_result(
    tmp_path: Path, wandb: StandIn
) -> None:
    tracker = WeightsAndBiases(project="distil", mode="offline", tags=["tiny"])
    run = fedkd.run(tiny(tmp_path), callbacks=[tracker])
    assert wandb.init_arguments == {
        "project": "distil",
        "mode": "offline",
        "tags": ["tiny"],
        "config": dict(read_toml(run.path / "experiment.toml")[1]),
        "name": "tiny",
        "dir": str(run.path),
    }
    assert [step for step, _ in wandb.logged] == [1, 2]
    for row, (_, data) in zip(run.rounds, wandb.logged, strict=True):
        expected = leaves(row)
        numbers = {n: v for n, v in data.items() if not isinstance(v, tuple)}
        assert {without_group(n, expected): v for n, v in numbers.items()} == expected
        assert {n: v for n, v in data.items() if isinstance(v, tuple)} == {
            f"clients/{field}": ("histogram", row[field]) for field in row if "client_" in field[:7]
        }
    assert wandb.summary == {
        f"result/{k}": v for k, v in run.result.items() if isinstance(v, int | float)
    }
    assert wandb.exit_codes == [0]


def test_init_may_overrule_what_the_tracker_says(tmp_path: Path, wandb: StandIn) -> None:
    fedkd.run(tiny(tmp_path), callbacks=[WeightsAndBiases(name="mine", dir="elsewhere")])
    assert wandb.init_arguments["name"] == "mine"
    assert wandb.init_arguments["dir"] == "elsewhere"
    assert wandb.init_arguments["project"] is None


def test_a_run_that_fails_is_marked_as_failed(tmp_path: Path, wandb: StandIn) -> None:
    lost = tiny(
        tmp_path,
        student=f"small_runs:{Hopeless.__name__}",
        strategy="LocalOnly",
        plan="loop",
    )
    with pytest.raises(fedkd.FedkdError, match="no hope"):
        fedkd.run(lost, callbacks=[WeightsAndBiases()])
    assert wandb.exit_codes == [1]
    assert [data["clients/dropped"] for _, data in wandb.logged] == [3, 3]


def test_without_a_network_the_run_goes_on(
    tmp_path: Path, wandb: StandIn, caplog: pytest.LogCaptureFixture
) -> None:
    wandb.cut_off = True
    run = fedkd.run(tiny(tmp_path), callbacks=[WeightsAndBiases()])
    assert len(run.rounds) == 2
    assert wandb.exit_codes == [0]
    (record,) = caplog.records
    assert "WeightsAndBiases, after round 1, raised ConnectionError" in record.getMessage()


def test_a_refusal_comes_before_round_one_and_says_what_to_do(
    tmp_path: Path, wandb: StandIn
) -> None:
    wandb.refuses = "No API key configured."
    with pytest.raises(fedkd.FedkdError, match=r"wandb: No API key .*wandb login.*WANDB_MODE"):
        fedkd.run(tiny(tmp_path), callbacks=[WeightsAndBiases()])
    assert wandb.exit_codes == []
    assert not (tmp_path / "tiny" / "rounds.jsonl").exists()


def test_the_real_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only where wandb is installed: the tests above say what it is asked, this that it takes it."""
    package = pytest.importorskip("wandb")
    for variable in ("WANDB_DIR", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / "wandb-home"))
    (tmp_path / "wandb-home").mkdir()
    seen: dict[str | int, Any] = {}

    class Peek(Callback):
        """Looks at wandb's own summary before the tracker closes it."""

        def on_round_end(self, row: Row) -> None:
            seen["config"] = dict(package.run.config)
            seen[row["round"]] = dict(package.run.summary)

    tracker = WeightsAndBiases("distil", mode="offline", settings=package.Settings(silent=True))
    run = fedkd.run(tiny(tmp_path), callbacks=[tracker, Peek()])
    assert seen["config"] == run.experiment.flat()
    # wandb's summary holds what was committed: a step is, once the next is logged.
    assert seen[2]["accuracy/own_accuracy"] in [row["own_accuracy"] for row in run.rounds]
    (log,) = (run.path / "wandb").glob("offline-run-*/*.wandb")
    assert package.run is None
    package.teardown()  # until here wandb may still be writing
    content = log.read_bytes()
    numbers = [row[name] for row in run.rounds for name in ("own_accuracy", "loss_revisit")]
    for text in ("result/accuracy", str(run.accuracy), *map(str, numbers)):
        assert text.encode() in content


# --- Before any work -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tensorboard", r"TensorBoard needs tensorboard: pip install 'fedkd\[tensorboard\]'$"),
        ("wandb", r"Weights & Biases needs wandb: pip install 'fedkd\[wandb\]'$"),
    ],
)
@pytest.mark.parametrize("spec", [None, SimpleNamespace(origin=None)])
def test_what_is_not_installed_is_said_at_once(
    monkeypatch: pytest.MonkeyPatch, name: str, text: str, spec: object
) -> None:
    """Also beside a folder ``wandb``, which Python takes for a package without files."""
    monkeypatch.setattr("fedkd.records.trackers.find_spec", lambda _: spec)
    with pytest.raises(fedkd.FedkdError, match=text):
        trackers(name)


def test_trackers_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "fedkd.records.trackers.find_spec", lambda _: SimpleNamespace(origin="there")
    )
    assert [type(t) for t in trackers("wandb, tensorboard")] == [WeightsAndBiases, TensorBoard]
    with pytest.raises(fedkd.FedkdError, match=r"track = 'tensorbord'.*did you mean 'tensorboard'"):
        trackers("tensorbord")
    with pytest.raises(fedkd.FedkdError, match="'wandb,wandb': give each at most once"):
        trackers("wandb,wandb")
    with pytest.raises(fedkd.FedkdError, match="track = ''"):
        trackers("")


# --- docs/trackers.md ----------------------------------------------------------------------------


def blocks(language: str, word: str) -> list[str]:
    """Return the page's blocks of a language in which a word occurs."""
    text = PAGE.read_text(encoding="utf-8")
    found = re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)
    return [block for block in found if re.search(rf"\b{word}\b", block)]


def ran(source: str, **names: Any) -> dict[str, Any]:
    exec(compile(source, str(PAGE), "exec"), names)
    return names


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Shrink the page's experiments, and run them in an empty folder."""
    whole = fedkd.Experiment

    def shrunk(**keys: Any) -> fedkd.Experiment:
        return whole(**keys, plan="stacked").smoke()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(fedkd.__dict__, "Experiment", shrunk)
    return tmp_path


def test_the_pages_callback_stops_at_its_target(
    small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (source,) = blocks("python", "Target")
    ran(source.replace("Target(0.8)", "Target(0.01)"))
    rows = lines(next((small / "runs").iterdir()))
    accuracy = rows[-1]["accuracy_after_digest"]
    assert [row["round"] for row in rows] == list(range(1, len(rows) + 1))
    assert all("accuracy_after_digest" not in row for row in rows[:-1])
    assert capsys.readouterr().out.endswith(
        f"{100 * accuracy:.1f} % after round {rows[-1]['round']}\n"
    )


@pytest.mark.usefixtures("tensorboard")
def test_the_pages_tensorboard_lines(small: Path) -> None:
    (first, second) = blocks("python", "TensorBoard")
    ran(first)
    (path,) = (small / "runs").iterdir()
    check_events(path / "tensorboard", lines(path), Run.load(path).result)
    (path / "tensorboard").rename(small / "moved")
    ran(second.replace("runs/dsfl-mnist-seed0", str(path)))
    check_events(path / "tensorboard", lines(path), Run.load(path).result)


@pytest.mark.usefixtures("small")
def test_the_pages_wandb_lines(wandb: StandIn) -> None:
    (source,) = blocks("python", "WeightsAndBiases")
    ran(source)
    assert wandb.init_arguments["project"] == "distillation"
    assert wandb.init_arguments["mode"] == "offline"
    assert wandb.exit_codes == [0]


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs, one of which loses clients, beside a central one: not all have the same fields."""
    folder = tmp_path_factory.mktemp("several")
    runs = folder / "runs"
    fedkd.run(tiny(runs, name="a", strategy="DSFL"))
    fedkd.run(tiny(runs, name="b", strategy="FedAvg", seed=1, evaluate_every=2))
    mixed = "mlp-7,small_runs:Hopeless,mlp-7"
    fedkd.run(tiny(runs, name="c", strategy="DSFL", student=mixed, plan="loop"))
    fedkd.central(tiny(runs, name="central", teacher="mlp-11"))
    return folder


def records(folder: Path) -> dict[str, tuple[dict[str, object], list[Row]]]:
    """Return keys and rows of each federated run, read without any of the tools."""
    found = {}
    for path in sorted((folder / "runs").glob("*/rounds.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        found[path.parent.name] = (read_toml(path.parent / "experiment.toml")[1], rows)
    return found


def rounds_of(folder: Path) -> list[tuple[str, Mapping[str, Any], Row]]:
    return [(run, keys, row) for run, (keys, rows) in records(folder).items() for row in rows]


def total_bytes(rows: list[Row], upto: int) -> int:
    return sum(row["bytes_up"] + row["bytes_down"] for row in rows[:upto])


def expected_accuracy(folder: Path) -> list[tuple[str, int, float | None]]:
    """Mean of `own_accuracy` over the runs of a strategy, by round."""
    values: dict[tuple[str, int], list[float]] = {}
    for _, keys, row in rounds_of(folder):
        group = values.setdefault((str(keys["strategy"]), row["round"]), [])
        if row.get("own_accuracy") is not None:
            group.append(row["own_accuracy"])
    return [(*key, sum(v) / len(v) if v else None) for key, v in sorted(values.items())]


def expected_bytes(folder: Path) -> list[tuple[str, int, int]]:
    return [
        (run, n + 1, total_bytes(rows, n + 1))
        for run, (_, rows) in records(folder).items()
        for n in range(len(rows))
    ]


def expected_drops(folder: Path) -> list[tuple[str, int, str, str]]:
    return [
        (run, row["round"], client, reason)
        for run, _, row in rounds_of(folder)
        for client, reason in row["dropped"].items()
    ]


def plain(rows: Any) -> list[tuple[Any, ...]]:
    """Return rows with Python's own numbers, and None where a tool says NaN."""
    return [
        tuple(
            None if value != value else getattr(value, "item", lambda v=value: v)() for value in r
        )
        for r in rows
    ]


def same(found: list[tuple[Any, ...]], expected: list[tuple[Any, ...]]) -> None:
    """Means may differ in the last bits, as each tool adds in an order of its own."""
    assert expected
    assert [row[:-1] for row in found] == [row[:-1] for row in expected]
    values, means = ([math.nan if r[-1] is None else r[-1] for r in t] for t in (found, expected))
    assert values == pytest.approx(means, rel=1e-12, nan_ok=True)


def test_the_pages_queries_in_duckdb(several: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    duckdb = pytest.importorskip("duckdb")
    monkeypatch.chdir(several)
    accuracy, sums, drops = (plain(duckdb.sql(q).fetchall()) for q in blocks("sql", "FROM"))
    same(accuracy, expected_accuracy(several))
    assert sums == expected_bytes(several)
    assert drops == expected_drops(several)
    assert {(run, client) for run, _, client, _ in drops} == {("c", "1")}


def test_the_pages_lines_in_pandas(several: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pandas")
    monkeypatch.chdir(several)
    (source,) = blocks("python", "pandas")
    names = ran(source)
    same(plain(names["accuracy"].itertuples(index=False)), expected_accuracy(several))
    assert plain(names["bytes"].itertuples(index=False)) == expected_bytes(several)
    assert plain(names["drops"].itertuples(index=False)) == expected_drops(several)


def test_the_pages_line_in_polars(several: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("polars")
    monkeypatch.chdir(several)
    (source,) = blocks("python", "polars")
    assert plain(ran(source)["bytes"].rows()) == expected_bytes(several)

"""A report says what the runs recorded, from their folders alone, and the same every time."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import pytest
import torch
from federation_tools import digits_comparison
from pages import Page

import fedkd
from fedkd.errors import FedkdError
from fedkd.experiment import Experiment
from fedkd.records import predictions
from fedkd.records.results import Run
from fedkd.reports.page import calibration as report_calibration
from fedkd.reports.page import collect as report_collect
from fedkd.reports.page import curves as report_curves
from fedkd.reports.page import experiment as report_experiment
from fedkd.reports.page import sweeps as report_sweeps
from fedkd.reports.page.parts import Drawing
from fedkd.reports.page.tables import Table
from fedkd.reports.report import report
from fedkd.studies.sweep.result import Point, Sweep

BASE = digits_comparison()
FIGURES = {
    "accuracy-by-round", "accuracy-by-bytes", "shards", "clients", "soft-labels-dsfl", "entropy",
    "reliability", "seconds",
}  # fmt: skip


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a comparison."""
    experiment = BASE.replace(run_dir=str(tmp_path_factory.mktemp("runs")))
    methods = ["teacher", "student-alone", "student-distilled", "LocalOnly", "FedAvg", "DSFL"]
    return fedkd.compare(experiment, methods, [0, 3]).path


@pytest.fixture
def runs(compared: Path, tmp_path: Path) -> Path:
    """Return a copy of its folder of runs, to be changed."""
    return Path(shutil.copytree(compared.parent, tmp_path / "runs"))


@pytest.fixture(scope="module")
def page(compared: Path, tmp_path_factory: pytest.TempPathFactory) -> Page:
    folder = tmp_path_factory.mktemp("report")
    return Page(report([compared], folder / "report.html"))


# --- The page -------------------------------------------------------------------------------------


def test_every_figure_of_a_comparison_is_there_and_listed(page: Page, compared: Path) -> None:
    prefix = f"{compared.name}-"
    assert {name.removeprefix(prefix) for name in page.figures} == FIGURES
    listed = [str(a["href"]) for a in page.all("a")]
    assert {f"#{name}" for name in page.figures} <= set(listed)
    ids = [str(attributes["id"]) for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {target.removeprefix("#") for target in listed} <= set(ids)


def test_it_is_one_file_without_script_or_network(page: Page) -> None:
    assert not page.all("script")
    assert not re.findall(r"\bon[a-z]+=", "".join(re.findall(r"<[^>]+>", page.source)))
    outside = re.findall(r"(?:src|href|url)[=(]\"?([^\"#)]+)", page.source)
    assert {where for where in outside if not where.startswith("data:")} == set()
    assert "@import" not in page.source


def test_each_figure_is_said_in_words(page: Page) -> None:
    drawings = [a for a in page.all("svg") if a.get("role") == "img"]
    assert len(drawings) == len(page.figures)
    ids = {str(attributes["id"]) for _, attributes in page.elements if "id" in attributes}
    for attributes in drawings:
        assert set(str(attributes["aria-labelledby"]).split()) <= ids
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", page.source)
    assert len(captions) == len(page.figures)
    assert all(len(caption) > 60 for caption in captions)
    assert sum("359 test images" in c or "test images" in c for c in captions) >= 4


def test_the_numbers_are_those_of_the_comparison(page: Page, compared: Path) -> None:
    comparison = fedkd.Comparison.load(compared)
    for entry in comparison.entries:
        first, second = (100 * a for a in entry.accuracies)
        assert f"{mean((first, second)):.1f} ± {stdev((first, second)):.1f}" in page.text
    for sentence in comparison.sentences:
        assert sentence in page.text


def test_the_same_folders_give_the_same_file_without_data_or_models(
    compared: Path, page: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the data or a model was asked for")

    monkeypatch.setattr("fedkd.data.federated.federated_data", refuse)
    monkeypatch.setattr("fedkd.training.models.build", refuse)
    monkeypatch.setattr("fedkd.data.sources.load", refuse)
    again = report([compared], tmp_path / "again.html")
    assert again.read_text(encoding="utf-8") == page.source


@pytest.mark.slow
def test_names_are_escaped(runs: Path, tmp_path: Path) -> None:
    bad = "<script>alert(1)</script>&"
    for path in runs.glob("*/shards.json"):
        said = json.loads(path.read_text(encoding="utf-8"))
        said["classes"][0] = bad
        path.write_text(json.dumps(said), encoding="utf-8")
    for path in runs.glob("*/experiment.toml"):
        text = path.read_text(encoding="utf-8")
        changed = re.sub(r"^data-dir = .*$", f'data-dir = "{bad}"', text, flags=re.MULTILINE)
        path.write_text(f"# python: {bad}\n{changed}", encoding="utf-8")
    found = Page(report([runs], tmp_path / "report.html"))
    assert not found.all("script")
    assert bad in found.text


# --- Which folders --------------------------------------------------------------------------------


def test_a_folder_of_runs_gives_all_that_is_in_it_once(runs: Path, page: Page) -> None:
    sources = report_collect.find([runs])
    assert [group.title for group in sources.federations] == ["compare-digits"]
    assert not sources.centrals
    assert not sources.skipped


def test_without_names_it_is_all_of_runs(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(runs.parent)
    for path in (*runs.glob("fedavg-*"), *runs.glob("dsfl-*")):  # fewer figures
        shutil.rmtree(path)
    shutil.rmtree(runs / "compare-digits")
    assert report() == Path("report.html")
    found = Page(Path("report.html"))
    for path in runs.iterdir():
        assert path.name in found.text


def test_what_is_not_finished_is_refused_by_name_and_else_skipped_and_said(
    runs: Path, tmp_path: Path
) -> None:
    cut = next(runs.glob("dsfl-*"))
    (cut / "result.json").unlink()
    with pytest.raises(FedkdError, match=r"result\.json is missing"):
        report([cut], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()
    (runs / "notes").mkdir()
    found = Page(report([runs], tmp_path / "report.html"))
    for path in (cut, runs / "notes", runs / "compare-digits"):
        assert f"{path}" in found.text.partition("Skipped:")[2]
    assert any(name.endswith("accuracy-by-round") for name in found.figures)


def test_a_foreign_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    with pytest.raises(FedkdError, match="photos is not the folder of a run"):
        report([tmp_path / "photos"], tmp_path / "report.html")
    with pytest.raises(FedkdError, match=r"there is no folder .*nowhere"):
        report([tmp_path / "nowhere"], tmp_path / "report.html")


def test_a_folder_that_is_not_there_takes_no_report(compared: Path, tmp_path: Path) -> None:
    with pytest.raises(FedkdError, match=r"there is no folder .*missing"):
        report([compared], tmp_path / "missing" / "report.html")


def test_runs_that_are_no_comparison_stand_together_with_their_baseline(
    runs: Path, tmp_path: Path
) -> None:
    shutil.rmtree(runs / "compare-digits")
    (group,) = report_collect.find([runs]).federations
    assert {name: len(found) for name, found in group.runs.items()} == {
        "DSFL": 2, "FedAvg": 2, "local only": 2,
    }  # fmt: skip
    assert group.central is not None
    assert group.central.seeds == [0, 3]
    found = Page(report([runs], tmp_path / "report.html"))
    assert len(found.figures) == len(FIGURES)
    assert "student distilled" in found.text


def test_runs_on_other_data_stand_apart(runs: Path) -> None:
    shutil.rmtree(runs / "compare-digits")
    path = next(runs.glob("fedavg-*")) / "experiment.toml"
    path.with_name("identity.json").unlink()  # as if it had been run so
    text = path.read_text(encoding="utf-8")
    path.write_text(
        text.replace("partition-alpha = 0.3", "partition-alpha = 0.7"), encoding="utf-8"
    )
    groups = report_collect.find([runs]).federations
    assert sorted(sum(map(len, group.runs.values())) for group in groups) == [1, 5]


def test_a_repeated_run_and_one_with_another_key_have_labels_of_their_own(runs: Path) -> None:
    first = next(runs.glob("dsfl-*"))
    twin = Path(shutil.copytree(first, runs / "twin"))
    other = Path(shutil.copytree(first, runs / "other"))
    (other / "identity.json").unlink()  # as if it had been run so
    text = (other / "experiment.toml").read_text(encoding="utf-8")
    (other / "experiment.toml").write_text(text.replace("tau = 5.0", "tau = 2.5"), encoding="utf-8")
    twins, _ = report_collect.by_method([Run.load(p) for p in (first, twin)])
    assert list(twins) == ["DSFL", "DSFL #2"]
    labels, notes = report_collect.by_method([Run.load(p) for p in (first, other)])
    assert list(labels) == ["DSFL (tau 5.0)", "DSFL (tau 2.5)"]
    assert not notes


def test_labels_that_are_long_become_letters_and_are_explained(runs: Path) -> None:
    first = next(runs.glob("dsfl-*"))
    other = Path(shutil.copytree(first, runs / "other"))
    (other / "identity.json").unlink()  # as if it had been run so
    text = (other / "experiment.toml").read_text(encoding="utf-8")
    changed = text.replace("tau = 5.0", "tau = 2.5").replace("batch-size = 64", "batch-size = 32")
    (other / "experiment.toml").write_text(changed, encoding="utf-8")
    labels, notes = report_collect.by_method([Run.load(p) for p in (first, other)])
    assert list(labels) == ["DSFL A", "DSFL B"]
    assert notes == ["DSFL A: batch-size 64, tau 5.0.", "DSFL B: batch-size 32, tau 2.5."]


def test_records_that_are_not_there_leave_figures_out_and_say_so(
    runs: Path, tmp_path: Path
) -> None:
    shutil.rmtree(runs / "compare-digits")
    for name in ("shards.json", "knowledge.jsonl", "tested.safetensors"):
        for path in runs.glob(f"*/{name}"):
            path.unlink()
    for path in runs.glob("*/rounds.jsonl"):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        kept = [{k: v for k, v in row.items() if not k.startswith("knowledge_e")} for row in rows]
        path.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    found = Page(report([runs], tmp_path / "report.html"))
    kept_names = {"accuracy-by-round", "accuracy-by-bytes", "clients", "seconds"}
    assert {name.split("dirichlet-0-3-")[1] for name in found.figures} == kept_names
    missing = re.findall(r"Not shown: ([^(]+) \(", found.text)
    assert sorted(", ".join(missing).split(", ")) == [
        "Entropy of the soft labels", "Label distribution of the shards", "Mean soft labels",
        "Reliability",
    ]  # fmt: skip


def test_a_strategy_without_soft_labels_needs_none(runs: Path, tmp_path: Path) -> None:
    found = Page(report([next(runs.glob("localonly-*"))], tmp_path / "report.html"))
    names = {name.split("seed0-")[-1].split("seed3-")[-1] for name in found.figures}
    assert names == {"accuracy-by-round", "shards", "reliability", "seconds"}
    assert "the runs train locally only" in found.text


def test_a_baseline_alone(runs: Path, tmp_path: Path) -> None:
    path = next(runs.glob("central-*"))
    found = Page(report([path], tmp_path / "report.html", tmp_path / "figures"))
    assert [name.removeprefix(f"{path.name}-") for name in found.figures] == [
        "accuracy", "loss", "reliability",
    ]  # fmt: skip
    assert "fedkd central" in found.text
    assert (tmp_path / "figures" / "table.tex").is_file()


# --- Files ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_figures_and_tables_are_files_too(compared: Path, tmp_path: Path) -> None:
    folder = tmp_path / "paper" / "figures"
    report([compared], tmp_path / "report.html", folder)
    stems = {path.stem for path in folder.glob("*.svg")}
    assert stems == FIGURES == {path.stem for path in folder.glob("*.png")}
    tables = {path.name for path in folder.glob("table*")}
    assert tables == {
        f"table-{what}.{form}" for what in ("accuracy", "cost") for form in ("md", "tex")
    }
    best = fedkd.Comparison.load(compared)["DSFL"]
    cell = f"{100 * best.accuracy:.1f} ± {100 * stdev(best.accuracies):.1f}"
    assert cell in (folder / "table-accuracy.md").read_text(encoding="utf-8")
    tex = (folder / "table-accuracy.tex").read_text(encoding="utf-8")
    assert cell.replace("±", r"$\pm$") in tex


TABLE = Table(
    "table", "A & B, 3 seeds", ["method", "accuracy", "gap"],
    [["a_b|c", "81.0 ± 0.5", "–"], ["50 %", "92.0 ± 0.1", "−3 %"]], 1, ["A note."],
)  # fmt: skip


def test_latex_is_escaped_has_rules_and_the_best_in_bold() -> None:
    lines = TABLE.latex().splitlines()
    assert r"a\_b|c & 81.0 $\pm$ 0.5 & -- \\" in lines
    assert r"50 \% & \textbf{92.0 $\pm$ 0.1} & $-$3 \% \\" in lines
    assert [line for line in lines if line.endswith("rule")] == [
        r"\toprule",
        r"\midrule",
        r"\bottomrule",
    ]
    assert r"\begin{tabular}{lrr}" in lines


def test_markdown_has_a_rule_and_the_best_in_bold() -> None:
    lines = TABLE.markdown().splitlines()
    assert r"| a\|c |" not in lines
    assert r"| a_b\|c | 81.0 ± 0.5 | – |" in lines
    assert "| 50 % | **92.0 ± 0.1** | −3 % |" in lines
    assert "| --- | ---: | ---: |" in lines


# --- The experiment -------------------------------------------------------------------------------


def test_the_command_gives_the_same_experiment() -> None:
    experiment = BASE.replace(
        strategy="DSFL", strategy_config="sharpening=mean", codec="simplex:1+changed", tau=2.5,
        name="mine", public_labels=False,
    )  # fmt: skip
    words = shlex.split(" ".join(report_experiment.command("run", experiment, {})))
    assert words[:2] == ["fedkd", "run"]
    flags = {
        flag.removeprefix("--"): value for flag, value in zip(words[2::2], words[3::2], strict=True)
    }
    assert Experiment.load(("test", flags)) == experiment.replace(name=None)


def test_what_differs_from_the_defaults_comes_with_the_default() -> None:
    rows = report_experiment.differing([BASE, BASE.replace(seed=3)])
    assert ("dataset", "digits", "mnist-5k") in rows
    assert ("seed", "0, 3", "0") in rows
    assert ("public-labels", "false", "true") in rows
    assert "alpha" not in [row[0] for row in rows]
    assert len(report_experiment.keys([BASE])) == len(Experiment.model_fields)


def test_the_versions_are_those_of_the_run(page: Page, compared: Path) -> None:
    run = fedkd.Comparison.load(compared).runs["DSFL"][0]
    assert f"torch {run.result['environment']['torch']}" in page.text


# --- Curves ---------------------------------------------------------------------------------------


def test_the_clients_thin_lines_average_to_the_curve(compared: Path) -> None:
    run = fedkd.Comparison.load(compared).runs["DSFL"][0]
    clients = report_curves.each_client(run)
    for point in report_curves.students(run):
        assert mean(c[point.round] for c in clients) == pytest.approx(point.accuracy)
    assert [c[2] for c in clients] == run.client_accuracy


def test_weights_that_are_shared_have_one_curve(compared: Path) -> None:
    run = fedkd.Comparison.load(compared).runs["FedAvg"][0]
    assert report_curves.each_client(run) == []
    assert report_curves.server(run) == {}


def test_a_server_with_a_model_of_its_own_has_a_curve_of_its_own(compared: Path) -> None:
    run = fedkd.Comparison.load(compared).runs["DSFL"][0]
    rows = [{**row, "server_accuracy": 0.1 * row["round"]} for row in run.rounds]
    own = Run(run.path, rows, {**run.result, "server_accuracy": 0.7})
    assert report_curves.server(own) == {1: pytest.approx(0.1), 2: 0.7}


def test_a_strategy_that_is_gone_is_read_by_what_it_recorded(runs: Path) -> None:
    folder = next(runs.glob("dsfl-*"))
    before = report_curves.students(Run.load(folder))
    (folder / "identity.json").unlink()  # as if it had been run so
    text = (folder / "experiment.toml").read_text(encoding="utf-8")
    (folder / "experiment.toml").write_text(
        text.replace('strategy = "DSFL"', 'strategy = "gone_file:Gone"'), encoding="utf-8"
    )
    assert report_curves.students(Run.load(folder)) == before


def test_clients_are_compared_with_their_first_test_where_nobody_trained_alone(
    runs: Path, tmp_path: Path
) -> None:
    folder = next(runs.glob("dsfl-*"))
    run = Run.load(folder)
    start = report_curves.beginning(run)
    assert start is not None
    assert start.round == 2  # the teacher trains in round 1, the student digests in round 2
    assert start.accuracies == run.rounds[1]["client_accuracy_after_digest"]
    assert "before (open: round 2)" in Page(report([folder], tmp_path / "r.html")).text


# --- Calibration ----------------------------------------------------------------------------------


def test_calibration_is_over_all_models_and_seeds_without_those_that_have_no_confidence(
    tmp_path: Path,
) -> None:
    rng = np.random.default_rng(5)
    labels = rng.integers(0, 7, 41)
    confidences, right = [], []
    for seed in (0, 1, 2):
        classes = np.where(rng.random((3, 41)) < 0.6, labels, (labels + 1) % 7)
        sure = rng.random((3, 41)).astype(np.float16).astype(np.float32)
        sure[1, :5] = np.nan
        folder = tmp_path / f"run-{seed}"
        folder.mkdir()
        answers = predictions.Predictions(torch.tensor(classes), torch.tensor(sure), [seed, 1, 2])
        predictions.Tested(torch.tensor(labels), {"student": answers}).save(folder)
        counts = ~np.isnan(sure) & np.array([[seed in (1, 2)], [True], [True]])
        confidences.append(sure[counts])
        right.append((classes == labels)[counts])
    folders = [tmp_path / f"run-{seed}" for seed in (0, 1, 2)]
    (line,) = report_calibration.of_models(folders, [1, 2])
    sure, hits = np.concatenate(confidences), np.concatenate(right)
    place = np.clip(np.ceil(sure * 15) - 1, 0, 14).astype(int)
    bins = [place == m for m in range(15)]
    error = sum(abs(hits[b].mean() - sure[b].mean()) * b.mean() for b in bins if b.any())
    assert line.label == f"student {100 * error:.1f}"
    assert line.share == pytest.approx([b.mean() for b in bins])
    accuracies = [100 * hits[b].mean() if b.any() else np.nan for b in bins]
    assert line.accuracy == pytest.approx(accuracies, nan_ok=True)


def test_the_aggregate_is_weighted_by_the_answers_of_each_seed(runs: Path) -> None:
    folders = sorted(runs.glob("dsfl-*"))
    empty: list[float | None] = [None] * 13
    counts: list[list[int]] = [[1, 0], [3, 4]]
    accuracies: list[list[float | None]] = [[0.5, None], [0.9, 0.25]]
    for folder, count, accuracy in zip(folders, counts, accuracies, strict=True):
        bins = {
            "count": [*count, *[0] * 13],
            "confidence": [0.4, None if not count[1] else 0.8, *empty],
            "accuracy": [*accuracy, *empty],
        }
        line = {"round": 1, "by": "label", "by_class": [None] * 10, "reliability": bins}
        (folder / "knowledge.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")
    (drawn,) = report_calibration.of_aggregate([Run.load(folder) for folder in folders])
    assert drawn.accuracy[:2] == pytest.approx([100 * (0.5 + 3 * 0.9) / 4, 25.0])
    error = 4 / 8 * abs((0.5 + 3 * 0.9) / 4 - 0.4) + 4 / 8 * abs(0.25 - 0.8)
    assert drawn.label == f"aggregate {100 * error:.1f}"


# --- Sweeps ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    experiment = BASE.replace(
        strategy="DSFL", train_size=301, public_size=61, num_server_rounds=1,
        run_dir=str(tmp_path_factory.mktemp("sweeps")),
    )  # fmt: skip
    return fedkd.sweep(experiment, {"alpha": [0.2, 0.9], "tau": [1.0, 2.0, 8.0]}, [0, 1], 2).path


def test_a_sweep_shows_its_map_and_its_points(swept: Path, tmp_path: Path) -> None:
    found = Page(report([swept], tmp_path / "report.html"))
    (name,) = found.figures
    assert name == f"{swept.name}-sweep"
    done = Sweep.load(swept)
    for point in done.points:
        means = [100 * mean(folds) for folds in point.accuracies]
        assert f"{mean(means):.1f} ± {stdev(means):.1f}" in found.text
    values = re.findall(r"<text[^>]*>(★ )?(\d\d?\.\d)</text>", found.source)
    assert len(values) == 6 + 2  # alpha has two values too
    assert [v for star, v in values if star] == [f"{100 * done.best.accuracy:.1f}"]
    assert "alpha=0.2,0.9 tau=1.0,2.0,8.0" in found.text


def test_a_sweep_of_one_key_is_a_curve_and_of_names_dots(swept: Path) -> None:
    done = Sweep.load(swept)
    one = [point for point in done.points if point.keys["tau"] == 2.0]
    chosen: dict[str, list[Any]] = {"alpha": [0.2, 0.9], "optimizer": ["adam", "sgd"]}
    for key, values in chosen.items():
        points = [
            Point({key: value}, point.accuracies) for value, point in zip(values, one, strict=True)
        ]
        fields = {**vars(done), "grid": {key: values}, "points": points}
        (shown,) = report_sweeps.of_sweep(Sweep(**fields))
        assert shown.title.startswith("Held-out accuracy")


def test_a_search_is_dots_over_each_key(swept: Path) -> None:
    done = Sweep.load(swept)
    found = Sweep(**{**vars(done), "is_search": True})
    (shown,) = report_sweeps.of_sweep(found)
    assert isinstance(shown, Drawing)
    assert [axes.get_xlabel() for axes in shown.figure.axes] == ["α", "τ"]

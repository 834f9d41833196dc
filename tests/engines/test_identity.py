"""A run is known by what was computed: any change of it is found and named, and nothing else is."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from federation_tools import tiny
from sampling import one_in

import fedkd
from fedkd.engines.identity import identity_of
from fedkd.engines.run import resume
from fedkd.errors import FedkdError
from fedkd.experiment import Experiment
from fedkd.federation.checkpoint import Checkpoint
from fedkd.records.callbacks import EachRound
from fedkd.records.folder import RunFolder
from fedkd.records.identity import as_one, changes
from fedkd.registry import strategy_of
from fedkd.reports.export.export import export
from fedkd.studies.sweep.run import sweep

SITE = """
from pathlib import Path
import torch
from torch import nn
import fedkd
from fedkd.data import Dataset
from fedkd.losses import term
from fedkd.phases import Digest, Predict, Revisit
from fedkd.strategy import Facts

SLOPE = 0.1

def images(seed, count):
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (count,), generator=draw)
    noise = torch.randint(60, (count, 1, 5, 7), generator=draw)
    return (noise + 60 * labels[:, None, None, None]).to(torch.uint8), labels

def scans(folder):
    seed = int((Path(folder) / "seed.txt").read_text())
    train, test = images(seed, 211), images(1000 + seed, 101)
    return Dataset("scans", *train, *test, ("a", "b", "c"), (0.5,), (0.3,))

def net(shape, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(35, 5), nn.LeakyReLU(SLOPE), nn.Linear(5, classes))

@term(needs="soft-labels")
def sharp(step):
    return 2.0 * (step.logits - step.teacher_logits).square().mean(-1)

class Own(fedkd.DistillationStrategy):
    facts = Facts(paper="none", up="4 P C", down="4 P C")
    def phases(self, round):
        return [Digest(sharp), Revisit(), Predict()]

    def aggregate(self, labels):
        return labels.values.mean(0)
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A user's module with a data set of two sites, a model, a loss term and a strategy."""
    for name, seed in (("a", 1), ("b", 2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "seed.txt").write_text(str(seed))
    (tmp_path / "hospital_site.py").write_text(SITE)
    monkeypatch.syspath_prepend(str(tmp_path))
    import hospital_site  # type: ignore[import-not-found]

    yield hospital_site
    del sys.modules["hospital_site"]


def of_site(tmp_path: Path, **keys: Any) -> Experiment:
    own = {
        "dataset": "hospital_site:scans",
        "data_dir": str(tmp_path / "a"),
        "train_size": None,
        "test_size": None,
        "public_size": 53,
        "student": "hospital_site:net",
        "strategy": "hospital_site:Own",
        "run_dir": str(tmp_path / "runs"),
        "plan": "stacked",
    }
    return tiny(**{**own, **keys})


def redefine(module: ModuleType, old: str, new: str) -> None:
    """Define all again in the module, as the cells of a notebook do."""
    assert SITE.count(old) == 1
    exec(compile(SITE.replace(old, new), "cell", "exec", dont_inherit=True), vars(module))


# --- What it holds -------------------------------------------------------------------------------


def test_it_stands_in_the_run_folder_and_in_the_checkpoint(
    site: ModuleType, tmp_path: Path
) -> None:
    run = fedkd.run(of_site(tmp_path, name="it"))
    identity = json.loads((run.path / "identity.json").read_text())
    assert identity == identity_of(run.experiment, strategy_of(run.experiment))
    assert list(identity) == ["software", "keys", "data", "code", "weights"]
    assert identity["software"]["torch"] == torch.__version__.partition("+")[0]
    assert set(identity["data"]) == {"train", "test"}
    assert {"scans", "images", "net", "SLOPE", "sharp", "Own", "Own.aggregate"} <= {
        name.removeprefix("hospital_site:") for name in identity["code"]
    }
    assert set(identity["weights"]) == {"hospital_site:net, seed 5"}
    assert Checkpoint.load(run.path).identity == as_one(identity)


CHANGES = {
    "code of the model": ("nn.LeakyReLU(SLOPE)", "nn.Tanh()", {"net", "SLOPE"}),
    "layers of the model": ("35, 5), nn", "35, 5, bias=False), nn", {"net"}),
    "a global number": ("SLOPE = 0.1", "SLOPE = 0.3", {"SLOPE"}),
    "a term": ("2.0 * (step", "3.0 * (step", {"sharp"}),
    "a strategy": ("values.mean(0)", "values.amax(0)", {"Own.aggregate"}),
    "how images are made": ("60 * labels", "61 * labels", {"images"}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_function_is_named(change: str, site: ModuleType, tmp_path: Path) -> None:
    experiment = of_site(tmp_path)
    before = identity_of(experiment, strategy_of(experiment))
    redefine(site, *CHANGES[change][:2])
    changed = changes(before, identity_of(experiment, strategy_of(experiment)))
    named = {
        each.partition("hospital_site:")[2].partition(" ")[0] for each in changed if "code" in each
    }
    assert named == CHANGES[change][2]


# --- Keys ----------------------------------------------------------------------------------------

EDITS: dict[str, object] = {
    "tau": 2.0,
    "alpha": 0.3,
    "learning-rate": 0.002,
    "batch-size": 31,
    "local-epochs": 2,
    "distill-epochs": 2,
    "seed": 7,
    "partition": "dirichlet",
    "num-clients": 4,
    "public-labels": False,
    "fraction-train": 0.5,
    "codec": "float16",
    "kl-reduction": "mean",
    "strategy-config": "era-temperature=0.3",
    "student": "mlp-9",
    "train-size": 250,
    "optimizer": "sgd",
    "plan": "loop",
    "evaluate-every": 2,
}


def stop(_: Any) -> None:
    raise KeyboardInterrupt


def interrupted(folder: Path, **keys: Any) -> Path:
    experiment = tiny(name="it", run_dir=str(folder), num_server_rounds=3, **keys)
    with pytest.raises(KeyboardInterrupt):
        fedkd.run(experiment, [EachRound(stop)])
    return folder / "it"


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return interrupted(tmp_path_factory.mktemp("half"))


@pytest.mark.parametrize("key", EDITS)
def test_an_edited_key_is_refused_by_name(key: str, half: Path) -> None:
    file = half / "experiment.toml"
    text = file.read_text()
    lines = [
        f"{key} = {json.dumps(EDITS[key])}" if line.startswith(f"{key} = ") else line
        for line in [*text.splitlines(), *([] if f"\n{key} = " in text else [f"{key} = "])]
    ]
    try:
        file.write_text("\n".join(lines) + "\n")
        assert file.read_text() != text
        with pytest.raises(FedkdError, match=f"was edited after the run began: {key} = .*, was "):
            resume(half)
    finally:
        file.write_text(text)


def test_where_files_are_may_change(half: Path, tmp_path: Path) -> None:
    (half.parent / "it").rename(tmp_path / "moved")
    try:
        assert RunFolder(tmp_path / "moved").relocated_experiment().name == "moved"
    finally:
        (tmp_path / "moved").rename(half)


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    one, other = interrupted(tmp_path / "one"), tmp_path / "other" / "it"
    interrupted(other.parent, tau=2.0)
    (one / "server.safetensors").write_bytes((other / "server.safetensors").read_bytes())
    with pytest.raises(FedkdError, match=r"server.safetensors and identity.json are of different"):
        resume(one)


# --- Data ----------------------------------------------------------------------------------------


def test_two_sites_with_one_name_get_figures_of_their_own(site: ModuleType, tmp_path: Path) -> None:
    def compared(folder: str, jobs: int = 1) -> fedkd.Comparison:
        experiment = of_site(tmp_path, data_dir=str(tmp_path / folder), teacher="mlp-5")
        return fedkd.compare(experiment, ["student-alone", "local", "hospital_site:Own"], [0])

    first, second = compared("a"), compared("b")
    assert (first.reused, second.reused) == (0, 0)
    assert "3 as of the training images or their labels; the test images" in (second.remark or "")
    assert {e.method: e.accuracies for e in first.entries} != {
        e.method: e.accuracies for e in second.entries
    }
    again = compared("a")
    assert (again.reused, again.remark) == (3, None)
    assert [e.accuracies for e in again.entries] == [e.accuracies for e in first.entries]


def test_data_that_change_in_their_place_are_loaded_again(site: ModuleType, tmp_path: Path) -> None:
    experiment = of_site(tmp_path)
    first = fedkd.run(experiment.replace(name="first"))
    (tmp_path / "a" / "seed.txt").write_text("3")
    second = fedkd.run(experiment.replace(name="second"))
    identities = [RunFolder(run.path).identity["data"] for run in (first, second)]
    assert identities[0]["train"] != identities[1]["train"]
    assert first.rounds[0]["loss_revisit"] != second.rounds[0]["loss_revisit"]


def test_a_cut_off_run_on_other_data_is_refused(site: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        fedkd.run(of_site(tmp_path, name="it", num_server_rounds=3), [EachRound(stop)])
    (tmp_path / "a" / "seed.txt").write_text("3")
    with pytest.raises(
        FedkdError, match=r"begun with something else: the training images or their"
    ):
        resume(tmp_path / "runs" / "it")
    (tmp_path / "a" / "seed.txt").write_text("1")
    assert len(resume(tmp_path / "runs" / "it").rounds) == 3


def test_a_sweep_measures_again_what_has_changed(site: ModuleType, tmp_path: Path) -> None:
    experiment = of_site(tmp_path, strategy="LocalOnly", student="mlp-5,hospital_site:net")
    grid = {"student": ["mlp-5", "hospital_site:net"]}
    first = sweep(experiment, grid, [5], 2)
    assert first.remark is None
    redefine(site, "nn.LeakyReLU(SLOPE)", "nn.Tanh()")
    second = sweep(experiment, grid, [5], 2)
    assert second.path == first.path
    assert second.remark is not None
    assert second.remark.startswith(
        "measured again since something changed: 2 as of the code of hospital_site:net"
    )
    assert second.points[0].accuracies == first.points[0].accuracies
    lines = (second.path / "points.jsonl").read_text().splitlines()
    assert len(lines) == 4 + 2
    assert sweep(experiment, grid, [5], 2).remark is None


# --- Models --------------------------------------------------------------------------------------


def test_a_model_that_is_defined_again_is_the_one_that_runs(
    site: ModuleType, tmp_path: Path
) -> None:
    losses = []
    for new in (
        "nn.LeakyReLU(SLOPE)",
        "nn.Tanh()",
        "nn.Linear(5, 200), nn.Tanh(), nn.Linear(200, 5)",
    ):
        redefine(site, "nn.LeakyReLU(SLOPE)", new)
        run = fedkd.run(of_site(tmp_path, plan="auto", num_server_rounds=3))
        losses.append(run.rounds[-1]["loss_revisit"])
    assert len(set(losses)) == 3


def test_a_model_of_other_code_or_data_is_not_exported(site: ModuleType, tmp_path: Path) -> None:
    run = fedkd.run(of_site(tmp_path, name="it"))
    redefine(site, "nn.LeakyReLU(SLOPE)", "nn.Tanh()")
    with pytest.raises(
        FedkdError, match="something else: the code of hospital_site:net; restore it"
    ):
        export(run.path, output=tmp_path / "out.pt2")
    redefine(site, "SLOPE = 0.1", "SLOPE = 0.1")
    export(run.path, output=tmp_path / "out.pt2")


# --- Extended ------------------------------------------------------------------------------------

EXTENDED: list[dict[str, Any]] = [
    {"strategy": "DSFL"},
    {"strategy": "SCARLET", "fraction_train": 0.6, "codec": "simplex:2+changed"},
    {"strategy": "CFD", "server_model": "mlp-11"},
    {"strategy": "SelectiveFD", "public_labels": False},
    {"strategy": "FedMD", "teacher": "mlp-11", "evaluate_every": 2},
    {"strategy": "FedAvg", "fraction_train": 0.4, "num_clients": 7},
]


def contents(folder: Path) -> dict[str, Any]:
    """Return what a run has written, but for times, places and the states that were overwritten."""
    run = fedkd.Run.load(folder)
    rows = [{n: v for n, v in row.items() if n != "seconds"} for row in run.rounds]
    result = {n: v for n, v in run.result.items() if n not in ("seconds", "environment")}
    files = ["knowledge.jsonl", "shards.json", "tested.safetensors", "server.safetensors"]
    texts = {name: (folder / name).read_bytes() for name in files if (folder / name).is_file()}
    return {"rows": rows, "result": result, **texts}


@pytest.mark.parametrize(
    "keys",
    one_in(2, EXTENDED),
    ids=lambda keys: keys["strategy"],
)
@pytest.mark.parametrize("finished", [True, False], ids=["finished", "cut off"])
def test_an_extended_run_ends_as_if_its_rounds_had_been_asked_for_at_first(
    keys: dict[str, Any], finished: bool, tmp_path: Path
) -> None:
    whole = fedkd.run(tiny(name="it", run_dir=str(tmp_path / "whole"), num_server_rounds=5, **keys))
    short = tiny(name="it", run_dir=str(tmp_path / "short"), num_server_rounds=2, **keys)
    if finished:
        fedkd.run(short)
    else:
        with pytest.raises(KeyboardInterrupt):
            fedkd.run(short, [EachRound(stop)])
    resume(tmp_path / "short/it", num_server_rounds=5)
    assert contents(tmp_path / "short/it") == contents(whole.path)
    folders = RunFolder(tmp_path / "short/it"), RunFolder(whole.path)
    assert folders[0].identity == folders[1].identity
    assert folders[0].experiment.replace(run_dir=str(whole.path.parent)) == folders[1].experiment


def test_rounds_that_are_done_are_not_taken_back(tmp_path: Path) -> None:
    run = fedkd.run(tiny(name="it", run_dir=str(tmp_path), num_server_rounds=3))
    with pytest.raises(FedkdError, match=r"num-server-rounds = 2: .* has 3 rounds already"):
        resume(run.path, num_server_rounds=2)
    assert resume(run.path, num_server_rounds=3) == run
    odd = fedkd.run(tiny(name="odd", run_dir=str(tmp_path), num_server_rounds=3, evaluate_every=2))
    with pytest.raises(FedkdError, match=r"round 3 of .* was tested as the last one"):
        resume(odd.path, num_server_rounds=5)
    assert fedkd.Run.load(odd.path) == odd


def test_a_number_of_rounds_that_was_edited_is_not_believed(tmp_path: Path) -> None:
    def stop_after_two(row: Any) -> None:
        if row["round"] == 2:
            raise KeyboardInterrupt

    def edit(folder: Path, rounds: int) -> None:
        file = folder / "experiment.toml"
        written = re.sub(
            r"num-server-rounds = \d+", f"num-server-rounds = {rounds}", file.read_text()
        )
        file.write_text(written)

    done = fedkd.run(tiny(name="done", run_dir=str(tmp_path), num_server_rounds=3))
    with pytest.raises(KeyboardInterrupt):
        fedkd.run(
            tiny(name="half", run_dir=str(tmp_path), num_server_rounds=3),
            [EachRound(stop_after_two)],
        )
    for rounds in (2, 5):
        edit(done.path, rounds)
        with pytest.raises(FedkdError, match=rf"num-server-rounds = {rounds}, was 3; restore it"):
            resume(done.path)
        edit(done.path, 3)
    assert resume(done.path) == done
    edit(tmp_path / "half", 1)
    with pytest.raises(FedkdError, match=r"num-server-rounds = 1: .* has 2 rounds already"):
        resume(tmp_path / "half")

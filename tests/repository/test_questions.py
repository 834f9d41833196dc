"""The questions' scripts: what they say follows from what they measured, and the pages hold just that."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from statistics import fmean

import pytest
import torch
from paths import ROOT
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

import fedkd
from simulations import _questions, broadcast_teacher, labelled_or_unlabelled, mixed_architectures
from simulations._questions import Gain, Question, Result, where
from simulations.foreign_public_set import noise

Tensors = dict[str, Tensor]
Cells = dict[str, Sequence[Sequence[float]]]

PAGES = ROOT / "docs/questions"
NAMES = sorted(
    path.stem
    for path in (ROOT / "simulations").glob("*.py")
    if "QUESTION = Question(" in path.read_text(encoding="utf-8")
)


def question_of(name: str) -> Question:
    question = import_module(f"simulations.{name}").QUESTION
    assert isinstance(question, Question)
    return question


def result_of(
    name: str,
    points: Sequence[str],
    lines: Mapping[str, Sequence[Sequence[float]]],
    at: Mapping[str, Sequence[float]] | None = None,
) -> Result:
    """Accuracies in percent by line, point and seed."""
    exact = {line: [[a / 100 for a in cell] for cell in row] for line, row in lines.items()}
    places = {line: list(row) for line, row in (at or {}).items()}
    seeds = list(range(len(next(iter(lines.values()))[0])))
    return Result(name, "?", "", "x", list(points), exact, {}, seeds, 97, places)


def say(result: Result) -> str:
    return question_of(result.name).answer(result)


# --- What is committed ----------------------------------------------------------------------------


def test_there_are_eight_and_the_index_lists_all_and_no_others() -> None:
    assert len(NAMES) == 8
    listed = re.findall(r"python simulations/(\w+)\.py", (PAGES / "README.md").read_text("utf-8"))
    assert sorted(listed) == NAMES
    for ending in ("json", "svg"):
        assert sorted(path.stem for path in PAGES.glob(f"*.{ending}")) == NAMES
    assert sorted(path.stem for path in PAGES.glob("*.md")) == sorted([*NAMES, "README"])


@pytest.mark.parametrize("name", NAMES)
def test_the_committed_numbers_give_the_committed_page_and_sentence(name: str) -> None:
    result, answer = _questions.load(PAGES / f"{name}.json")
    question = question_of(name)
    assert result.name == question.name == name
    assert (result.question, result.setting) == (question.question, question.setting)
    assert answer == question.answer(result)
    assert (PAGES / f"{name}.md").read_text(encoding="utf-8") == _questions.page(result, answer)
    assert _questions.index(PAGES) == (PAGES / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", NAMES)
def test_the_committed_grid_is_the_scripts_and_whole(name: str) -> None:
    result, _ = _questions.load(PAGES / f"{name}.json")
    grid = question_of(name).grid()
    assert list(result.lines) == list(grid)
    assert len(result.seeds) >= 3
    assert result.test_size >= 1_000
    for line, row in grid.items():
        cells = dict(zip(result.points, result.lines[line], strict=True))
        assert [p for p in result.points if cells[p]] == list(row)
        assert all(len(cells[point]) == len(result.seeds) for point in row)
        assert all(0.05 < accuracy < 1 for point in row for accuracy in cells[point])


@pytest.mark.parametrize("name", NAMES)
def test_the_table_holds_the_means_and_deviations_of_the_json(name: str) -> None:
    """Parsed back from the Markdown, against sums written out here."""
    values = json.loads((PAGES / f"{name}.json").read_text(encoding="utf-8"))
    text = (PAGES / f"{name}.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert rows[0][1:] == list(values["lines"])
    assert [row[0] for row in rows[1:]] == values["points"]
    for place, row in enumerate(rows[1:]):
        for line, cell in zip(values["lines"], row[1:], strict=True):
            sample = [100 * a for a in values["lines"][line][place]]
            middle = sum(sample) / len(sample)
            spread = (sum((a - middle) ** 2 for a in sample) / (len(sample) - 1)) ** 0.5
            shown = re.match(r"([\d.]+) ± ([\d.]+)", cell)
            assert shown is not None
            assert abs(float(shown[1]) - middle) < 0.0501
            assert abs(float(shown[2]) - spread) < 0.0501


@pytest.mark.parametrize("name", NAMES)
def test_the_committed_figure_names_every_line_and_axis(name: str) -> None:
    result, _ = _questions.load(PAGES / f"{name}.json")
    root = ET.fromstring((PAGES / f"{name}.svg").read_text(encoding="utf-8"))
    texts = {
        "".join(node.itertext()).strip() for node in root.iter("{http://www.w3.org/2000/svg}text")
    }
    assert set(result.lines) <= texts
    assert {result.place or result.x, "test accuracy in %"} <= texts
    if not result.at:
        assert set(result.points) <= texts


def test_a_figure_is_the_same_bytes_each_time_and_moves_with_the_numbers(tmp_path: Path) -> None:
    result = result_of("x", ["a", "b"], {"one": [[10, 13], [20, 29]], "two": [[7, 5], []]})
    other = result_of("x", ["a", "b"], {"one": [[10, 13], [20, 31]], "two": [[7, 5], []]})
    for number, drawn in enumerate((result, result, other)):
        _questions.draw(drawn, tmp_path / f"{number}.svg")
    first, second, third = ((tmp_path / f"{n}.svg").read_bytes() for n in range(3))
    assert first == second != third


# --- Sentences ------------------------------------------------------------------------------------


def test_where_is_grammatical_for_every_outcome() -> None:
    points = ["a", "b", "c"]
    assert where(points, [False] * 3) == "nowhere in the grid"
    assert where(points, [True] * 3) == "everywhere in the grid"
    assert where(points, [False, True, False]) == "only at b"
    assert where(points, [True, False, True]) == "at a and c"
    assert where([*points, "d"], [True, True, True, False]) == "at a, b and c"


def test_a_gain_is_paired_by_seed() -> None:
    """The lines swing by 20 points, their difference by 2."""
    result = result_of("x", ["p"], {"a": [[31, 52, 44]], "b": [[30, 50, 41]]})
    gain = result.gain("a", "b", "p")
    assert gain.mean == pytest.approx(2)
    assert gain.spread == pytest.approx(1)
    assert (str(gain), gain.words) == ("+2.0 ± 1.0", "2.0 ± 1.0 points above")
    assert Gain(-3.25, None).words == "3.2 points below"
    assert Gain(-0.04, 7.0).words == "level with"


@pytest.mark.parametrize(
    ("gains", "said"),
    [
        (
            (5, 12, 31),
            "beats local training by 10 points or more at 1 and 0.1 (+5.0 ± 0.0 points at IID",
        ),
        ((5, 9, 9), "beats local training by 10 points or more nowhere in the grid (+5.0"),
        ((11, 12, 13), "beats local training by 10 points or more everywhere in the grid (+11.0"),
        ((-5, 9, 12), "beats local training by 10 points or more only at 0.1 (-5.0"),
    ],
)
def test_how_non_iid(gains: Sequence[float], said: str) -> None:
    points = ["IID", "1", "0.1"]
    alone = [[41, 43], [31, 37], [23, 20]]
    better = [[a + gain for a in cell] for cell, gain in zip(alone, gains, strict=True)]
    own = [[61, 63], [71, 77], [83, 80]]
    worse = [[62, 64], [69, 75], [80, 77]]
    lines: Cells = {"local only": alone, "DS-FL": better, "FedMD": alone, "FedAvg": alone}
    lines |= {"local only, own mix": own, "DS-FL, own mix": worse, "FedMD, own mix": own}
    first, second = say(result_of("how_non_iid", points, lines)).split(" FedMD ")
    assert f"DS-FL {said}" in first
    assert (
        "own mix of classes a client is a point or more worse off than alone at 1 and 0.1 (+1.0"
        in first
    )
    assert "a point or more worse off than alone nowhere in the grid" in second


@pytest.mark.parametrize(
    ("accuracies", "said"),
    [
        ((31, 50, 51), "DS-FL is within 2 points of its 51.0 % with 300 public images from 30 on"),
        ((50, 40, 51), "DS-FL needs 300 public images, the most of the grid, for its 51.0 %"),
        ((53, 54, 51), "DS-FL is within 2 points of its 51.0 % with 300 public images from 10 on"),
    ],
)
def test_how_few_public_images(accuracies: Sequence[float], said: str) -> None:
    """Fewest means that no larger set falls short: one lucky small set is not enough."""
    lines: Cells = {
        "local only": [[40, 40]] * 3,
        "DS-FL": [[a - 1, a + 1] for a in accuracies],
        "FedMD": [[39, 42]] * 3,
    }
    text = say(result_of("how_few_public_images", ["10", "30", "300"], lines))
    assert said in text
    assert text.endswith("beats local training by 10 points or more nowhere in the grid.")


def test_foreign_public_set_says_what_share_of_the_gain_is_left() -> None:
    points = ["MNIST, own", "MNIST, other", "MNIST, noise"]
    lines: Cells = {
        "local only": [[50, 51]] * 3,
        "DS-FL": [[70, 71], [55, 56], [48, 49]],
        "FedMD": [[49, 50], [53, 54], [50, 51]],
    }
    dsfl, fedmd = say(result_of("foreign_public_set", points, lines)).split(". ")
    assert dsfl.startswith("DS-FL on MNIST ends 20.0 ± 0.0 points above local training with public")
    assert "5.0 ± 0.0 points above it with those of the other data set (25 % of that)" in dsfl
    assert "2.0 ± 0.0 points below it with noise (-10 % of that)" in dsfl
    assert "of that" not in fedmd  # there is no gain to have a share of
    assert fedmd == (
        "FedMD on MNIST ends 1.0 ± 0.0 points below local training with public images of its own kind, "
        "3.0 ± 0.0 points above it with those of the other data set and level with it with noise."
    )


def test_labelled_or_unlabelled_compares_each_with_its_own_control() -> None:
    lines: Cells = {
        "local only": [[40, 40]] * 2,
        "labels alone": [[60, 60], [70, 70]],
        "labels alone, shard last": [[50, 50], [55, 55]],
        "DS-FL": [[58, 58], [71, 71]],
        "DS-FL, labels": [[59, 59], [70.5, 70.5]],
        "FedMD": [[45, 45], [50, 50]],
        "FedMD, labels": [[53, 53], [60, 60]],
    }
    text = say(result_of("labelled_or_unlabelled", ["50", "800"], lines))
    first, second = text.split("). ")
    assert "labelled DS-FL ends 1.0 ± 0.0 points above unlabelled DS-FL, with 800 0.5" in first
    assert "send nothing nowhere in the grid (-1.0 ± 0.0 points with 50, +0.5" in first
    assert "send nothing everywhere in the grid (+3.0 ± 0.0 points with 50, +5.0" in second


def test_alpha_and_tau() -> None:
    lines: Cells = {"α = 0.3": [[60, 62], [50, 51]], "α = 0.9": [[69, 71], [69.5, 70]]}
    text = say(result_of("alpha_and_tau", ["1", "20"], lines))
    assert "is 50.5 % (α = 0.3, τ = 20) to 70.0 % (α = 0.9, τ = 1, at the edge of the grid)" in text
    assert "are 2 of 4 pairs (α = 0.9, τ = 1; α = 0.9, τ = 20)" in text
    # By hand: means by τ are 65.5 and 60.125, by α 55.75 and 69.875.
    assert "τ moves the accuracy by 5.4 points and α by 14.1" in text


def test_alpha_and_tau_says_nothing_of_edges_where_the_best_is_inside() -> None:
    lines: Cells = {f"α = {a:g}": [[60, 60]] * 3 for a in (0.1, 0.9)}
    lines["α = 0.9"] = [[61, 61], [62, 62], [61, 61]]
    lines["α = 1"] = [[60, 60]] * 3
    text = say(result_of("alpha_and_tau", ["1", "5", "20"], lines))
    assert "to 62.0 % (α = 0.9, τ = 5); within" in text
    assert "are 3 of 9 pairs (" in text


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        ((0, 0.5, 8), "down to 20 of its 320 bits a label (simplex:2, changed rows packed)"),
        ((0, 3, 8), "down to 300 of its 320 bits a label (float32, changed rows packed)"),
        ((0, -2, -3), "down to 2.5 of its 320 bits a label (simplex:1, changed rows packed)"),
    ],
)
def test_bits_per_label(losses: Sequence[float], said: str) -> None:
    names = ("DS-FL", "DS-FL, changed and packed", "FedMD, changed and packed")
    cells = [[80 - loss, 82 - loss] for loss in losses]
    at = {name: [300.0, 20.0, 2.5] for name in names}
    points = ["float32", "simplex:2", "simplex:1"]
    text = say(result_of("bits_per_label", points, dict.fromkeys(names, cells), at))
    assert text.count(said) == 2
    assert text.count(f"changes its accuracy by {-losses[-1]:+.1f} ± 0.0 points.") == 2


def test_bits_are_those_of_a_label_whatever_the_sizes() -> None:
    """800 images, ten clients and eight rounds of float32: 800·10·8·10·4 bytes are 320 bits each."""
    from simulations.bits_per_label import bits

    sent = {"DS-FL": [2_560_000.0, 1_280_000.0], "FedMD": [32_000.0, 8_000.0]}
    result = result_of("bits_per_label", ["a", "b"], {name: [[1], [1]] for name in sent})
    placed = bits(Result(**{**vars(result), "bytes_up": sent}))
    assert placed.at == {"DS-FL": [320.0, 160.0], "FedMD": [4.0, 1.0]}


def test_mixed_architectures() -> None:
    thirds = {"linear": (60, 70), "mlp-20": (80, 78), "convolutional": (90, 90)}
    row: dict[str, float] = {
        "all linear": 60,
        "all mlp-20": 80,
        "all convolutional": 88,
        "mixed": 79,
    }
    for name, (alike, mixed) in thirds.items():
        row |= {f"{name} third, all alike": alike, f"{name} third, mixed": mixed}
    cells = [[value - 1, value + 1] for value in row.values()]
    text = say(result_of("mixed_architectures", list(row), {"DS-FL": cells, "FedMD": cells}))
    assert "9.0 ± 0.0 points below the best network for all (convolutional)" in text
    assert "19.0 ± 0.0 points above the worst (linear)" in text
    assert (
        "10.0 ± 0.0 points above (linear), 2.0 ± 0.0 points below (mlp-20) and level with" in text
    )


def test_broadcast_teacher() -> None:
    lines: Cells = {
        "labels alone": [[50, 51], [60, 61]],
        "server's teacher": [[53, 54], [60.5, 61.5]],
        "local teachers": [[57, 58], [58, 59]],
    }
    text = say(result_of("broadcast_teacher", ["50", "800"], lines))
    assert (
        "above students of local teachers only at 800 (for 50 public images: 4.0 ± 0.0 points below"
        in text
    )
    assert "that it learnt itself only at 50 (for 50 images: 3.0 ± 0.0 points above" in text


# --- What is measured -----------------------------------------------------------------------------


def test_a_whole_script_runs_and_a_third_of_the_clients_is_that_third(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The measuring itself, on one federation: a cell is the mean over the clients it names."""
    monkeypatch.chdir(tmp_path)
    experiment = _questions.BASE.smoke()
    cells = {
        "all": _questions.Cell(experiment, "LocalOnly"),
        "one": _questions.Cell(experiment, "LocalOnly", slice(1, None, 3)),
        "own": _questions.Cell(experiment, "LocalOnly", own_mix=True),
    }
    question = Question(
        "x", "?", "", "x", lambda: {"line": cells}, lambda _: "so", smoke=_questions.whole
    )
    result = question.measure(smoke=True)
    (run,) = fedkd.compare(experiment, ["LocalOnly"], [0]).runs["LocalOnly"]
    clients = [a for a in run.client_accuracy if a is not None]
    assert len(set(clients)) == 3
    assert result.cell("line", "all") == [pytest.approx(fmean(clients), abs=1e-6)]
    assert result.cell("line", "one") == [pytest.approx(clients[1], abs=1e-6)]
    assert result.cell("line", "own") == [pytest.approx(run.result["own_accuracy"], abs=1e-6)]
    assert result.cell("line", "own") != result.cell("line", "all")
    assert result.test_size == 200
    _questions.write(tmp_path / "docs", result, "so")
    again, answer = _questions.load(tmp_path / "docs/x.json")
    assert (again, answer) == (result, "so")


def test_nothing_but_what_a_question_asks_differs_between_its_cells() -> None:
    """Each grid says in its cells which keys it varies."""
    varied = {
        "alpha_and_tau": {"alpha", "tau"},
        "bits_per_label": {"codec"},
        "broadcast_teacher": {
            "distill_epochs",
            "public_size",
            "server_model",
            "teacher",
            "train_size",
        },
        "foreign_public_set": {"dataset", "public", "train_size"},
        "how_few_public_images": {"distill_epochs", "public_size", "train_size"},
        "how_non_iid": {"partition", "partition_alpha"},
        "labelled_or_unlabelled": {"distill_epochs", "public_labels", "public_size", "train_size"},
        "mixed_architectures": {"student"},
    }
    assert sorted(varied) == NAMES
    for name, keys in varied.items():
        cells = [cell for row in question_of(name).grid().values() for cell in row.values()]
        dumps = [cell.experiment.model_dump() for cell in cells]
        assert {key for dump in dumps for key in dump if dump[key] != dumps[0][key]} == keys


def test_the_broadcasting_teacher_learns_public_labels_alone_and_hears_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its accuracy is the same whatever the clients hold; what they send is nothing."""
    monkeypatch.chdir(tmp_path)
    base = labelled_or_unlabelled.sizes(public_labels=True)["200"].smoke()
    base = base.replace(
        server_model=broadcast_teacher.TEACHER, strategy="simulations.broadcast_teacher:Broadcast"
    )
    iid, skewed = (fedkd.run(base.replace(partition=p)) for p in ("iid", "dirichlet"))
    assert iid.server_accuracy == skewed.server_accuracy
    assert iid.client_accuracy != skewed.client_accuracy
    assert iid.bytes_up == skewed.bytes_up == 0
    # Two rounds: the knowledge of the first is digested in the second, that of the second at the end.
    assert iid.bytes_down == 2 * 3 * 120 * 10 * 4


def test_the_networks_are_as_large_as_said_and_run_side_by_side() -> None:
    shape, said = (1, 28, 28), {"linear": 7_850, "small_cnn": 5_338}
    for name, count in said.items():
        build = getattr(mixed_architectures, name)
        torch.manual_seed(3)
        models = [build(shape, 10) for _ in range(3)]
        assert sum(p.numel() for p in models[0].parameters()) == count
        images = torch.randn(5, *shape)
        params, buffers = stack_module_state(models)
        skeleton = build(shape, 10)

        def outputs(p: Tensors, b: Tensors, x: Tensor, model: nn.Module = skeleton) -> Tensor:
            found: Tensor = functional_call(model, (p, b), (x,))
            return found

        together = vmap(outputs, (0, 0, None))(params, buffers, images)
        apart = torch.stack([model(images) for model in models])
        torch.testing.assert_close(together, apart)
        assert f"{count:,}" in (mixed_architectures.__doc__ or "")


def test_noise_is_the_same_each_time_and_shows_nothing() -> None:
    first, second = noise(), noise()
    assert torch.equal(first.train_images, second.train_images)
    pixels = first.train_images.double()
    assert abs(float(pixels.mean()) - 127.5) < 0.5
    assert float(pixels.flatten(1).T[:400].corrcoef().fill_diagonal_(0).abs().max()) < 0.2

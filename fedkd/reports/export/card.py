"""Model cards of exported models: accuracy, size, latency, training and limits.

The JSON holds what was measured and recorded; the Markdown is made from the JSON alone.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import version
from math import sqrt
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from fedkd import data
from fedkd.records.files import package_version
from fedkd.reports.export.forms import BATCH, INPUT, OUTPUT
from fedkd.reports.export.latency import machine
from fedkd.reports.export.trained import Trained
from fedkd.training.architectures import architectures_of
from fedkd.training.models import num_parameters
from fedkd.wording import percent

Card = Mapping[str, Any]

_FEDERATED = ("strategy", "strategy-config", "num-server-rounds", "num-clients", "fraction-train")
_SETTINGS = (
    "train-size", "partition", "partition-alpha", "public", "public-size", "public-labels", "student",
    "teacher", "local-epochs", "distill-epochs", "batch-size", "optimizer", "learning-rate",
    "weight-decay", "augment", "alpha", "tau", "kl-reduction", "seed",
)  # fmt: skip
"""Keys of the experiment that a card shows; the JSON holds them all."""

NOTABLE = 0.01
"""Difference from the run's recorded accuracy, 0..1, above which a card mentions it."""


@dataclass(frozen=True, eq=False)
class Verified:
    """Outputs of an exported program and of the original for the same test images.

    Attributes:
        logits: of the program, ``[N, C]``.
        expected: of the original, ``[N, C]``.
        labels: int64 ``[N]``.
    """

    logits: Tensor
    expected: Tensor
    labels: Tensor

    @property
    def largest_difference(self) -> float:
        """Largest absolute difference of a logit."""
        return float((self.logits.double() - self.expected.double()).abs().max())

    def as_json(self) -> dict[str, Any]:
        """Return accuracies 0..1, the file's 95 % interval, and the agreement of file and original."""
        predicted, original = self.logits.argmax(1), self.expected.argmax(1)
        correct, images = int((predicted == self.labels).sum()), len(self.labels)
        return {
            "file": correct / images,
            "interval": list(wilson(correct, images)),
            "original": float((original == self.labels).double().mean()),
            "images": images,
            "largest_difference": self.largest_difference,
            "largest_logit": float(self.expected.abs().max()),
            "equal_predictions": float((predicted == original).double().mean()),
        }


def wilson(correct: int, images: int, level: float = 0.95) -> tuple[float, float]:
    """Return the binomial interval of Wilson (1927) for a share, within 0..1 even at its ends."""
    z = NormalDist().inv_cdf((1 + level) / 2)
    share, weight = correct / images, z * z / images
    middle = (share + weight / 2) / (1 + weight)
    reach = z * sqrt(share * (1 - share) / images + weight / (4 * images)) / (1 + weight)
    return max(0.0, middle - reach), min(1.0, middle + reach)


# --- JSON -----------------------------------------------------------------------------------------


def card_of(
    trained: Trained,
    *,
    to: str,
    runtime: str,
    file: str,
    content: bytes,
    verified: Verified,
    calibration: Mapping[str, Any] | None,
    seconds: Mapping[int, Mapping[str, float]],
    repeats: int,
) -> dict[str, Any]:
    """Return the card as plain data.

    Args:
        trained: the model.
        to: the form of the export.
        runtime: the package that runs it.
        file: name of the exported file.
        content: bytes of the file.
        verified: its outputs beside the original's, on the test images.
        calibration: which images it was calibrated on and how many, or `None`.
        seconds: medians by batch size of ``file``, ``original`` and, where there is one, ``teacher``.
        repeats: calls behind each median.
    """
    return {
        "file": {
            "name": file,
            "form": to,
            "bytes": len(content),
            "sha256": sha256(content).hexdigest(),
        },
        "model": _model(trained),
        "input": _input(trained),
        "output": {"name": OUTPUT, "dtype": "float32", "shape": [BATCH, trained.data.num_classes]},
        "data": _data(trained),
        "accuracy": {**verified.as_json(), "recorded": trained.recorded},
        "calibration": calibration,
        "latency": _latency(trained, runtime, seconds, repeats),
        "training": _training(trained),
        "software": {
            "fedkd": package_version("fedkd"),
            **{name: version(name) for name in dict.fromkeys(("torch", runtime))},
        },
    }


def _model(trained: Trained) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "role": trained.model,
        "owner": trained.owner,
        "chosen": trained.chosen,
        "architecture": trained.architecture,
        "parameters": num_parameters(architectures_of(trained.data).skeleton(trained.architecture)),
    }
    if trained.teacher != "none" and trained.model != "teacher":
        facts["teacher"] = trained.teacher
        facts["teacher_parameters"] = num_parameters(
            architectures_of(trained.data).skeleton(trained.teacher)
        )
    return facts


def _input(trained: Trained) -> dict[str, Any]:
    test = trained.data.test
    return {
        "name": INPUT,
        "dtype": "uint8",
        "shape": [BATCH, *trained.data.input_shape],
        "mean": list(test.mean),
        "std": list(test.std),
    }


def _data(trained: Trained) -> dict[str, Any]:
    experiment, train = trained.experiment, trained.data.train
    assert train.labels is not None
    classes = data.load(experiment.dataset, experiment.data_dir).class_names
    return {
        "name": experiment.dataset,
        "classes": list(classes),
        "labelled_images": len(trained.rows),
        "labelled_classes": len(train.labels[trained.rows].unique()),
        "fold": experiment.fold,
    }


def _latency(
    trained: Trained, runtime: str, seconds: Mapping[int, Mapping[str, float]], repeats: int
) -> dict[str, Any]:
    reference = (
        "teacher" if all("teacher" in by_name for by_name in seconds.values()) else "original"
    )
    return {
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "runtime": runtime,
        "repeats": repeats,
        "reference": reference,
        "seconds": {str(size): dict(by_name) for size, by_name in seconds.items()},
        "ratio": {
            str(size): {name: spent / by_name[reference] for name, spent in by_name.items()}
            for size, by_name in seconds.items()
        },
    }


def _training(trained: Trained) -> dict[str, Any]:
    folder = trained.folder
    config = shlex.quote(str(folder.path / "experiment.toml"))
    command = "run"
    seeds = ""
    if trained.kind == "central":
        command, seeds = "central", f" --seeds {','.join(map(str, trained.seeds))}"
    return {
        "kind": trained.kind,
        "run": str(folder.path),
        "fedkd": folder.environment.get("fedkd"),
        "command": f"fedkd {command} --config {config} --name auto{seeds}",
        "experiment": folder.experiment.flat(),
    }


# --- Markdown -------------------------------------------------------------------------------------


def as_markdown(card: Card) -> str:
    """Return the card as Markdown; names from outside are escaped."""
    file, model = card["file"], card["model"]
    title = f"# {_escaped(model['architecture'])} on {_escaped(card['data']['name'])}"
    return (
        "\n\n".join(
            [
                title,
                f"The {model['role']} of {model['owner']} ({_escaped(model['chosen'])}), exported to "
                f"{file['form']} by fedkd {_escaped(card['software']['fedkd'])}.",
                _table(("", ""), _facts(card)),
                f"## Latency\n\n{_latency_text(card)}",
                f"## Training\n\n{_training_text(card)}",
                "## Intended use and limits\n\n" + "\n".join(f"- {text}" for text in limits(card)),
            ]
        )
        + "\n"
    )


def facts_of(card: Card) -> dict[str, str]:
    """Return the main facts of a card, for a terminal."""
    ratio, latency = card["latency"]["ratio"], card["latency"]
    owner = "teacher's" if latency["reference"] == "teacher" else "original's"
    shares = ", ".join(f"{by['file']:.2f} at batch {size}" for size, by in ratio.items())
    facts = {
        "model": f"{card['model']['role']} of {card['model']['owner']}, "
        f"{card['model']['architecture']}, {card['model']['parameters']:,} parameters",
        "size": f"{card['file']['bytes']:,} bytes",
        "accuracy": _accuracy(card),
        "the original": _original(card),
        "latency": f"{shares} of the {owner} in PyTorch",
    }
    return facts


def _facts(card: Card) -> list[tuple[str, str]]:
    model, file = card["model"], card["file"]
    rows = [
        ("parameters", f"{model['parameters']:,}"),
        ("file", f"{_escaped(file['name'])}, {file['bytes']:,} bytes, SHA-256 {file['sha256']}"),
        ("input", _tensor(card["input"]) + " (pixels 0–255; normalised inside)"),
        ("output", _tensor(card["output"]) + " (before the softmax)"),
        ("classes", ", ".join(_escaped(name) for name in card["data"]["classes"])),
        ("accuracy", _accuracy(card)),
        ("compared with the original", _original(card)),
        ("exported with", _software(card["software"])),
    ]
    if "teacher" in model:
        teacher = f"{_escaped(model['teacher'])}, {model['teacher_parameters']:,} parameters"
        rows.insert(1, ("teacher", teacher))
    if (calibration := card["calibration"]) is not None:
        rows.append(("calibrated on", f"{calibration['images']} {_escaped(calibration['of'])}"))
    return rows


def _tensor(tensor: Card) -> str:
    shape = ", ".join(map(str, tensor["shape"]))
    return f"`{tensor['name']}`, {tensor['dtype']} `[{shape}]`"


def _accuracy(card: Card) -> str:
    accuracy = card["accuracy"]
    low, high = accuracy["interval"]
    return (
        f"{percent(accuracy['file'])} (95 % interval {percent(low)} to {percent(high)}) on "
        f"{_test_images(card)}"
    )


def _test_images(card: Card) -> str:
    images, fold = f"{card['accuracy']['images']:,}", card["data"]["fold"]
    return f"{images} test images" if fold == "none" else f"{images} images held out (fold {fold})"


def _original(card: Card) -> str:
    accuracy = card["accuracy"]
    return (
        f"{percent(accuracy['original'])} in PyTorch; same class for "
        f"{percent(accuracy['equal_predictions'])} of the images, logits differ by up to "
        f"{accuracy['largest_difference']:.2g} (the largest is {accuracy['largest_logit']:.3g})"
    )


def _software(software: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {_escaped(number)}" for name, number in software.items())


def _latency_text(card: Card) -> str:
    latency, model = card["latency"], card["model"]
    names = {
        "file": f"this file ({latency['runtime']})",
        "original": "the original in PyTorch",
        "teacher": f"the teacher {_escaped(model.get('teacher', ''))} in PyTorch",
    }
    sizes = list(latency["seconds"])
    head = ["", *(f"batch {size}" for size in sizes)]
    rows = [
        [name, *(_time(latency, size, key) for size in sizes)]
        for key, name in names.items()
        if key in latency["seconds"][sizes[0]]
    ]
    return (
        f"{_table(head, rows)}\n\nMedian of {latency['repeats']} alternating calls on "
        f"{_escaped(latency['machine'])}, {latency['threads']} thread(s). In brackets: ratio to "
        f"{names[latency['reference']]}."
    )


def _time(latency: Card, size: str, key: str) -> str:
    return f"{1e3 * latency['seconds'][size][key]:.3g} ms ({latency['ratio'][size][key]:.2f})"


def _training_text(card: Card) -> str:
    training, held = card["training"], card["data"]
    experiment = training["experiment"]
    keys = (*_FEDERATED, *_SETTINGS) if training["kind"] == "federated" else _SETTINGS
    rows = [(key, _escaped(experiment[key])) for key in keys]
    subject = "Its client holds" if training["kind"] == "federated" else "There were"
    command = training["command"]
    return (
        f"{_how(card)} {subject} {held['labelled_images']:,} labelled images of "
        f"{held['labelled_classes']} of {len(held['classes'])} classes. Trained by fedkd "
        f"{_escaped(training['fedkd'])}; repeat with\n\n    {' '.join(command.split())}\n\n"
        f"{_table(('key', 'value'), rows)}"
    )


def _how(card: Card) -> str:
    experiment = card["training"]["experiment"]
    rounds, strategy = experiment["num-server-rounds"], _escaped(experiment["strategy"])
    return {
        "student": f"Student of a federation: {strategy}, {rounds} rounds.",
        "teacher": "Teacher, on hard labels.",
        "student-alone": "Student on hard labels alone.",
        "student-distilled": "Student on hard labels and the soft labels of its teacher.",
    }[card["model"]["role"]]


def limits(card: Card) -> list[str]:
    """Return the limits of a card's numbers, as Markdown."""
    held, accuracy = card["data"], card["accuracy"]
    shape, classes = card["input"]["shape"][1:], len(held["classes"])
    texts = [
        f"For images like those of {_escaped(held['name'])}, of exactly {'×'.join(map(str, shape))} "
        f"(channels × height × width). Any other image also gets one of the {classes} classes.",
        f"The accuracy is an average over {_test_images(card)}: it does not apply to other images or "
        "to a single class, nor does it show whether a softmax of the logits is calibrated.",
        "The weights can reveal information about their training images: share the file only with people "
        "who may see these.",
        "The latency is that of the machine named here; on other machines the ratio differs too.",
    ]
    if held["labelled_classes"] < classes:
        texts.append(
            f"Its labelled images show only {held['labelled_classes']} of the {classes} classes; "
            "anything it learnt about the others came from soft labels or shared weights."
        )
    if card["calibration"] is not None:
        texts.append(
            "Eight-bit products are exact on processors that have instructions for them; x86 "
            "processors without VNNI may saturate, so measure the accuracy there again."
        )
    recorded = accuracy["recorded"]
    if recorded is not None and abs(recorded - accuracy["original"]) > NOTABLE:
        texts.append(
            f"The run recorded {percent(recorded)}, but the logits of the original give "
            f"{percent(accuracy['original'])}: the strategy does not classify by logits (FedProto "
            "uses class means), or data or code have changed since."
        )
    return texts


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    cells = [list(head)]
    cells += [["---"] * len(cells[0]), *map(list, rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _escaped(value: object) -> str:
    """Return a value as one line of text, with Markdown and HTML escaped."""
    text = str(value).lower() if isinstance(value, bool) else " ".join(str(value).split())
    return re.sub(r"([\\`*_{}\[\]<>()#!|~&$])", r"\\\1", text)

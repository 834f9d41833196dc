"""Exports a trained model of a run as one verified file that works without fedkd, with a card.

The file is written, loaded again and compared with the original on all test images before it gets its
name, so that every existing file works.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from fedkd.errors import FedkdError, nearest, one_line, printable
from fedkd.randomness import permutation
from fedkd.records.files import replace_file, write_json
from fedkd.reports.export.card import Verified, as_markdown, card_of, facts_of
from fedkd.reports.export.forms import FORMS, Form, FromPixels, Predictor, check_packages
from fedkd.reports.export.latency import latencies
from fedkd.reports.export.trained import Trained, find
from fedkd.training.architectures import architectures_of

TOLERANCE = 1e-4
"""Largest difference of logits for which rounding in float32 accounts, per unit of the largest logit:
networks of 20 layers stay below a tenth of it."""

CALIBRATION = 512
"""Images that the ranges of 8-bit activations are taken from, at most."""

BATCHES = (1, 64)
"""Batch sizes for which the latency is measured."""

REPEATS = 31
"""Timed calls of each model."""


@dataclass(frozen=True)
class Export:
    """A model that was exported.

    Attributes:
        path: of the file.
        card: the content of the JSON beside it; the Markdown shows the same.
    """

    path: Path
    card: dict[str, Any] = field(repr=False)

    @property
    def card_path(self) -> Path:
        """The card as Markdown."""
        return _beside(self.path, ".md")

    @property
    def bytes(self) -> int:
        """Size of the file."""
        return int(self.card["file"]["bytes"])

    @property
    def accuracy(self) -> float:
        """Accuracy of the file on the run's test images, 0..1."""
        return float(self.card["accuracy"]["file"])

    @property
    def largest_difference(self) -> float:
        """Largest absolute difference between its logits and those of the original."""
        return float(self.card["accuracy"]["largest_difference"])

    @property
    def facts(self) -> dict[str, str]:
        """The main facts of the card, for a terminal."""
        return {"file": str(self.path), "card": str(self.card_path), **facts_of(self.card)}


def export(
    run_folder: str | Path,
    to: str = "torch-export",
    *,
    model: str | None = None,
    client: int | None = None,
    seed: int | None = None,
    output: str | Path | None = None,
) -> Export:
    """Export a trained model of a finished run.

    The program takes raw images, uint8 ``[B, c, h, w]`` for any B, and returns logits ``[B, C]``;
    scaling and normalisation are inside.

    Args:
        run_folder: of a federated or central run.
        to: ``"torch-export"``, ``"onnx"``, or ``"int8"``: ONNX with weights and activations of 8
            bits, calibrated on training and public images.
        model: of a federated run ``"student"`` (default) or the client's ``"teacher"``; of a central
            run ``"student-distilled"`` (default), ``"student-alone"`` or ``"teacher"``.
        client: of a federated run; by default the first that took part in the closing exchange.
        seed: of a central run; by default the first.
        output: the file; by default ``<run folder>/exports/<model>-<owner>`` and the form's ending.
            An existing file is replaced. The card is written beside it (``.md``, ``.json``).

    Raises:
        FedkdError: the run has no such model, a package is missing, the model cannot be exported, or
            the file's outputs differ from the original's. No file is written then.
    """
    form = _form(to)
    trained = find(run_folder, model, client, seed)
    path = _path(trained, form, output)
    pixels, of = calibration_images(trained)
    original = FromPixels(trained.module(), trained.data.test.mean, trained.data.test.std)
    with _scratch(path) as scratch:
        draft = Path(scratch) / path.name
        _write(form, to, original, trained, draft, pixels)
        predictor = form.load(draft)
        verified = verify(trained, predictor)
        _refuse_difference(verified, form, to)
        card = card_of(
            trained,
            to=to,
            runtime=form.runtime,
            file=path.name,
            content=draft.read_bytes(),
            verified=verified,
            calibration=None if form.is_exact else {"images": len(pixels), "of": of},
            seconds=_seconds(trained, predictor, original),
            repeats=REPEATS,
        )
        draft.replace(path)
    write_json(_beside(path, ".json"), card)
    replace_file(_beside(path, ".md"), printable(as_markdown(card)).encode())
    return Export(path, card)


def calibration_images(trained: Trained) -> tuple[Tensor, str]:
    """Return random training and public images, uint8 ``[M, c, h, w]``, and a description of them.

    Test images are never used. A client holds its private and the public images. Public images of
    another data set are left out: they would widen the ranges.
    """
    data, experiment = trained.data, trained.experiment
    held, of = [data.train.pixels[trained.rows]], "training images"
    if trained.kind == "federated":
        of += f" of {trained.owner}"
        if experiment.public == "train":
            held.append(data.public.pixels)
            of += " and public images"
    pixels = torch.cat(held)
    drawn = pixels[permutation(len(pixels), experiment.seed, "calibration")[:CALIBRATION]]
    return drawn, of


def verify(trained: Trained, predictor: Predictor) -> Verified:
    """Return the outputs of a program and of the original for all test images of the run.

    The original is evaluated as in the run, with its own normalisation. The first image is a batch
    of its own, the others come in hundreds: batches of several sizes.
    """
    test = trained.data.test
    assert test.labels is not None
    expected = trained.cohort().predict(test)[0]
    parts = [test.pixels[:1], *test.pixels[1:].split(100)]
    logits = torch.cat([predictor(part) for part in parts if len(part)])
    return Verified(logits, expected, test.labels)


def _form(to: str) -> Form:
    if to not in FORMS:
        raise FedkdError(f"to = '{to}'{nearest(to, FORMS)}: must be {', '.join(FORMS)}")
    check_packages(to)
    return FORMS[to]


def _path(trained: Trained, form: Form, output: str | Path | None) -> Path:
    name = f"{trained.model}-{trained.owner.replace(' ', '')}{form.ending}"
    path = trained.folder.path / "exports" / name if output is None else Path(output)
    if not path.name.endswith(form.ending) or path.name == form.ending:
        raise FedkdError(f"output = '{output}': the file's name must end in {form.ending}")
    if path.is_dir():
        raise FedkdError(f"output = '{output}': is a folder; give a file in it")
    return path


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(path.name + ending)


def _scratch(path: Path) -> TemporaryDirectory[str]:
    """Return a temporary folder on the file's disk, from which it can be moved atomically."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return TemporaryDirectory(prefix=".export-", dir=path.parent)
    except OSError as error:
        raise FedkdError(f"{path} cannot be written: {error.strerror}") from error


def _write(
    form: Form, to: str, model: FromPixels, trained: Trained, path: Path, pixels: Tensor
) -> None:
    what = f"to = '{to}': the {trained.model} '{trained.architecture}'"
    try:
        form.write(model, trained.data.input_shape, path, pixels)
    except FedkdError as error:
        raise FedkdError(f"{what}: {error}") from error
    except Exception as error:  # an exporter may fail in any way on a user's model
        raise FedkdError(f"{what} cannot be exported: {one_line(error)}") from error


def _refuse_difference(verified: Verified, form: Form, to: str) -> None:
    """Raise an error for a program that does not compute what the original does.

    Raises:
        FedkdError: its logits differ, or the original's are not finite.
    """
    if not bool(verified.expected.isfinite().all()):
        raise FedkdError("the model's logits are not all finite: its training diverged")
    allowed = TOLERANCE * max(1.0, float(verified.expected.abs().max()))
    if not bool(verified.logits.isfinite().all()) or (
        form.is_exact and verified.largest_difference > allowed
    ):
        raise FedkdError(
            f"to = '{to}': the logits of the file differ from the original's by up to "
            f"{verified.largest_difference:.3g}, and rounding explains {allowed:.3g}; the file is removed"
        )


def _seconds(
    trained: Trained, predictor: Predictor, original: FromPixels
) -> dict[int, dict[str, float]]:
    """Return seconds of the file, the original and the teacher's architecture, by batch size."""
    contenders: dict[str, Predictor] = {"file": predictor, "original": _in_pytorch(original)}
    if trained.teacher != "none" and trained.model != "teacher":
        test = trained.data.test
        teacher = FromPixels(
            architectures_of(trained.data).model(trained.teacher), test.mean, test.std
        )
        contenders["teacher"] = _in_pytorch(teacher)
    pixels = trained.data.test.pixels
    sizes = {size: pixels[torch.arange(size) % len(pixels)] for size in BATCHES}
    return {size: latencies(contenders, batch, REPEATS) for size, batch in sizes.items()}


def _in_pytorch(module: nn.Module) -> Predictor:
    def predict(pixels: Tensor) -> Tensor:
        with torch.no_grad():
            logits: Tensor = module(pixels)
        return logits

    return predict

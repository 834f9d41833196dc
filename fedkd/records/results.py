"""Finished runs, read back from their folders: federations and central baselines."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from fedkd.errors import FedkdError
from fedkd.experiment import Experiment
from fedkd.records.files import Row, read_json, read_lines
from fedkd.records.folder import RunFolder
from fedkd.records.shapes import CentralResult, KnowledgeOfRound, Result, Round, Shards


@dataclass(frozen=True)
class Run:
    """A finished federated run, read from its folder.

    Attributes:
        path: the run folder.
        rounds: one dict per round, as in ``rounds.jsonl``.
        result: the content of ``result.json``.
    """

    path: Path
    rounds: list[Row] = field(repr=False)
    result: dict[str, Any] = field(repr=False)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Return the run in a folder.

        Raises:
            FedkdError: the folder holds no finished run.
        """
        folder = Path(path)
        rows = read_lines(folder / "rounds.jsonl", Round)
        run = cls(folder, rows, read_json(folder / "result.json", Result))
        run._refuse_other_rounds()
        return run

    def _refuse_other_rounds(self) -> None:
        """Raise an error unless the records are of all rounds and of the clients in the result."""
        count, clients = self.result["rounds"], len(self.client_accuracy)
        where = f"{self.path}: rounds.jsonl"
        if [row["round"] for row in self.rounds] != list(range(1, count + 1)):
            raise FedkdError(f"{where} does not hold rounds 1 to {count}, each once")
        for row in self.rounds:
            largest = max([*row["sampled"], *row["answered"]], default=0)
            if largest >= clients:
                raise FedkdError(
                    f"{where}, line {row['round']}: names client {largest}; result.json has clients 0 "
                    f"to {clients - 1}"
                )

    @property
    def experiment(self) -> Experiment:
        """What was run."""
        return RunFolder(self.path).experiment

    @property
    def shards(self) -> dict[str, Any] | None:
        """How many images of each class each client holds, or `None` where there is no record.

        Raises:
            FedkdError: the record is damaged, or of other clients.
        """
        found = read_shards(self.path)
        if found is not None and len(found["counts"]) != len(self.client_accuracy):
            raise FedkdError(
                f"{self.path}: shards.json has {len(found['counts'])} clients, and result.json "
                f"{len(self.client_accuracy)}"
            )
        return found

    @property
    def knowledge(self) -> list[Row]:
        """The content of ``knowledge.jsonl``, one dict per round with soft labels; empty without it.

        Raises:
            FedkdError: the file is damaged, or of other classes than the shards.
        """
        path, shards = self.path / "knowledge.jsonl", self.shards
        rows = read_lines(path, KnowledgeOfRound) if path.exists() else []
        for number, row in enumerate(rows, 1):
            if shards is not None and len(row["by_class"]) != len(shards["classes"]):
                raise FedkdError(
                    f"{path.parent}: {path.name}, line {number}: by_class has {len(row['by_class'])} "
                    f"classes, and shards.json {len(shards['classes'])}"
                )
        return rows

    @property
    def has_accuracy(self) -> bool:
        """Whether any client reported its accuracy: nodes of a deployment may withhold theirs."""
        return self.result["accuracy"] is not None

    @property
    def accuracy(self) -> float:
        """Mean over clients of the student's test accuracy after the closing exchange, 0..1.

        Raises:
            FedkdError: all clients withhold their metrics.
        """
        if not self.has_accuracy:
            raise FedkdError(f"{self.path}: all clients of this run withhold their accuracies")
        return float(self.result["accuracy"])

    @property
    def client_accuracy(self) -> list[float | None]:
        """The same per client, ``[K]``; `None` for one that did not answer, or that withholds it."""
        return list(self.result["client_accuracy"])

    @property
    def server_accuracy(self) -> float | None:
        """Test accuracy of the server's model at the end, where it keeps one."""
        return self.result["server_accuracy"]  # type: ignore[no-any-return]

    @property
    def bytes_up(self) -> int:
        """Payload bytes from all clients to the server over the whole run."""
        return int(self.result["bytes_up"])

    @property
    def bytes_down(self) -> int:
        """Payload bytes from the server to all clients over the whole run, closing included."""
        return int(self.result["bytes_down"])


@dataclass(frozen=True)
class CentralRun:
    """The pooled teacher → student baseline, for one or more seeds.

    Attributes:
        path: the run folder, or ``None`` where the run was not saved.
        seeds: S seeds.
        teacher_accuracies: test accuracy per seed, 0..1.
        student_alone_accuracies: the student trained on hard labels only.
        student_accuracies: the same student distilled from the teacher.
        agreements: share of test images on which distilled student and teacher agree.
        parameters: number of parameters, ``{"teacher": ..., "student": ...}``.
        test_size: test images behind every accuracy.
        seconds: by phase, all seeds together.
        training: by model (``teacher``, ``student-alone``, ``student-distilled``): mean ``loss`` and
            ``gradient_norm`` of each epoch, ``[S][E]`` (`None` where not finite or not measured), and
            ``accuracy`` on its own training images, ``[S]``.
        soft_label_entropy: mean entropy in nats of the teachers' soft labels, ``[S]`` (`None` where not
            finite).
        soft_label_entropy_at_tau: the same at the temperature τ.
    """

    path: Path | None
    seeds: list[int]
    teacher_accuracies: list[float]
    student_alone_accuracies: list[float]
    student_accuracies: list[float]
    agreements: list[float]
    parameters: dict[str, int]
    test_size: int
    seconds: dict[str, float]
    training: dict[str, dict[str, Any]] = field(repr=False)
    soft_label_entropy: list[float | None]
    soft_label_entropy_at_tau: list[float | None]

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Return the run in a folder.

        Raises:
            FedkdError: the folder holds no finished central run.
        """
        folder = Path(path)
        result = read_json(folder / "result.json", CentralResult)
        names = [each.name for each in fields(cls) if each.name != "path"]
        return cls(folder, **{name: result[name] for name in names})

    @property
    def experiment(self) -> Experiment:
        """What was run; its seed need not be one of `seeds`."""
        if self.path is None:
            raise FedkdError("this central run was not saved")
        return RunFolder(self.path).experiment

    @property
    def shards(self) -> dict[str, Any] | None:
        """How many images of each class each client holds, or `None` where there is no record."""
        return None if self.path is None else read_shards(self.path)

    @property
    def teacher_accuracy(self) -> float:
        """Mean over the seeds."""
        return mean_of(self.teacher_accuracies)

    @property
    def student_alone_accuracy(self) -> float:
        """Mean over the seeds."""
        return mean_of(self.student_alone_accuracies)

    @property
    def student_accuracy(self) -> float:
        """Mean over the seeds."""
        return mean_of(self.student_accuracies)

    @property
    def gap_closed(self) -> float | None:
        """(distilled − alone) / (teacher − alone) of the means.

        `None` where the gap is not positive, or a model has learnt nothing with a seed.
        """
        if self.without_learning:
            return None
        return gap_closed(self.student_accuracy, self.student_alone_accuracy, self.teacher_accuracy)

    @property
    def without_learning(self) -> list[str]:
        """The models that have learnt nothing of their training images with a seed: one has diverged.

        They get hardly more of them right than by naming the most frequent class, or their loss is not
        finite in the end.
        """
        return [model for model, course in self.training.items() if _learnt_nothing(course)]

    def as_json(self) -> dict[str, Any]:
        """Return the content of ``result.json``."""
        plural = {
            each.name: getattr(self, each.name) for each in fields(self) if each.name != "path"
        }
        return {
            "teacher_accuracy": self.teacher_accuracy,
            "student_alone_accuracy": self.student_alone_accuracy,
            "student_accuracy": self.student_accuracy,
            "gap_closed": self.gap_closed,
            **plural,
        }


def read_shards(folder: Path) -> dict[str, Any] | None:
    """Return the content of ``shards.json``, or `None` where a folder has none."""
    path = folder / "shards.json"
    return read_json(path, Shards) if path.exists() else None


NOTHING = 0.05
"""Share of the way from the most frequent class to all training images right that is no learning."""


def _learnt_nothing(course: Mapping[str, Any]) -> bool:
    """Whether a model has learnt nothing with some seed; older records do not tell the classes."""
    is_lost = any(losses[-1] is None for losses in course["loss"])
    gains = zip(course["accuracy"], course.get("frequent", ()), strict=False)
    return is_lost or any(right - most < NOTHING * (1 - most) for right, most in gains)


def gap_closed(value: float, low: float, high: float) -> float | None:
    """Return (value − low) / (high − low), or `None` where the gap is not positive."""
    return (value - low) / (high - low) if high > low else None


def mean_of(values: Iterable[float]) -> float:
    """Return the mean of at least one number, summed in their order."""
    listed = list(values)
    return sum(listed) / len(listed)

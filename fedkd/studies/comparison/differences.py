"""Differences between the methods of a comparison, with intervals and tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedkd.errors import FedkdError
from fedkd.records.files import read_result
from fedkd.records.predictions import FILE, Tested
from fedkd.records.results import Run
from fedkd.studies.comparison import significance
from fedkd.studies.comparison.entries import Difference, Entry
from fedkd.studies.comparison.methods import CENTRAL
from fedkd.studies.comparison.verdicts import sentence

Bools = NDArray[np.bool_]


def with_differences(
    entries: Sequence[Entry],
    reference: str,
    target: float | None,
    answers: Mapping[str, Bools | None],
) -> list[Entry]:
    """Return the entries compared with the reference.

    Args:
        entries: all methods.
        reference: the method that the others are compared with.
        target: of the sentences.
        answers: by method, what `right` returns.
    """
    theirs = next(entry for entry in entries if entry.method == reference)
    compared = []
    for entry in entries:
        if entry is not theirs:
            between = difference(entry, theirs, answers[entry.method], answers[reference])
            text = sentence(entry, theirs, between, target)
            entry = replace(entry, difference=between, sentence=text)
        compared.append(entry)
    return compared


def difference(
    ours: Entry, theirs: Entry, our_right: Bools | None, their_right: Bools | None
) -> Difference:
    """Return one method minus another, with its interval and test where they can be computed."""
    paired = significance.paired(_by_client(ours), _by_client(theirs))
    paired = [each for each in paired if len(each)]
    if not paired:  # no client answered in both
        return Difference(ours.accuracy - theirs.accuracy, None, None)
    low, high = significance.bootstrap(paired) or (None, None)
    mean = significance.mean_difference(paired)
    if our_right is None or their_right is None:
        return Difference(mean, low, high)
    won, lost = significance.images_won(our_right, their_right)
    return Difference(mean, low, high, won, lost, significance.sign_test(won, lost))


def _by_client(entry: Entry) -> list[significance.Floats]:
    """Return accuracies by seed: of each client ``[K]``, NaN for none, or the central model's ``[1]``."""
    rows = entry.client_accuracies or [[accuracy] for accuracy in entry.accuracies]
    return [np.array(row, dtype=float) for row in rows]


def right(method: str, runs: Sequence[Run], central: Mapping[int, Path]) -> Bools | None:
    """Return which models of a method, of all seeds, are right on which test images.

    Args:
        method: its name.
        runs: its runs, if it is a strategy.
        central: folders of the central baseline by seed, if it is one of its methods.

    Returns:
        ``[M, N]``, or `None` where a run did not keep its predictions.
    """
    if method in CENTRAL:
        rows = [_right(path, method, seed) for seed, path in central.items()]
    else:
        rows = [_right(run.path, "student") for run in runs]
    known = [each for each in rows if each is not None]
    return np.concatenate(known) if len(known) == len(rows) else None


def _right(path: Path, kind: str, owner: int | None = None) -> Bools | None:
    """Return the rows of one run: all, or the one of a seed."""
    tested = Tested.load(path)
    if tested is None or kind not in tested.models:
        return None
    rows: Bools = tested.correct(kind).numpy()
    images = read_result(path)["test_size"]
    if rows.shape[1] != images:
        raise FedkdError(f"{path}/{FILE} is of {rows.shape[1]} test images, the run of {images}")
    owners = tested.models[kind].owners
    if owner is None or owner in owners:
        return rows if owner is None else rows[[owners.index(owner)]]
    raise FedkdError(f"{path}/{FILE} holds no predictions of seed {owner}")

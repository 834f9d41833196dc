"""Differences between the methods of a comparison, with intervals and tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np

from fedkd.studies.comparison import significance
from fedkd.studies.comparison.entries import Difference, Entry
from fedkd.studies.comparison.verdicts import sentence, verdict


def with_differences(entries: Sequence[Entry], reference: str, target: float | None) -> list[Entry]:
    """Return the entries compared with the reference, their p-values corrected for their number.

    Args:
        entries: all methods.
        reference: the method that the others are compared with.
        target: of the sentences.
    """
    theirs = next(entry for entry in entries if entry.method == reference)
    others = [entry for entry in entries if entry is not theirs]
    between = dict(
        zip((e.method for e in others), corrected([(e, theirs) for e in others]), strict=True)
    )
    return [
        replace(
            entry,
            difference=between[entry.method],
            sentence=sentence(entry, theirs, between[entry.method], target),
        )
        if entry.method in between
        else entry
        for entry in entries
    ]


def verdict_on(entries: Sequence[Entry]) -> str | None:
    """Return which method that sends something is ahead of which others; `None` for fewer than two.

    The best one is known only afterwards, so p is corrected for all pairs, not for those with the best.
    """
    sending = sorted((entry for entry in entries if entry.sent), key=lambda entry: -entry.accuracy)
    if len(sending) < 2:
        return None
    best, *others = sending
    between = corrected(list(combinations(sending, 2)))  # first those with the best
    return verdict(best, list(zip(others, between, strict=False)))


def corrected(pairs: Sequence[tuple[Entry, Entry]]) -> list[Difference]:
    """Return the difference of each pair, p corrected for how many there are."""
    plain = [difference(*pair) for pair in pairs]
    p_values = significance.holm([each.p_value for each in plain])
    return [replace(each, p_holm=p) for each, p in zip(plain, p_values, strict=True)]


def difference(ours: Entry, theirs: Entry) -> Difference:
    """Return one method minus another, seed by seed, with its interval and tests."""
    by_seed = significance.paired(_by_client(ours), _by_client(theirs))
    if not by_seed:  # no client answered in both
        return Difference(ours.accuracy - theirs.accuracy, [])
    low, high = significance.interval(by_seed) or (None, None)
    return Difference(
        float(np.mean(by_seed)),
        by_seed,
        low,
        high,
        p_value=significance.p_value(by_seed),
        p_sign_flip=significance.sign_flip(by_seed),
        detectable=significance.detectable(by_seed),
    )


def _by_client(entry: Entry) -> list[significance.Floats]:
    """Return accuracies by seed: of each client ``[K]``, NaN for none, or the central model's ``[1]``."""
    rows = entry.client_accuracies or [[accuracy] for accuracy in entry.accuracies]
    return [np.array(row, dtype=float) for row in rows]

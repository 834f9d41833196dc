"""Sentences say what the numbers say, in every case."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fedkd.studies.comparison.entries import Difference, Entry, as_row
from fedkd.studies.comparison.verdicts import percent, sentence, verdict
from fedkd.wording import size


def entry(
    method: str, *rounds: int | None, sent: float | None = 1e6, accuracy: float = 0.5
) -> Entry:
    """Return an entry that reaches the target in these rounds, one a seed, a tenth of its bytes each."""
    payload = [None if r is None or sent is None else round(r * sent / 10) for r in rounds]
    half = None if sent is None else sent / 2
    return Entry(
        method, [accuracy] * len(rounds), None, None, None, half, half, 1.0,
        rounds_to_target=None if sent is None else list(rounds), bytes_to_target=payload,
    )  # fmt: skip


FAR = Difference(-0.021, [], -0.028, -0.014)
NEAR = Difference(0.004, [], -0.003, 0.011)
SURE = Difference(0.2, [], 0.15, 0.2504)


@pytest.mark.parametrize(
    ("ours", "theirs", "difference", "text"),
    [
        (
            entry("DSFL", 2, 2, 2, 2, 2, sent=1e6 / 24),
            entry("FedAvg", 2, 2, 2, 2, 2),
            FAR,
            "DSFL reaches 85 % with 1/24 of FedAvg's bytes and ends 2.1 pp lower "
            "(95 % interval 1.4–2.8, 5 seeds).",
        ),
        (
            entry("DSFL", 3, 4),
            entry("FedAvg", 4, 6),
            NEAR,
            "DSFL reaches 85 % with 70 % of FedAvg's bytes and ends 0.4 pp higher "
            "(95 % interval from 0.3 lower to 1.1 higher, 2 seeds).",
        ),
        (
            entry("FedMD", 7, 7, 7),
            entry("FedAvg", 2, 2, 2),
            SURE,
            "FedMD reaches 85 % with 3.5 times FedAvg's bytes and ends 20.0 pp higher "
            "(95 % interval 15.0–25.0, 3 seeds).",
        ),
        (
            entry("FedMD", 7, sent=1e9),
            entry("FedAvg", 2),
            replace(SURE, low=None, high=None),
            "FedMD reaches 85 % with 3,500 times FedAvg's bytes and ends 20.0 pp higher "
            "(1 seed, no interval).",
        ),
        (
            entry("FedProx", 3, 3),
            entry("FedAvg", 3, 3),
            Difference(0.0, [], -0.001, 0.0012),
            "FedProx reaches 85 % with as many bytes as FedAvg and ends level "
            "(95 % interval from 0.1 lower to 0.1 higher, 2 seeds).",
        ),
        (
            entry("FedProx", 3, sent=1_000_700.0),
            entry("FedAvg", 3),
            Difference(-0.0001, []),
            "FedProx reaches 85 % with about as many bytes as FedAvg and ends level "
            "(1 seed, no interval).",
        ),
        (
            entry("DSFL", 3, 3),
            entry("FedAvg", None, None),
            SURE,
            "DSFL reaches 85 %, which FedAvg does not, and ends 20.0 pp higher "
            "(95 % interval 15.0–25.0, 2 seeds).",
        ),
        (
            entry("DSFL", 3, 3, 4),
            entry("FedAvg", None, 5, None),
            SURE,
            "DSFL reaches 85 %, which FedAvg does with 1 of 3 seeds only, and ends 20.0 pp higher "
            "(95 % interval 15.0–25.0, 3 seeds).",
        ),
        (
            entry("DSFL", None, None),
            entry("FedAvg", 4, 4),
            FAR,
            "DSFL does not reach 85 %, which FedAvg does, and ends 2.1 pp lower "
            "(95 % interval 1.4–2.8, 2 seeds).",
        ),
        (
            entry("DSFL", None, None),
            entry("FedAvg", 4, None),
            FAR,
            "DSFL does not reach 85 %, which FedAvg does with 1 of 2 seeds, and ends 2.1 pp lower "
            "(95 % interval 1.4–2.8, 2 seeds).",
        ),
        (
            entry("DSFL", None),
            entry("FedAvg", None),
            FAR,
            "DSFL does not reach 85 %, nor does FedAvg, and ends 2.1 pp lower "
            "(95 % interval 1.4–2.8, 1 seed).",
        ),
        (
            entry("DSFL", 3, None),
            entry("FedAvg", 3, 4),
            FAR,
            "DSFL reaches 85 % with 1 of 2 seeds only (FedAvg with all) and ends 2.1 pp lower "
            "(95 % interval 1.4–2.8, 2 seeds).",
        ),
        (
            entry("DSFL", 3, None),
            entry("FedAvg", None, None),
            FAR,
            "DSFL reaches 85 % with 1 of 2 seeds only (FedAvg with none) and ends 2.1 pp lower "
            "(95 % interval 1.4–2.8, 2 seeds).",
        ),
        (
            entry("LocalOnly", None, sent=0.0),
            entry("FedAvg", 3),
            FAR,
            "Local only sends nothing and ends 2.1 pp lower than FedAvg "
            "(95 % interval 1.4–2.8, 1 seed).",
        ),
        (
            replace(entry("DSFL", 3, sent=6.4e6), gap_closed=0.897, gap_to="student-distilled"),
            entry("LocalOnly", None, sent=0.0),
            SURE,
            "DSFL sends 6.4 MB and ends 20.0 pp higher than local only "
            "(95 % interval 15.0–25.0, 1 seed), closing 90 % of the gap to student "
            "distilled.",
        ),
        (
            replace(entry("DSFL", 3, sent=6.4e6), gap_closed=-0.1, gap_to="student-alone"),
            entry("LocalOnly", None, sent=0.0),
            Difference(0.0, []),
            "DSFL sends 6.4 MB and ends level with local only (1 seed, no interval).",
        ),
        (
            entry("student-distilled", None, sent=None),
            entry("DSFL", 3),
            SURE,
            "Student distilled ends 20.0 pp higher than DSFL (95 % interval 15.0–25.0, 1 seed).",
        ),
        (
            entry("my.py:Confident", 3),
            entry("teacher", None, sent=None),
            FAR,
            "Confident sends 1.0 MB and ends 2.1 pp lower than teacher "
            "(95 % interval 1.4–2.8, 1 seed).",
        ),
        (
            entry("LocalOnly", None, sent=0.0),
            entry("student-alone", None, sent=None),
            FAR,
            "Local only ends 2.1 pp lower than student alone (95 % interval 1.4–2.8, 1 seed).",
        ),
    ],
)
def test_a_sentence(ours: Entry, theirs: Entry, difference: Difference, text: str) -> None:
    assert sentence(ours, theirs, difference, 0.85) == text


def test_without_a_target_bytes_are_those_of_the_run() -> None:
    text = sentence(entry("DSFL", 3), entry("FedAvg", 3), NEAR, None)
    assert text.startswith("DSFL sends 1.0 MB and ends 0.4 pp higher than FedAvg (")


def test_a_target_passed_in_the_first_round_is_not_raced_for() -> None:
    text = sentence(entry("DSFL", 1, 1), entry("FedAvg", 3, 4), NEAR, 0.85)
    assert text.startswith("DSFL sends 1.0 MB and ends 0.4 pp higher than FedAvg (")
    assert "reaches" in sentence(entry("DSFL", 1, 2), entry("FedAvg", 3, 4), NEAR, 0.85)


def test_a_method_whose_seeds_differ_much_is_called_unstable() -> None:
    ours = replace(entry("FedMD", 3, 3, 3), accuracies=[0.8, 0.9, 0.75])
    text = sentence(ours, entry("FedAvg", 3, 3, 3), NEAR, None)
    assert text.endswith("; it is unstable (± 7.6 pp over seeds).")
    steady = replace(ours, accuracies=[0.8, 0.84, 0.78])
    assert "unstable" not in sentence(steady, entry("FedAvg", 3, 3, 3), NEAR, None)


def sure(mean: float, p: float) -> Difference:
    return Difference(mean, [], mean - 0.01, mean + 0.01, p_value=p / 2, p_holm=p)


@pytest.mark.parametrize(
    ("seeds", "others", "text"),
    [
        (
            6,
            {"FedAvg": sure(0.097, 0.02)},
            "DSFL is ahead of FedAvg by 9.7 pp (95 % interval 8.7–10.7, 6 seeds), at equal rounds, not "
            "at equal work or bytes.",
        ),
        (
            6,
            {"FedMD": sure(0.02, 0.3), "FedAvg": sure(0.097, 0.02), "CFD": sure(0.12, 0.01)},
            "DSFL is ahead of FedAvg by 9.7 pp (95 % interval 8.7–10.7, 6 seeds), and of 1 more by more "
            "than that, at equal rounds, not at equal work or bytes. 6 seeds cannot tell it from FedMD.",
        ),
        (
            4,
            {"FedMD": sure(0.02, 0.3), "CFD": sure(0.03, 0.05), "FedAvg": sure(0.1, 0.06)},
            "Undecided: 4 seeds cannot tell DSFL from FedMD, CFD and FedAvg.",
        ),
        (
            2,
            {"FedMD": Difference(0.02, []), "FedAvg": Difference(0.3, [])},
            "Undecided between DSFL, FedMD and FedAvg: 2 seeds show no difference; that takes 3 seeds, "
            "and 6 to be of use.",
        ),
    ],
)
def test_a_verdict(seeds: int, others: dict[str, Difference], text: str) -> None:
    best = entry("DSFL", *([3] * seeds))
    pairs = [(entry(name, *([3] * seeds)), between) for name, between in others.items()]
    assert verdict(best, pairs) == text


def test_numbers_as_text() -> None:
    assert [percent(share) for share in (0.85, 0.8, 1.0, 0.8125, 0.29)] == [
        "85 %", "80 %", "100 %", "81.25 %", "29 %",
    ]  # fmt: skip
    counts = (0, 999, 1000, 853_333, 999_949, 999_950, 6.4e6, 1.25e9, 3e12)
    assert [size(count) for count in counts] == [
        "0 B", "999 B", "1.0 kB", "853.3 kB", "999.9 kB", "1.0 MB", "6.4 MB", "1.25 GB", "3000.00 GB",
    ]  # fmt: skip


def test_a_row_is_plain() -> None:
    row = as_row(replace(entry("DSFL", 3, 4), difference=NEAR))
    assert row["difference"]["low"] == NEAR.low
    assert row["label"] == "DSFL"

"""A comparison in words: one verdict, and one sentence for each method."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

from fedkd.studies.comparison.entries import Difference, Entry
from fedkd.studies.comparison.methods import LOCAL, label, subject
from fedkd.studies.comparison.significance import ERROR, LEAST_SEEDS
from fedkd.wording import size

OF_USE = 6
"""Seeds from which on also the test without any law can show a difference (2/2⁶ < 0.05)."""

UNSTABLE = 0.05
"""Standard deviation of accuracies over seeds from which on a method is called unstable."""


def sentence(ours: Entry, theirs: Entry, difference: Difference, target: float | None) -> str:
    """Return a sentence that compares two methods: bytes to the target, and final accuracy.

    Args:
        ours: the method that the sentence is about.
        theirs: the method it is compared with.
        difference: ours minus theirs.
        target: accuracy 0..1, or `None` where there is none.
    """
    cost = _cost(ours, theirs, target)
    named = cost is not None and theirs.label in cost
    end = _end(difference, "" if named else f" than {theirs.label}", theirs.label)
    text = f"{subject(ours.method)} {'' if cost is None else f'{cost} and '}{end}"
    certainty = _certainty(difference, len(ours.accuracies))
    return f"{text} ({certainty}){_gap(ours, theirs)}{_stability(ours)}."


def verdict(best: Entry, others: Sequence[tuple[Entry, Difference]]) -> str:
    """Return which methods the best one is ahead of, and from which so few seeds cannot tell it.

    Args:
        best: the most accurate method that sends anything.
        others: the others that do, and the best one minus each, with corrected p.
    """
    seeds = len(best.accuracies)
    behind = [each for each in others if _is_sure(each[1])]
    names = _listed([other.label for other, between in others if not _is_sure(between)])
    if seeds < LEAST_SEEDS:
        few = "1 seed shows" if seeds == 1 else f"{seeds} seeds show"
        all_names = _listed([best.label, *(other.label for other, _ in others)])
        return (
            f"Undecided between {all_names}: {few} no difference; that takes "
            f"{LEAST_SEEDS} seeds, and {OF_USE} to be of use."
        )
    if not behind:
        return f"Undecided: {seeds} seeds cannot tell {best.label} from {names}."
    nearest, between = min(behind, key=lambda each: each[1].mean)
    more = f", and of {len(behind) - 1} more by more than that" if len(behind) > 1 else ""
    text = (
        f"{best.label} is ahead of {nearest.label} by {100 * between.mean:.1f} pp "
        f"({_certainty(between, seeds)}){more}, at equal rounds, not at equal work or bytes."
    )
    return f"{text} {seeds} seeds cannot tell it from {names}." if names else text


def _is_sure(difference: Difference) -> bool:
    return difference.p_holm is not None and difference.p_holm < ERROR


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


# --- Cost -----------------------------------------------------------------------------------------


def _cost(ours: Entry, theirs: Entry, target: float | None) -> str | None:
    """Return a comparison of bytes, if any: to the target if both send, else in total."""
    if ours.sent is None:
        return None
    if ours.sent and theirs.sent and target is not None and not _is_easy(ours, theirs):
        return _race(ours, theirs, percent(target))
    if ours.sent:
        return f"sends {size(ours.sent)}"
    return "sends nothing" if theirs.sent else None


def _is_easy(*entries: Entry) -> bool:
    """Whether a method passes the target in the first round with every seed: bytes to it say nothing."""
    return any(set(entry.rounds_to_target or ()) == {1} for entry in entries)


def _race(ours: Entry, theirs: Entry, target: str) -> str:
    """Return a comparison of the bytes to the target of two methods that both send something."""
    mine, their = _successes(ours), _successes(theirs)
    count, name = len(ours.accuracies), theirs.label
    if mine == count and their == count:
        return f"reaches {target} with {_ratio(_bytes(ours), _bytes(theirs), name)}"
    if mine == count:
        they = f"{name} does with {their} of {count} seeds only" if their else f"{name} does not"
        return f"reaches {target}, which {they},"
    if mine == 0:
        they = f"{name} does" + (f" with {their} of {count} seeds" if their < count else "")
        return f"does not reach {target}, {f'which {they}' if their else f'nor does {name}'},"
    they = "all" if their == count else str(their or "none")
    return f"reaches {target} with {mine} of {count} seeds only ({name} with {they})"


def _successes(entry: Entry) -> int:
    return sum(rounds is not None for rounds in entry.rounds_to_target or ())


def _bytes(entry: Entry) -> float:
    return mean(count for count in entry.bytes_to_target or () if count is not None)


def _ratio(ours: float, theirs: float, name: str) -> str:
    """Return bytes relative to another method's, which are not 0."""
    ratio = ours / theirs
    if ours == theirs:
        return f"as many bytes as {name}"
    if 0.995 <= ratio < 1.005:
        return f"about as many bytes as {name}"
    if ratio < 0.1:
        return f"1/{1 / ratio:,.0f} of {name}'s bytes"
    if ratio < 1.995:
        return f"{100 * ratio:.0f} % of {name}'s bytes"
    return f"{ratio:,.{0 if ratio >= 9.95 else 1}f} times {name}'s bytes"


# --- Accuracy -------------------------------------------------------------------------------------


def _end(difference: Difference, than: str, name: str) -> str:
    points = f"{100 * abs(difference.mean):.1f}"
    if points == "0.0":
        return f"ends level{f' with {name}' if than else ''}"
    return f"ends {points} pp {'higher' if difference.mean > 0 else 'lower'}{than}"


def _certainty(difference: Difference, seeds: int) -> str:
    """Return the interval in the direction of the difference, and what it is taken over."""
    over = f"{seeds} seeds" if seeds > 1 else "1 seed"
    if difference.low is None or difference.high is None:
        return f"{over}, no interval"
    low, high = round(100 * difference.low, 1), round(100 * difference.high, 1)
    if low < 0 < high:
        ends = f"from {-low:.1f} lower to {high:.1f} higher"
    else:
        low, high = sorted((abs(low), abs(high)))
        ends = f"{low:.1f}–{high:.1f}"
    return f"95 % interval {ends}, {over}"


def _gap(ours: Entry, theirs: Entry) -> str:
    """Return the gap closed, where the reference is local only."""
    gap = ours.gap_closed
    if theirs.method != LOCAL or gap is None or gap <= 0 or ours.gap_to is None:
        return ""
    return f", closing {100 * gap:.0f} % of the gap to {label(ours.gap_to)}"


def _stability(entry: Entry) -> str:
    """Return a warning about a method whose seeds differ much."""
    if len(entry.accuracies) < LEAST_SEEDS or (entry.spread or 0) < UNSTABLE:
        return ""
    return f"; it is unstable (± {100 * (entry.spread or 0):.1f} pp over seeds)"


# --- Numbers as text ------------------------------------------------------------------------------


def percent(share: float) -> str:
    """Return a share in percent, with the decimals that it has (at most two)."""
    return f"{100 * share:.2f}".rstrip("0").rstrip(".") + " %"

"""How many bits does a soft label need?

mnist-5k, ten clients (Dirichlet 0.3), 800 unlabelled public images of ten classes, students `mlp-20`,
eight rounds. Soft labels cross in both directions as float32, float16, or whole numbers on the simplex
of 8, 4, 2 or 1 bits; as they are, and sending only what changed, packed (simplex: range coding, which
needs `pip install 'fedkd[codec]'`; floats: deflate). Bits are the uplink's payload for one label of one
sample, mean over all clients and rounds. DS-FL and FedMD, three seeds. No download; four minutes on
one core:

    python simulations/bits_per_label.py --write docs/questions
"""

from __future__ import annotations

from dataclasses import replace

from simulations._questions import BASE, Cell, Grid, Question, Result

NUMBERS = ("float32", "float16", "simplex:8", "simplex:4", "simplex:2", "simplex:1")
PLAIN = 32 * 10
"""Bits of a label of ten floats."""

LINES = {
    "DS-FL": ("DSFL", False),
    "DS-FL, changed and packed": ("DSFL", True),
    "FedMD, changed and packed": ("FedMD", True),
}


def codec(number: str, *, packed: bool) -> str:
    """Return the value of the key ``codec``."""
    simplex = number.startswith("simplex")
    plain, best = ("bits", "range") if simplex else ("raw", "deflate")
    return f"{number}+changed+{best}" if packed else f"{number}+all+{plain}"


def grid() -> Grid:
    """Return every line with every number format."""
    return {
        line: {n: Cell(BASE.replace(codec=codec(n, packed=packed)), method) for n in NUMBERS}
        for line, (method, packed) in LINES.items()
    }


def bits(result: Result) -> Result:
    """Return the result with each cell at its bits; plain float32 is 32 bits per class."""
    unit = result.bytes_up["DS-FL"][0] / PLAIN
    at = {line: [sent / unit for sent in row] for line, row in result.bytes_up.items()}
    return replace(result, at=at, place="bits of one soft label")


def answer(result: Result) -> str:
    """Return for each method the fewest bits within one point of float32."""
    sentences = []
    for line in list(LINES)[1:]:
        gains = [result.gain(line, line, point, result.points[0]) for point in result.points]
        good = [number for number, gain in enumerate(gains) if gain.mean >= -1]
        fewest = min(good, key=result.at[line].__getitem__)
        needed, last = result.at[line][fewest], result.points[-1]
        sentences.append(
            f"{line.split(',')[0]} stays within one point of float32 down to {needed:.3g} of its "
            f"{PLAIN} bits a label ({result.points[fewest]}, changed rows packed); {last} takes "
            f"{result.at[line][-1]:.2g} bits and changes its accuracy by {gains[-1]} points."
        )
    return " ".join(sentences)


QUESTION = Question(
    name="bits_per_label",
    question="How many bits does a soft label need?",
    setting="mnist-5k, ten clients (Dirichlet 0.3), 800 unlabelled public images, ten classes, `mlp-20`, "
    "eight rounds; both directions in the same codec, bits of the uplink in brackets. Packing loses "
    "nothing: DS-FL's two columns differ in bits alone.",
    x="number",
    grid=grid,
    answer=answer,
    finish=bits,
)


if __name__ == "__main__":
    QUESTION.main(__doc__)

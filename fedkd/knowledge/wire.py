"""The codec of one direction, parsed from a name such as ``simplex:1+changed+range``."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fedkd.errors import FedkdError, Setting, nearest

NUMBERS = ("float32", "float16", "simplex:8", "simplex:4", "simplex:2", "simplex:1")
ROWS = ("all", "changed")
PACKS = ("raw", "bits", "deflate", "range")


@dataclass(frozen=True)
class Wire:
    """How soft labels cross the wire in one direction.

    Attributes:
        number: ``"float32"``, ``"float16"`` or ``"simplex:b"``: every row is rounded to multiples of
            1/(2^b − 1) that sum to 1, b = 8, 4, 2 or 1 (Sattler et al. 2021, constrained uniform
            quantisation; b = 1 is the most probable class).
        rows: ``"all"``, or ``"changed"``: only rows that differ from what the receiver has.
        pack: ``"raw"``, ``"bits"`` (b bits a code; for b = 1 a class index), ``"deflate"`` (zlib) or
            ``"range"`` (range coding; needs the extra ``codec``).

    Raises:
        FedkdError: an unknown value, or bits or range with floating-point numbers.
    """

    number: str = "float32"
    rows: str = "all"
    pack: str = "raw"

    def __post_init__(self) -> None:
        for slot, accepted in (("number", NUMBERS), ("rows", ROWS), ("pack", PACKS)):
            value = getattr(self, slot)
            if value not in accepted:
                raise FedkdError(f"{slot} = {value!r}: must be one of {', '.join(accepted)}")
        if self.pack in ("bits", "range") and not self.number.startswith("simplex"):
            raise FedkdError(
                f"pack = {self.pack!r} with number = {self.number!r}: needs one of "
                f"{', '.join(NUMBERS[2:])}; floats are packed by raw or deflate"
            )

    @classmethod
    def parse(cls, text: str) -> Wire:
        """Return the codec of a text such as ``"simplex:1+changed+range"``; any slot may be left out.

        Raises:
            FedkdError: the text is not a codec; the message begins with ``codec = '...'``.
        """
        try:
            return cls(**_slots(text))
        except FedkdError as error:
            raise FedkdError(Setting("codec", text), f": {error}") from None

    def __str__(self) -> str:
        values = (self.number, self.rows, self.pack)
        words = [
            v for v, plain in zip(values, ("float32", "all", "raw"), strict=True) if v != plain
        ]
        return "+".join(words) or "float32"

    @property
    def bits(self) -> int:
        """Bits of a code on the simplex; 0 for floating-point numbers."""
        name, _, bits = self.number.partition(":")
        return int(bits) if name == "simplex" else 0

    @property
    def steps(self) -> int:
        """The sum of the codes of a row on the simplex, 2^b − 1."""
        return (1 << self.bits) - 1

    @property
    def dtype(self) -> torch.dtype:
        """The type of a code: uint8, float16 or float32."""
        return torch.uint8 if self.bits else getattr(torch, self.number)


PLAIN = Wire()


def _slots(text: str) -> dict[str, str]:
    order = {"number": NUMBERS, "rows": ROWS, "pack": PACKS}
    words: dict[str, str] = {}
    left = list(order)
    for word in str(text).split("+"):
        slot = next((s for s in order if word in order[s]), None)
        if slot is None:
            known = [name for names in order.values() for name in names]
            raise FedkdError(
                f"{word!r}: must be one of {', '.join(known)}{nearest(word, known)}; an example is "
                "simplex:1+changed+deflate"
            )
        if slot not in left:
            raise FedkdError(f"{word!r} is out of place: the order is number+rows+pack, each once")
        del left[: left.index(slot) + 1]
        words[slot] = word
    return words


def parse_codec(text: str) -> tuple[Wire, Wire]:
    """Return the codecs of ``"UP/DOWN"``, or one for both: (clients to server, server to clients).

    Raises:
        FedkdError: one of the two is not a codec, or there are more; the message begins with
            ``codec = '...'``.
    """
    parts = str(text).split("/")
    if len(parts) > 2:
        raise FedkdError(
            Setting("codec", text), ": must be UP/DOWN, or one codec for both directions"
        )
    try:
        wires = [Wire(**_slots(part)) for part in parts]
    except FedkdError as error:
        raise FedkdError(Setting("codec", text), f": {error}") from None
    return wires[0], wires[-1]

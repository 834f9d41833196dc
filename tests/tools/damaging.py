"""What may happen to files of clients' states and memories on a disk."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import safe_open

from fedkd.clients.slot_file import CLIENTS_A_FILE


def row_of(path: Path, name: str, client: int, slot: int) -> tuple[int, int]:
    """Return where a client's tensor begins in a file, and its bytes; one architecture, few clients."""
    with safe_open(path, "pt") as file:
        tensor = file.get_tensor(name)
    with path.open("rb") as content:
        length = int.from_bytes(content.read(8), "little")
        start = json.loads(content.read(length))[name]["data_offsets"][0]
    size = tensor[slot, client].numel() * tensor.element_size()
    return 8 + length + int(start) + (slot * CLIENTS_A_FILE + client) * size, size


def change(path: Path, name: str, client: int, round: int) -> None:
    """Flip a bit in the middle of a client's tensor of a round."""
    with safe_open(path, "pt") as file:
        slot = file.get_tensor("round")[:, client].tolist().index(round)
    at, size = row_of(path, name, client, slot)
    content = bytearray(path.read_bytes())
    content[at + size // 2] ^= 1
    path.write_bytes(content)


def lose(path: Path, client: int) -> None:
    """Make a file as if a client had never written to it."""
    content = bytearray(path.read_bytes())
    for slot in (0, 1):
        at, size = row_of(path, "round", client, slot)
        content[at : at + size] = bytes(size)
    path.write_bytes(content)

"""Folders that were edited, cut off or made by somebody who means harm: one line, never a traceback.

Values drawn from every file are replaced by others, and every file by something that is none.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from folders_of_runs import one_of_each
from sampling import one_in

from fedkd import cli

JSON = {
    "dsfl": ["result.json", "rounds.jsonl", "knowledge.jsonl", "shards.json", "identity.json"],
    "central": ["result.json", "identity.json"],
    "compare": ["comparison.json"],
    "sweep": ["sweep.json", "points.jsonl", "identities.json"],
}
"""The files of texts and numbers, by the beginning of a folder's name."""

VALUES: list[Any] = [
    None, True, -1, 0, 1, 3, 2**31, 2**63, -(2**70), 0.5, -0.0, 1e308, -1e308, float("nan"),
    float("inf"), "", "x", "1", "../../..", "nan", "\x1b[2J\ud800", [], [[]], [None], [0.5], ["x"], {},
    {"x": {}}, {"": None}, [[[[[[1]]]]]],
]  # fmt: skip
"""What a value is replaced by."""

pytestmark = [
    pytest.mark.filterwarnings("ignore:constrained_layout not applied"),  # no room is no fault
    pytest.mark.timeout(1200),
]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    one_of_each(folder)
    return folder


@pytest.fixture
def mine(written: Path, tmp_path: Path) -> Path:
    """Return a copy of all folders, as a comparison names those of its runs."""
    return Path(shutil.copytree(written, tmp_path / "runs"))


def folder_of(kind: str, inside: Path) -> Path:
    return min(inside.glob(f"{kind}-*"))


def tried(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Return what the command line says of an error, one line, or nothing if it ends well."""
    code: Any = 0
    try:
        cli.main(words)
    except SystemExit as end:
        code = end.code
    said = capsys.readouterr().err
    assert code in (0, 2), said
    assert "Traceback" not in said
    lines = [line for line in said.splitlines() if line.startswith("fedkd: ")]
    assert len(lines) == (code == 2), said
    assert all(line.isprintable() for line in said.splitlines())
    return "".join(lines)


def places(value: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the way to each value inside a value; of a list, to the first and the last."""
    yield above
    if isinstance(value, dict):
        for key, each in value.items():
            yield from places(each, (*above, key))
    if isinstance(value, list) and value:
        for place in sorted({0, len(value) - 1}):
            yield from places(value[place], (*above, place))


def replaced(value: Any, place: tuple[Any, ...], by: Any) -> Any:
    """Return a value with another one in a place."""
    if not place:
        return by
    copy = value.copy()
    copy[place[0]] = replaced(value[place[0]], place[1:], by)
    return copy


def spoiled(path: Path, chunk: int, count: int = 7) -> Iterator[tuple[str, str]]:
    """Yield texts of a file in which one value is another, and what was done."""
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    values = [json.loads(line) for line in lines]
    draw = random.Random(f"{path.name} {chunk}")
    every = [(n, place) for n, value in enumerate(values) for place in places(value)]
    for _ in range(count):
        number, place = draw.choice(every)
        by = draw.choice(VALUES)
        said = json.dumps(replaced(values[number], place, by))
        yield "\n".join([*lines[:number], said, *lines[number + 1 :]]), f"{place} = {by!r}"


CHUNKS = [(kind, name, n) for n in range(3) for kind, names in JSON.items() for name in names]


@pytest.mark.parametrize(("kind", "name", "chunk"), one_in(15, CHUNKS))
def test_a_value_that_is_another_is_one_line_or_shown(
    kind: str,
    name: str,
    chunk: int,
    mine: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = folder_of(kind, mine)
    words = ["report", str(folder), "--output", str(tmp_path / "page.html")]
    for text, done in spoiled(folder / name, chunk):
        (folder / name).write_text(text)
        print(done)  # pytest shows it if this fails
        tried(words, capsys)
        tried(["list", str(mine)], capsys)


# --- Files that are none --------------------------------------------------------------------------


def _rewritten(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


def _linked(path: Path, to: str) -> None:
    path.unlink()
    path.symlink_to(to)


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _huge(path: Path) -> None:
    """Make a file of a terabyte of nothing."""
    with path.open("r+b") as file:
        file.truncate(1 << 40)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "missing": Path.unlink,
    "empty": lambda path: _rewritten(path, b""),
    "cut off": lambda path: _rewritten(path, path.read_bytes()[: path.stat().st_size // 2]),
    "zeros": lambda path: _rewritten(path, bytes(path.stat().st_size)),
    "no text": lambda path: _rewritten(path, bytes(range(256)) * 5),
    "nested": lambda path: _rewritten(path, b"a = " * path.suffix.endswith("toml") + b"[" * 99_999),
    "a long number": lambda path: _rewritten(
        path, (b"seed = " if path.suffix == ".toml" else b'{"round": ') + b"1" * 5_001 + b"\n"
    ),
    "twice": lambda path: _rewritten(path, path.read_bytes() * 2),
    "another format": lambda path: _rewritten(path, b"<html></html>\n"),
    "a number": lambda path: _rewritten(path, b"7\n"),
    "a link to itself": lambda path: _linked(path, path.name),
    "a link to a device": lambda path: _linked(path, "/dev/zero"),
    "a pipe": _pipe,
    "a folder": _folder,
    "huge": _huge,
}

FILES = {
    "dsfl": [*JSON["dsfl"], "experiment.toml", "tested.safetensors", "server.safetensors"],
    "central": [*JSON["central"], "experiment.toml", "tested.safetensors", "models.safetensors"],
    "compare": JSON["compare"],
    "sweep": [*JSON["sweep"], "experiment.toml"],
}
CASES = [(k, name, damage) for damage in DAMAGES for k, names in FILES.items() for name in names]


@pytest.mark.parametrize(("kind", "name", "damage"), one_in(67, CASES))
def test_a_file_that_is_none_is_one_line_or_not_needed(
    kind: str,
    name: str,
    damage: str,
    mine: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = folder_of(kind, mine)
    DAMAGES[damage](folder / name)
    page = ["--output", str(tmp_path / "page.html")]
    commands = [["report", str(folder), *page], ["list", str(mine)]]
    if damage in (
        "a link to a device",
        "a pipe",
        "huge",
    ):  # the comparison reads what it names, too
        commands.append(["report", str(mine), *page])
    if kind in ("dsfl", "central"):
        commands += [["cite", str(folder)], ["export", str(folder)]]
        commands.append(["diff", str(folder), str(folder)])
    if kind != "central":
        command = {"dsfl": "run"}.get(kind, kind)
        commands.append([command, "--resume", str(folder)])
    for words in commands:
        print(words)
        tried(words, capsys)


@pytest.mark.parametrize("name", ["x" * 300, "x/" * 2100, "no such folder", "\x1b[2J", ""])
def test_a_folder_that_cannot_be_is_one_line(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(tmp_path / name)
    for words in (
        *(["report", folder], ["cite", folder], ["export", folder], ["run", "--config", folder]),
        *([command, "--resume", folder] for command in ("run", "compare", "sweep")),
        *(["diff", folder, folder], *([["list", folder]] if name else [])),
        ["report", str(tmp_path), "--output", f"{folder}/page.html"],
    ):
        print(words)
        assert tried(words, capsys), words

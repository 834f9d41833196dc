"""Nothing private leaves a client of a soft-label strategy: canaries, looked for in all that does.

Every private image, label, index and weight is a canary here: rows of random pixels, runs of labels and
indices, and the first numbers of every trained tensor, in each number format that they might travel in
and as text. They are looked for in every byte of every message of whole federations, in the run's files
and in the logs. Strategies that send class means or weights show that the detector finds what is there.
"""

from __future__ import annotations

import json
import logging
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from federation_tools import tiny
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.serde import message_to_proto
from paths import DOCS
from torch import Tensor, nn

import fedkd
from fedkd.clients.state_files import StateFiles
from fedkd.data import Dataset
from fedkd.data.federated import FederatedData, federated_data
from fedkd.engines import in_process
from fedkd.federation.flower_internals.local_grid import LocalGrid, task_identity
from fedkd.knowledge import ClassMeans, SoftLabels, Weights
from fedkd.knowledge.kinds import KINDS, in_words
from fedkd.randomness import generator
from fedkd.registry import strategies

CLASSES = tuple(f"canary-class-{number}" for number in range(10))
SECRET = "canary-of-an-exception"
RUN = 16
"""Labels or indices in a row that are looked for."""

Canaries = dict[str, set[bytes]]
"""What must not be found anywhere, by kind."""


def planted(_: Path) -> Dataset:
    """Make a data set of images that are noise, so that no two have a row in common."""
    draw = generator("canaries")
    images = torch.randint(0, 256, (212, 1, 8, 8), generator=draw, dtype=torch.uint8)
    labels = torch.randint(0, 10, (212,), generator=draw)
    labels[:10] = torch.arange(10)
    return Dataset(
        "planted", images[:151], labels[:151], images[151:], labels[151:], CLASSES, (0.5,), (0.25,)
    )


class Gossip(nn.Module):
    """A model that says in an exception what it sees."""

    def __init__(self, inputs: int, num_classes: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(inputs, num_classes))

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, unless it is trained on more images than are tried before a run."""
        if self.training and len(images) > 9:
            raise ArithmeticError(SECRET)
        logits: Tensor = self.net(images)
        return logits


class Infinite(Gossip):
    """A model that answers what no number is."""

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, infinite ones when it is asked."""
        logits: Tensor = self.net(images)
        return logits if self.training else logits / 0


def infinite(input_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """Build `Infinite`."""
    channels, height, width = input_shape
    return Infinite(channels * height * width, num_classes)


def gossip(input_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """Build `Gossip`."""
    channels, height, width = input_shape
    return Gossip(channels * height * width, num_classes)


# --- Canaries -------------------------------------------------------------------------------------

_NUMBERS = (np.uint8, np.int16, np.int32, np.int64, np.float16, np.float32, np.float64)


def _in_all_forms(values: Sequence[int | float] | Tensor, *formats: Any) -> Iterator[bytes]:
    """Return a run of numbers as bytes of every format, and as text."""
    listed = values.tolist() if isinstance(values, Tensor) else list(values)
    for number in formats or _NUMBERS:
        yield np.asarray(listed).astype(number).tobytes()
    yield from (separator.join(map(str, listed)).encode() for separator in (", ", ",", " "))


def _of_data(data: FederatedData) -> Canaries:
    """Return canaries of images, labels, counts by class and indices of all shards."""
    assert data.train.labels is not None
    found: Canaries = {"image": set(), "label": set(), "count": set(), "index": set()}
    for shard, counts in zip(data.shards, data.private_label_counts, strict=True):
        assert len(shard) > 2 * RUN
        labels = data.train.labels[shard]
        for first in range(0, len(shard) - RUN, 5):
            found["label"] |= {*_in_all_forms(labels[first : first + RUN])}
            found["index"] |= {*_in_all_forms(shard[first : first + RUN], *_NUMBERS[1:])}
        found["count"] |= {*_in_all_forms(counts, *_NUMBERS[2:])}
        for row in shard[::2].tolist():
            pixels = data.train.pixels[row, 0, 3]
            normalised = data.train.batch(torch.tensor([row]))[0, 0, 3]
            found["image"] |= {*_in_all_forms(pixels), *_in_all_forms(pixels / 255, *_NUMBERS[4:])}
            found["image"] |= {*_in_all_forms(normalised, *_NUMBERS[4:])}
    return found


def _of_weights(models: Mapping[str, Mapping[str, Tensor]]) -> set[bytes]:
    """Return the first numbers of every tensor of every client, float32 and float16."""
    found = set()
    for stack in models.values():
        for tensor in stack.values():
            for own in tensor:
                some = own.flatten()[:6]
                if len(some.unique()) > 4:
                    found |= {*_in_all_forms(some, np.float32, np.float16)}
    return found


def _kinds_in(haystack: bytes, canaries: Canaries) -> set[str]:
    return {kind for kind, needles in canaries.items() if any(n in haystack for n in needles)}


# --- What leaves ----------------------------------------------------------------------------------


def _bytes_of(messages: Iterable[Message]) -> bytes:
    """Return messages as they are sent, and their arrays and numbers once more in plain form."""
    parts: dict[bytes, None] = {}  # in order, what many share once
    for message in messages:
        parts[message_to_proto(message).SerializeToString()] = None
        if not message.has_error():
            records = message.content.values()
            parts |= {p: None for record in records for v in record.values() for p in _plain(v)}
    return b"\x00\xff".join(parts)


def _plain(value: Any) -> Iterator[bytes]:
    if isinstance(value, Array):
        array = value.numpy()
        yield from (array.tobytes(), _inflated(array.tobytes()), str(array.tolist()).encode())
    else:
        yield json.dumps(value, default=repr).encode()
        if isinstance(value, list):
            yield np.asarray(value).tobytes()


def _inflated(data: bytes) -> bytes:
    try:
        return zlib.decompress(data)
    except zlib.error:
        return b""


class Tapped(LocalGrid):
    """A grid whose messages of both directions are kept, with what must not be in them."""

    down: list[Message]
    up: list[Message]
    weights: set[bytes]
    states: StateFiles

    def __init__(self, handle: Any, *, num_clients: int) -> None:
        def tapped(messages: Sequence[tuple[int, Message]]) -> list[Message | None]:
            replies: list[Message | None] = handle(messages)
            Tapped.down += [message for _, message in messages]
            Tapped.up += [reply for reply in replies if reply is not None]
            instruction: Any = messages[0][1].content.get("instruction")
            if instruction is not None:
                for client in range(num_clients):
                    states = Tapped.states.load({client: instruction["round"]})
                    Tapped.weights |= _of_weights(states.models)
            return replies

        super().__init__(tapped, num_clients=num_clients)


class Leaked:
    """A run with all that left its clients: kinds of canaries by where they were found."""

    def __init__(
        self,
        experiment: fedkd.Experiment,
        monkeypatch: pytest.MonkeyPatch,
        log: pytest.LogCaptureFixture,
        printed: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setattr(in_process, "LocalGrid", Tapped)
        Tapped.down, Tapped.up, Tapped.weights = [], [], set()
        folder = Path(experiment.run_dir) / str(experiment.name) / "clients"
        Tapped.states = StateFiles(folder, experiment.architecture_period)
        with log.at_level(logging.DEBUG):
            for name in ("flwr", "fedkd", "ray"):
                logging.getLogger(name).addHandler(log.handler)
            try:
                self.run = fedkd.run(experiment)
            finally:
                for name in ("flwr", "fedkd", "ray"):
                    logging.getLogger(name).removeHandler(log.handler)
        names = {name.encode() for name in (*CLASSES, SECRET)}
        self.canaries = {
            **_of_data(federated_data(experiment)),
            "weight": Tapped.weights,
            "name": names,
        }
        shown = printed.readouterr()
        self.sent, self.received = Tapped.up, Tapped.down
        self.up, self.down = (self._in(_bytes_of(way)) for way in (self.sent, self.received))
        self.logs = self._in(f"{log.text}\n{shown.out}\n{shown.err}".encode())
        self.files = {
            str(path.relative_to(self.run.path)): self._in(path.read_bytes())
            for path in sorted(self.run.path.rglob("*"))
            if path.is_file() and path.relative_to(self.run.path).parts[0] != "clients"
        }

    def _in(self, haystack: bytes) -> set[str]:
        one_line = b" ".join(haystack.split())  # as some JSON is not written
        return _kinds_in(haystack + b"\x00\xff" + one_line, self.canaries)


def _experiment(folder: Path, name: str, **keys: Any) -> fedkd.Experiment:
    facts = strategies()[name].facts
    given: dict[str, Any] = {
        "dataset": f"{__name__}:planted",
        "train_size": None,
        "test_size": None,
        "strategy": name,
        "public_labels": facts.public_labels,
        "server_model": "mlp-4" if facts.server_model == "required" else "none",
        "teacher": "mlp-7",
        "num_server_rounds": 3,
        "run_dir": str(folder),
        "name": "canaries",
    }
    return tiny(**{**given, **keys})


LEAKED: dict[str, Leaked] = {}
"""What was run, by its strategy and its other keys: several tests look at it."""


@pytest.fixture
def leaks(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> Any:
    """Return what runs an experiment, unless it has been run, and says what it gave away."""

    def leaked(name: str, **keys: Any) -> Leaked:
        known = f"{name} {keys}"
        if known not in LEAKED:
            experiment = _experiment(tmp_path, name, **keys)
            LEAKED[known] = Leaked(experiment, monkeypatch, caplog, capsys)
        return LEAKED[known]

    return leaked


def _on_one_worker(name: str, *others: str) -> Any:
    """Keep what is read of one run together."""
    return pytest.param(name, *others, marks=pytest.mark.xdist_group(f"leaks-{name}"))


def _by_upload(*kinds: Any) -> list[Any]:
    return [_on_one_worker(n) for n, cls in strategies().items() if cls().uploads() in kinds]


def _with_codecs() -> Iterator[Any]:
    """Yield strategies of soft labels with their own codec, and with plain numbers if it is another."""
    for name, cls in strategies().items():
        if cls().uploads() is SoftLabels:
            yield _on_one_worker(name, "auto")
            if {str(wire) for wire in cls().wires(tiny())} != {"float32"}:
                yield _on_one_worker(name, "float32")


SIMULATORS = {"shards.json": {"count", "name"}}
"""What the server of a simulation writes of its own knowledge: it deals the shards."""


@pytest.mark.parametrize(("name", "codec"), [*_with_codecs()])
def test_no_canary_leaves_a_client_of_a_soft_label_strategy(
    leaks: Any, name: str, codec: str
) -> None:
    found = leaks(name) if codec == "auto" else leaks(name, codec=codec)
    assert len(found.sent) == len(found.received) == 3 * 5  # hello, three rounds, closing
    assert all(not message.has_error() for message in found.sent)
    assert all(len(needles) >= 10 for needles in found.canaries.values())
    assert found.up == set()
    assert found.down == set()
    assert found.logs == set()
    leaky = {file: kinds for file, kinds in found.files.items() if kinds}
    assert leaky == SIMULATORS
    assert {"experiment.toml", "rounds.jsonl", "shards.json", "result.json"} <= set(found.files)
    # No answer of these models is clear enough for SelectiveFD.
    assert ("knowledge.jsonl" in found.files) is (name != "SelectiveFD")


@pytest.mark.parametrize("name", _by_upload(None))
def test_nothing_leaves_a_client_that_sends_nothing(leaks: Any, name: str) -> None:
    found = leaks(name)
    assert found.up | found.down | found.logs == set()
    assert {file: kinds for file, kinds in found.files.items() if kinds} == SIMULATORS


@pytest.mark.parametrize("name", _by_upload(Weights))
def test_weights_are_found_where_weights_are_sent(leaks: Any, name: str) -> None:
    found = leaks(name)
    assert found.up == {"weight"}
    # Whose weights go down are averages: of one client they are its own.
    assert found.down <= {"weight"}
    assert found.logs == set()


@pytest.mark.parametrize("name", _by_upload(ClassMeans))
def test_counts_are_found_where_class_means_are_sent(leaks: Any, name: str) -> None:
    found = leaks(name)
    assert found.up == {"count"}
    assert found.down == set()  # sums over the clients
    assert found.logs == set()


def test_a_lone_client_receives_its_own_weights_back(leaks: Any) -> None:
    found = leaks("FedAvg", num_clients=1)
    assert found.up == found.down == {"weight"}


# --- Whether the detector finds what is there -----------------------------------------------------


@cache
def _known() -> tuple[FederatedData, Canaries]:
    data = federated_data(tiny(dataset=f"{__name__}:planted", train_size=None, test_size=None))
    return data, _of_data(data)


def _found_in(**records: Any) -> set[str]:
    with task_identity():
        message = Message(RecordDict(records), 1, "train")
    return _kinds_in(_bytes_of([message]), _known()[1])


@pytest.mark.parametrize("number", _NUMBERS)
def test_every_kind_of_canary_would_be_found(number: Any) -> None:
    data, _ = _known()
    assert data.train.labels is not None
    shard = data.shards[1]
    image = data.train.batch(shard[2:3]) if number in _NUMBERS[4:] else data.train.pixels[shard[2]]
    sent = {"image": image, "label": data.train.labels[shard], "index": shard}
    if number is np.uint8:
        sent.pop("index")  # its indices do not fit
    for kind, values in sent.items():
        array = values.numpy().astype(number)
        assert _found_in(a=ArrayRecord({"x": Array(array)})) == {kind}
        packed = np.frombuffer(zlib.compress(array.tobytes()), np.uint8)
        assert _found_in(a=ArrayRecord({"x": Array(packed)})) == {kind}
    assert _found_in(a=ArrayRecord({"x": Array(np.arange(97, dtype=number))})) == set()


def test_canaries_would_be_found_in_numbers_and_texts() -> None:
    data, _ = _known()
    assert data.train.labels is not None
    shard = data.shards[2]
    labels, indices = data.train.labels[shard].tolist(), shard.tolist()
    assert _found_in(m=MetricRecord({"x": labels})) == {"label"}
    assert _found_in(c=ConfigRecord({"x": indices, "y": 1})) == {"index"}
    assert _found_in(c=ConfigRecord({"x": f"the indices {indices}"})) == {"index"}
    counts = data.private_label_counts[2].tolist()
    assert _found_in(c=ConfigRecord({"x": json.dumps(counts)})) == {"count"}
    assert _found_in(c=ConfigRecord({"x": sorted(labels)}), m=MetricRecord({"n": 31})) == set()


# --- Clients that fail ----------------------------------------------------------------------------


def test_what_fedkd_says_of_a_client_that_diverged_holds_no_canary(leaks: Any) -> None:
    found = leaks("DSFL", student=f"mlp-8,mlp-8,{__name__}:infinite", teacher="none")
    (reason,) = found.run.rounds[0]["dropped"].values()
    assert reason == "holds NaN or infinity"
    assert found.up | found.down | found.logs == set()
    assert {file: kinds for file, kinds in found.files.items() if kinds} == SIMULATORS


def test_what_a_users_own_code_says_in_an_exception_goes_to_the_server(leaks: Any) -> None:
    """So that its author can fix it; `docs/privacy.md` says so."""
    found = leaks("DSFL", student=f"mlp-8,mlp-8,{__name__}:gossip", teacher="none")
    assert found.up == {"name"}
    told = {"rounds.jsonl": {"name"}, "result.json": {"name"}}
    assert {file: kinds for file, kinds in found.files.items() if kinds} == {**SIMULATORS, **told}


# --- What the page says ---------------------------------------------------------------------------

PAGE = DOCS / "privacy.md"


def _rows(first: str, page: Path = PAGE) -> list[list[str]]:
    """Return the cells of a table of a page, of which the header begins with some words."""
    lines = page.read_text(encoding="utf-8").splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith(f"| {first} |"))
    table = lines[start + 2 :]
    table = table[: next(n for n, line in enumerate(table) if not line.startswith("|"))]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def _fields(message: str) -> set[str]:
    cells = [row[1] for row in _rows("message") if message in row[0].split(", ")]
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


@pytest.mark.parametrize("name", [*map(_on_one_worker, strategies())])
def test_the_page_lists_every_field_that_leaves_a_client(leaks: Any, name: str) -> None:
    sent = leaks(name).sent
    ((kind, *_),) = _rows("a client's answer", DOCS / f"strategies/{name.lower()}.md")
    hello, closing = sent[:3], sent[-3:]
    for message in sent:
        records = message.content
        said = "hello" if message in hello else "closing" if message in closing else "round"
        fields = {n for n in records if n not in ("report", "introduction")}
        fields |= {f for n in ("report", "introduction") if n in records for f in records[n]}
        fields = {re.sub(r"_(transfer|digest|revisit)$", "_<phase>", field) for field in fields}
        fields = {re.sub("^seconds .*", "seconds <phase>", field) for field in fields}
        assert fields <= _fields(said)
        assert ("knowledge" in fields) is (said == "round" and kind != "nothing")
        if "knowledge" in fields:
            said_kind: Any = records.config_records["knowledge-kind"]
            what = said_kind["kind"].replace("-", " ")
            of = said_kind.get("space", said_kind.get("of"))
            assert kind == (what if of is None else f"{what}: {of}")


def test_the_page_lists_every_kind_once() -> None:
    kinds = [in_words(kind) for kind in (*KINDS, None)]
    assert [row[0] for row in _rows("kind")] == kinds

"""What fedkd loads, whom it calls, where it writes and what it shows of others' files: SECURITY.md."""

from __future__ import annotations

import ast
import io
import json
import logging
import os
import pickle
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from importlib.metadata import version
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from federation_tools import tiny
from folders_of_runs import one_of_each
from pages import Page
from paths import ROOT
from rich.table import Table
from safetensors import SafetensorError

import fedkd
from fedkd import cli, data
from fedkd.cli import console
from fedkd.data import read_tensors
from fedkd.errors import FedkdError, printable, safe_logger
from fedkd.experiment import Experiment, read_toml
from fedkd.records.folder import RunFolder
from fedkd.reports.report import report
from fedkd.studies.comparison.record import ComparisonRecord

PACKAGES = ("fedkd", "strategies", "simulations", "benchmarks")

# --- Nothing is unpickled, and no text is executed ------------------------------------------------

PICKLERS = {"pickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "jsonpickle"}
CALLS = {
    "torch.load", "torch.save", "torch.jit.load", "torch.export.load", "torch.export.save",
    "torch.package.PackageImporter", "torch.hub.load", "yaml.load", "yaml.unsafe_load",
    "pandas.read_pickle", "os.system", "os.popen", "eval", "exec", "compile", "__import__",
}  # fmt: skip
UNLESS_FALSE = {
    ("numpy.load", "allow_pickle"),
    ("subprocess.run", "shell"),
    ("subprocess.call", "shell"),
    ("subprocess.check_call", "shell"),
    ("subprocess.check_output", "shell"),
    ("subprocess.Popen", "shell"),
}

ALLOWED = {
    (
        "fedkd/cli/commands.py",
        "exec",
    ): "an empty text: it takes a mark of an interrupt from the process",
    (
        "fedkd/reports/export/forms.py",
        "torch.export.save",
    ): "a program without example inputs: JSON, no pickle",
    (
        "fedkd/reports/export/forms.py",
        "torch.export.load",
    ): "the file that was written a moment before",
    (
        "fedkd/testing/declarations.py",
        "eval",
    ): "a formula of a class whose module is imported already",
}
"""Where something of this may stand, and why."""


def dangers(source: str) -> set[str]:
    """Find imports and calls that run what they read."""
    tree = ast.parse(source)
    names = dict(_imported(tree))
    found = {name for name in names.values() if name.partition(".")[0] in PICKLERS}
    found |= {name for name in names.values() if name in CALLS}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = _called(node.func, names)
        if called in CALLS:
            found.add(called)
        given = {k.arg: getattr(k.value, "value", "something") for k in node.keywords}
        found |= {called for name, key in UNLESS_FALSE if called == name and given.get(key, False)}
        if called == "importlib.import_module" and isinstance(node.args[0], ast.Constant):
            found |= {str(node.args[0].value)} & PICKLERS
    return found


def _imported(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Yield what each name stands for that is imported anywhere."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for each in node.names:
                whole = each.name if each.asname else each.name.partition(".")[0]
                yield each.asname or whole, each.name if each.asname else whole
                if each.name.partition(".")[0] in PICKLERS:
                    yield f"import {each.name}", each.name
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for each in node.names:
                yield each.asname or each.name, f"{node.module}.{each.name}"


def _called(function: ast.expr, names: dict[str, str]) -> str:
    """Return the full name of what is called, as far as the file tells it."""
    if isinstance(function, ast.Attribute):
        return f"{_called(function.value, names)}.{function.attr}"
    return names.get(function.id, function.id) if isinstance(function, ast.Name) else "?"


def test_nothing_is_unpickled_or_executed_but_in_the_places_that_say_why() -> None:
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    assert len(files) > 100
    found = {
        (path.relative_to(ROOT).as_posix(), danger)
        for path in files
        for danger in dangers(path.read_text(encoding="utf-8"))
    }
    assert found == set(ALLOWED)


@pytest.mark.parametrize(
    ("source", "danger"),
    [
        ("import pickle", "pickle"),
        ("import pickle as p", "pickle"),
        ("from pickle import loads", "pickle.loads"),
        ("def f():\n    import cloudpickle", "cloudpickle"),
        ("import dill", "dill"),
        ("import marshal", "marshal"),
        ("import shelve", "shelve"),
        ("from joblib import load", "joblib.load"),
        ("import torch\ntorch.load(f, weights_only=True)", "torch.load"),
        ("from torch import load as l", "torch.load"),
        ("import torch as t\nt.save(x, f)", "torch.save"),
        ("import torch.jit\ntorch.jit.load(f)", "torch.jit.load"),
        ("import numpy as np\nnp.load(f, allow_pickle=True)", "numpy.load"),
        ("from numpy import load\nload(f, allow_pickle=flag)", "numpy.load"),
        ("eval(text)", "eval"),
        ("exec(text)", "exec"),
        ("compile(text, '', 'exec')", "compile"),
        ("__import__(name)", "__import__"),
        ("import yaml\nyaml.load(f)", "yaml.load"),
        ("import subprocess\nsubprocess.run(c, shell=True)", "subprocess.run"),
        ("from subprocess import Popen as P\nP(c, shell=flag)", "subprocess.Popen"),
        ("import os\nos.system(c)", "os.system"),
        ("from importlib import import_module\nimport_module('pickle')", "pickle"),
    ],
)
def test_the_detector_finds_each(source: str, danger: str) -> None:
    assert danger in dangers(source)


@pytest.mark.parametrize(
    "source",
    [
        "import re\nre.compile('x')",
        "model.eval()",
        "import numpy as np\nnp.load(f)\nnp.load(f, allow_pickle=False)",
        "import subprocess\nsubprocess.run(['ls'], shell=False)",
        "import torch\ntorch.compile(m)",
        "'import pickle'",
    ],
)
def test_the_detector_finds_nothing_else(source: str) -> None:
    assert dangers(source) == set()


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, sprung: Path) -> None:
        self.sprung = sprung

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.sprung),)


def test_a_pickle_that_is_not_cifars_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torchvision compares MD5 sums before it unpickles CIFAR: another file is downloaded again."""
    asked: list[str] = []

    def refuse(url: str, *_: object, **__: object) -> None:
        asked.append(url)
        raise OSError("no network")

    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", refuse)
    sprung = tmp_path / "sprung"
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in ["batches.meta", "test_batch", *(f"data_batch_{n}" for n in range(1, 6))]:
        (folder / name).write_bytes(pickle.dumps(Trap(sprung)))
    with pytest.raises(FedkdError, match="could not provide cifar10"):
        data.load("cifar10", tmp_path)
    assert asked
    assert not sprung.exists()
    pickle.loads((folder / "test_batch").read_bytes())  # the trap works
    assert sprung.is_dir()


TEXT_AND_TENSORS = {".toml", ".json", ".jsonl", ".safetensors"}
SHOWN = {".html", ".svg", ".png", ".md", ".tex"}


def _is_pickle(path: Path) -> bool:
    """Whether a file begins like a pickle, or holds one as `torch.save` packs it."""
    if path.read_bytes()[:1] == b"\x80" and path.suffix != ".safetensors":
        return True  # a safetensors file begins with the length of its header, which may be 128
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(archive.read(name)[:1] == b"\x80" for name in archive.namelist())


def test_pickles_are_known_when_they_are_there(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(pickle.dumps(1))
    torch.save({"w": torch.ones(2)}, tmp_path / "b")
    (tmp_path / "c").write_text("{}", encoding="utf-8")
    assert [_is_pickle(tmp_path / name) for name in "abc"] == [True, True, False]
    (tmp_path / "d.safetensors").write_bytes(pickle.dumps(1))
    with pytest.raises(SafetensorError):
        read_tensors(tmp_path / "d.safetensors")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of a comparison, its runs, a baseline and a sweep, with a report beside it."""
    folder = tmp_path_factory.mktemp("written")
    one_of_each(folder / "runs")
    report([folder / "runs"], folder / "report.html", folder / "figures")
    return folder


def test_run_folders_hold_text_and_tensors_alone(written: Path) -> None:
    inside = [path for path in (written / "runs").rglob("*") if path.is_file()]
    assert {path.suffix for path in inside if path.name != ".lock"} == TEXT_AND_TENSORS
    beside = [p for p in written.rglob("*") if p.is_file() and p not in inside]
    assert {path.suffix for path in beside} <= SHOWN
    assert [path for path in (*inside, *beside) if _is_pickle(path)] == []
    for path in inside:
        if path.suffix == ".safetensors":
            read_tensors(path)


def test_an_exported_program_holds_no_pickle(written: Path) -> None:
    (run,) = (written / "runs").glob("dsfl-*-seed0")
    copy = Path(shutil.copytree(run, written.parent / f"{written.name}-exported"))
    done = fedkd.export(copy)
    assert zipfile.is_zipfile(done.path)
    assert not _is_pickle(done.path)


# --- Nobody is told -------------------------------------------------------------------------------

WATCH = """
import os, sys

def note(event, values):
    if event == "socket.connect":
        said = values[1]
    elif event == "socket.getaddrinfo":
        said = values[:2]
    elif event == "socket.bind":
        said = values[1]
    else:
        return
    line = f"{event} {said[0] if isinstance(said, tuple) else said}\\n".encode(errors="replace")
    file = os.open(os.environ["ADDRESSES"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, line)
    os.close(file)

sys.addaudithook(note)
"""
"""Notes every address that a Python process connects to, looks up or binds, its children's too."""

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}


def _fresh(code: str, folder: Path, **variables: str) -> tuple[str, list[str]]:
    """Run code in a new process that knows none of our settings: its output, the addresses it used."""
    hooks = folder / "hooks"
    hooks.mkdir(exist_ok=True)
    (hooks / "sitecustomize.py").write_text(WATCH, encoding="utf-8")
    noted = folder / "addresses"
    noted.unlink(missing_ok=True)
    inherited = {name: value for name, value in os.environ.items() if name not in QUIET}
    where = {"PYTHONPATH": f"{hooks}{os.pathsep}{ROOT}", "ADDRESSES": str(noted)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**inherited, **where, "OMP_NUM_THREADS": "1", **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, noted.read_text(encoding="utf-8").splitlines() if noted.exists() else []


def _outside(addresses: list[str]) -> list[str]:
    """Return the addresses that are not of this machine; names of local sockets are paths."""
    return [line for line in addresses if not _is_local(line.split(" ", 1)[1])]


def _is_local(host: str) -> bool:
    if host in ("localhost", "None", "") or host.startswith(("/", "\0", "b'")):
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def test_the_watch_sees_a_connection_and_a_look_up(tmp_path: Path) -> None:
    code = """
import socket
from contextlib import suppress
with suppress(OSError):
    socket.create_connection(("192.0.2.1", 9), timeout=0.01)
with suppress(OSError):
    socket.getaddrinfo("telemetry.invalid", 443)
with suppress(OSError):
    socket.create_connection(("127.0.0.1", 9), timeout=0.01)
"""
    seen = _outside(_fresh(code, tmp_path)[1])
    assert "socket.connect 192.0.2.1" in seen
    assert "socket.getaddrinfo telemetry.invalid" in seen
    assert not any("127.0.0.1" in line for line in seen)


KEYS = (
    "dataset='digits', train_size=151, test_size=61, public_size=37, num_clients=3, "
    "student='mlp-8', num_server_rounds=1, device='cpu', partition='dirichlet'"
)


@pytest.mark.slow
def test_run_compare_and_report_reach_nobody(tmp_path: Path) -> None:
    code = f"""
import sys
import fedkd
from fedkd.cli import main
run = fedkd.run(fedkd.Experiment({KEYS}))
fedkd.compare(fedkd.Experiment({KEYS}), ["LocalOnly", "FedAvg"])
main(["report", str(run.path), "--output", "page.html"])
assert "flwr" in sys.modules
"""
    assert _outside(_fresh(code, tmp_path)[1]) == []
    assert (tmp_path / "page.html").is_file()


@pytest.mark.slow
def test_telemetry_is_off_before_anything_reads_it(tmp_path: Path) -> None:
    code = """
import fedkd, os, flwr.supercore.telemetry as a, flwr_datasets.common.telemetry as b
from ray._common.usage import usage_lib
print([a.FLWR_TELEMETRY_ENABLED, b.FLWR_TELEMETRY_ENABLED, usage_lib.usage_stats_enabled()])
"""
    assert _fresh(code, tmp_path)[0].strip() == "['0', '0', False]"


def test_a_users_own_setting_wins(tmp_path: Path) -> None:
    code = f"import fedkd, os; print(*(os.environ[n] for n in {list(QUIET)}))"
    assert _fresh(code, tmp_path)[0].split() == list(QUIET.values())
    theirs = {name: "1" if value == "0" else "0" for name, value in QUIET.items()}
    assert _fresh(code, tmp_path, **theirs)[0].split() == list(theirs.values())


LISTENING = f"""
import os
from pathlib import Path
import fedkd
from fedkd.federation.rounds import Federation

def family():
    parents = {{}}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = path.read_text().rpartition(")")[2].split()[1]
            parents.setdefault(parent, []).append(path.parent.name)
        except OSError:
            pass
    found = [str(os.getpid())]
    for pid in found:
        found += parents.get(pid, [])
    return found

def sockets(pid):
    for file in Path(f"/proc/{{pid}}/fd").glob("*"):
        try:
            yield os.readlink(file).removeprefix("socket:[").rstrip("]")
        except OSError:
            pass

def listening():
    where = {{}}
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{{name}}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A":
                where[words[9]] = words[1].partition(":")[0]
    for pid in family():
        try:
            command = Path(f"/proc/{{pid}}/cmdline").read_bytes().replace(b"\\0", b" ").decode()
            command = " ".join(command.split())[:200]
            for number in sockets(pid):
                if number in where:
                    print(where[number], command)
            print("process", command)
        except OSError:
            pass

class Look(fedkd.Callback):
    def on_round_end(self, *_):
        listening()

fedkd.run(fedkd.Experiment({KEYS}, ENGINE), [Look()])
"""
LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}
"""127.0.0.1, the same mapped into IPv6, and ::1, as Linux lists them."""


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="asks Linux who listens where")
@pytest.mark.parametrize("engine", ["engine='flower'", "num_workers=2"])
def test_ray_listens_on_loopback_has_no_dashboard_and_reaches_nobody(
    engine: str, tmp_path: Path
) -> None:
    out, addresses = _fresh(LISTENING.replace("ENGINE", engine), tmp_path)
    lines = [line.partition(" ")[::2] for line in out.splitlines()]
    processes = " ".join(what for where, what in lines if where == "process")
    bound = [(where, what) for where, what in lines if where != "process"]
    for part in ("gcs_server", "raylet"):
        assert any(f"/{part}" in what for _, what in bound), part
    assert [each for each in bound if each[0] not in LOOPBACK] == []
    assert "dashboard.py" not in processes
    assert _outside(addresses) == []


# --- Somebody else's folder -----------------------------------------------------------------------

DRAWN = "<script>alert(1)</script><img src=x onerror=alert(2)>'\"&{{7*7}}$\\frac{$[red]"
MARKS = "\x1b[31m\x07\x9b\u202e\u2066\u200f\u061c\u2028\ud800"
"""What a terminal or an editor obeys, and half of a letter."""

HOSTILE = f"{DRAWN}{MARKS[:-1]}"  # no file holds half of a letter


def _spoiled(value: Any) -> Any:
    """Put the hostile text into every text of a JSON value but for words that the program reads."""
    if isinstance(value, dict):
        return {key: _spoiled(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_spoiled(each) for each in value]
    return f"{value}{HOSTILE}" if isinstance(value, str) else value


def _spoil(folder: Path) -> None:
    """Put hostile text into whatever a run folder lets its author choose."""
    for path in folder.glob("*/shards.json"):
        said = json.loads(path.read_text(encoding="utf-8"))
        said["classes"] = [f"{name}{HOSTILE}" for name in said["classes"]]
        path.write_text(json.dumps(said), encoding="utf-8")
    for path in folder.glob("*/rounds.jsonl"):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for row in rows:
            row["dropped"] = {"1": HOSTILE}
            row[HOSTILE] = HOSTILE
            row["events"] = {HOSTILE: 3}
            row["seconds"] |= {HOSTILE: 0.1}
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    for path in folder.glob("*/result.json"):
        said = json.loads(path.read_text(encoding="utf-8"))
        said = {**_spoiled(said), HOSTILE: HOSTILE}
        path.write_text(json.dumps(said), encoding="utf-8")
    for path in folder.glob("*/experiment.toml"):
        path.with_name("identity.json").unlink(
            missing_ok=True
        )  # or the keys are known to be others
        text = path.read_text(encoding="utf-8")
        for key in ("data-dir", "dataset", "client-code", "teacher", "student", "strategy"):
            hostile = f"{key} = {json.dumps(DRAWN)}"
            escaped = hostile.replace("\\", r"\\")
            text = re.sub(rf"^{key} = .*$", escaped, text, flags=re.MULTILINE)
        comment = f"{DRAWN}\u202e\u2066"  # TOML allows no control characters in comments
        path.write_text(f"# python: {comment}\n# device: {comment}\n{text}", encoding="utf-8")


@pytest.fixture
def hostile(written: Path, tmp_path: Path) -> Path:
    """Return run folders of one who means harm."""
    runs = tmp_path / "theirs"
    for path in (written / "runs").iterdir():
        if (path / "rounds.jsonl").is_file():
            shutil.copytree(path, runs / f"{path.name}{MARKS[:-1]}")
    _spoil(runs)
    return runs


@pytest.mark.filterwarnings("ignore:constrained_layout not applied")  # names longer than a figure
def test_a_report_on_hostile_folders_holds_no_markup_of_theirs(
    hostile: Path, tmp_path: Path
) -> None:
    page = Page(report([hostile], tmp_path / "page.html", tmp_path / "figures"))
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "img", "iframe", "object", "embed"}
    assert not [n for _, given in page.elements for n in given if n.startswith("on")]
    assert "<script>alert(1)</script>" in page.text  # shown, as text
    assert "49" not in re.findall(r"'\"&(.{2})", page.text)  # {{7*7}} stands for itself
    written = [tmp_path / "page.html", *(tmp_path / "figures").glob("*.[smt]*")]
    assert {path.suffix for path in written} == {".html", ".svg", ".md", ".tex"}
    for path in written:
        text = path.read_text(encoding="utf-8")
        assert not set(MARKS) - set("[31m") & set(text), path
        assert "<script" not in text or path.suffix in (".md", ".tex"), path


@pytest.mark.parametrize("mark", MARKS.replace("[31m", ""))
def test_an_experiment_file_whose_texts_hold_marks_is_refused(mark: str, tmp_path: Path) -> None:
    with pytest.raises(FedkdError, match=r"^student = .*: must be text") as refused:
        fedkd.Experiment(student=f"mlp-8{mark}")
    assert mark not in str(refused.value)


def test_a_log_obeys_no_name() -> None:
    """Whatever handler it is that writes: the record itself is safe."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logger = safe_logger("fedkd.test")
    logger.addHandler(handler)
    try:
        logger.warning("%s of %d", f"a{MARKS}", 3)
        try:
            raise ValueError(f"b{MARKS}")
        except ValueError:
            logger.warning("c", exc_info=True)
        logger.warning("%s of %d", "d", 5)
    finally:
        logger.removeHandler(handler)
    said = stream.getvalue()
    assert not set(MARKS) - set("[31m") & set(said)
    assert "a\ufffd[31m" in said
    assert "ValueError: b\ufffd[31m" in said
    assert "d of 5" in said


def test_every_module_logs_safely() -> None:
    for path in (ROOT / "fedkd").rglob("*.py"):
        used = path.read_text(encoding="utf-8").count("getLogger(__name__)")
        assert not used, path


EVIL = """
from pathlib import Path
import fedkd
Path({sprung!r}).touch()
from strategies.dsfl import DSFL

class Evil(DSFL):
    pass
"""


def test_a_report_runs_no_code_that_a_folder_names(
    written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run,) = (written / "runs").glob("dsfl-*-seed0")
    theirs = Path(shutil.copytree(run, tmp_path / "theirs"))
    sprung = tmp_path / "sprung"
    (theirs / "evil.py").write_text(EVIL.format(sprung=str(sprung)), encoding="utf-8")
    (theirs / "identity.json").unlink()
    toml = theirs / "experiment.toml"
    text = toml.read_text(encoding="utf-8")
    named = f"{theirs / 'evil.py'}:Evil"
    toml.write_text(
        re.sub(r"^strategy = .*$", f"strategy = {json.dumps(named)}", text, flags=re.M),
        encoding="utf-8",
    )
    cli.main(["report", str(theirs), "--output", str(tmp_path / "page.html")])
    assert not sprung.exists()
    cli.main(["cite", str(theirs)])  # this one asks the strategy for its paper, and says so
    assert sprung.exists()


@pytest.mark.parametrize("printer", ["table", "text", "facts", "progress", "error"])
def test_a_terminal_obeys_no_name(printer: str, capfd: pytest.CaptureFixture[str]) -> None:
    name = "a\x1b[2Jb\x9b31mc\x07\u202ed[bold]e\r"
    if printer == "table":
        table = Table("a column with room for all that stands in it")
        table.add_row(name)
        console.write(table)
    elif printer == "text":
        console.write(name)
    elif printer == "facts":
        console.write({"name": name})
    elif printer == "progress":
        with console.ProgressDisplay(shown=True, preview=None) as steps:
            steps.show(name, 0.5)
    else:
        with pytest.raises(SystemExit):
            cli.main(["data", name])
    out, err = capfd.readouterr()
    said = out + err
    assert "d[bold]e" in said  # as it stands: no markup
    assert not set("\x1b\x9b\x07\u202e\r") & set(said)


def test_what_is_printable_stays() -> None:
    text = "größer τ ≥ 0.5 → 学\n\tnext"
    assert printable(text) == text
    controls = [*range(9), *range(11, 32), *range(127, 160)]
    assert set(printable("".join(map(chr, controls)))) == {"\ufffd"}


# --- Where is written and read --------------------------------------------------------------------

OUTSIDE = [
    ".", "..", "...", "../up", "a/../b", "a/b", "a\\b", "/root", "~", "~root", ".hidden", "..hidden",
    "-x", "a\0", "a\n", "a\r\n", "\na", "a ", " a", "a\x1b[0m", "ä", "a\u202eb", "C:x", "a;b", "$HOME",
]  # fmt: skip


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("way", ["file", "flag"])
def test_a_runs_name_is_one_plain_name(name: str, way: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(f"name = {json.dumps(name)}\n", encoding="utf-8")
    given = read_toml(file) if way == "file" else ("--name", {"name": name})
    with pytest.raises(FedkdError, match="letters, digits"):
        Experiment.load(given)


@pytest.mark.parametrize("name", ["a", "a..b", "x.y_z-1", "0", "a."])
def test_a_plain_name_is_a_folder_in_the_runs_folder(name: str, tmp_path: Path) -> None:
    made = RunFolder.create(Experiment(name=name, run_dir=str(tmp_path)), "default").path
    assert made.resolve().parent == tmp_path.resolve()


def test_a_link_in_the_place_of_a_run_is_not_followed(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    runs = tmp_path / "runs"
    runs.mkdir()
    (runs / "mine").symlink_to(elsewhere)
    (runs / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("mine", "dangling"):
        with pytest.raises(FedkdError, match=r"exists|in the way"):
            RunFolder.create(tiny(run_dir=str(runs), name=name), "default")
    assert list(elsewhere.iterdir()) == []
    assert not (tmp_path / "nowhere").exists()


def test_a_comparison_that_names_other_places_reads_runs_there_and_writes_nothing(
    written: Path, tmp_path: Path
) -> None:
    """Its paths may lead out of the folder; there only files of runs are read, as text."""
    (folder,) = (written / "runs").glob("compare-*")
    theirs = Path(shutil.copytree(folder, tmp_path / "theirs"))
    secret = tmp_path / "secret"
    secret.mkdir()
    for name in ("experiment.toml", "rounds.jsonl", "result.json"):
        (secret / name).write_text("token = my-password", encoding="utf-8")
    file = theirs / "comparison.json"
    said = json.loads(file.read_text(encoding="utf-8"))
    said["runs"] = {method: ["../secret" for _ in paths] for method, paths in said["runs"].items()}
    file.write_text(json.dumps(said), encoding="utf-8")
    before = sorted(tmp_path.rglob("*"))
    assert ComparisonRecord.read(theirs).runs["DSFL"] == [secret]
    with pytest.raises(FedkdError) as caught:
        report([theirs], tmp_path / "page.html")
    assert "my-password" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_export_goes_where_it_is_told_and_through_no_link(written: Path, tmp_path: Path) -> None:
    """A file is renamed into its place: a link there is replaced, what it leads to stays."""
    (run,) = (written / "runs").glob("dsfl-*-seed0")
    theirs = Path(shutil.copytree(run, tmp_path / "theirs"))
    target = tmp_path / "precious"
    target.write_text("mine", encoding="utf-8")
    output = tmp_path / "model.pt2"
    output.symlink_to(target)
    done = fedkd.export(theirs, output=output)
    assert done.path == output
    assert not output.is_symlink()
    assert target.read_text(encoding="utf-8") == "mine"


def test_a_report_replaces_a_link_and_not_what_it_leads_to(written: Path, tmp_path: Path) -> None:
    target = tmp_path / "precious"
    target.write_text("mine", encoding="utf-8")
    page = tmp_path / "page.html"
    page.symlink_to(target)
    (run,) = (written / "runs").glob("localonly-*-seed0")
    report([run], page)
    assert target.read_text(encoding="utf-8") == "mine"
    assert not page.is_symlink()


# --- Locked versions ------------------------------------------------------------------------------


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_dependency_has_one_version_in_the_lock() -> None:
    lines = (ROOT / ".ci/constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    assert all(len(pin) == 2 and re.fullmatch(r"[\w.!-]+", pin[1]) for pin in pins), pins
    locked = {_plain(name): number for name, number in pins}
    assert len(locked) == len(pins)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    names = {_plain(re.split(r"[^\w.-]", text, maxsplit=1)[0]) for text in wanted} - {"fedkd"}
    assert len(names) > 20
    assert names <= set(locked)
    assert not {name for name in locked if name.startswith(("nvidia-", "cuda-", "triton"))}


def test_ray_is_past_the_holes_that_are_known() -> None:
    """CVE-2025-62593 is fixed in 2.52.0."""
    assert tuple(int(part) for part in version("ray").split(".")[:2]) >= (2, 52)
    assert "PIP_CONSTRAINT=.ci/constraints.txt" in (ROOT / ".ci/run").read_text(encoding="utf-8")

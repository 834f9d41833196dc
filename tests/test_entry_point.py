"""A strategy out of another package that is really installed: listed, checked and run by its name."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path
from zipfile import ZipFile

import pytest
from paths import ROOT

from fedkd.records import Run

PAGE = (ROOT / "docs/write-a-strategy.md").read_text(encoding="utf-8")
SMALL = ["--dataset", "digits", "--num-server-rounds", "2", "--quiet", "--device", "cpu"]


def block(kind: str, start: str) -> str:
    """Return the block of the page that begins so."""
    (found,) = re.findall(rf"```{kind}\n({re.escape(start)}.*?)```", PAGE, re.DOTALL)
    return str(found)


def wheel_by_hand(source: Path, project: dict[str, object], points: dict[str, str]) -> Path:
    """Build the wheel that a backend would build, where there is none."""
    name, version = project["name"], project["version"]
    info = f"{name}-{version}.dist-info"
    entries = "".join(f"{name} = {value}\n" for name, value in points.items())
    files = {
        "teach.py": (source / "teach.py").read_text(encoding="utf-8"),
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": f"[fedkd.strategies]\n{entries}",
    }
    record = "".join(f"{path},,\n" for path in (*files, f"{info}/RECORD"))
    path = source / f"{name}-{version}-py3-none-any.whl"
    with ZipFile(path, "w") as wheel:
        for inside, text in {**files, f"{info}/RECORD": record}.items():
            wheel.writestr(inside, text)
    return path


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the package of the page into a folder of its own, without a network."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    toml = block("toml", "[build-system]")
    (source / "pyproject.toml").write_text(toml, encoding="utf-8")
    (source / "teach.py").write_text(block("python", '"""teach.py"""'), encoding="utf-8")
    project = tomllib.loads(toml)["project"]
    built = source
    if find_spec("hatchling") is None:
        built = wheel_by_hand(source, project, project["entry-points"]["fedkd.strategies"])
    install = ["install", "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps"]
    pip = [sys.executable, "-m", "pip", *install, "--no-build-isolation", "--target"]
    subprocess.run([*pip, str(target), str(built)], check=True, capture_output=True, timeout=120)
    return target


def fedkd(site: Path, folder: Path, *arguments: str) -> str:
    """Run the command where the package is installed."""
    environment = {**os.environ, "PYTHONPATH": f"{site}{os.pathsep}{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-m", "fedkd", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_an_installed_strategy_is_listed(site: Path, tmp_path: Path) -> None:
    names = fedkd(site, tmp_path, "strategies", "--quiet").split()
    assert "TeachEachOther" in names
    assert "DSFL" in names


@pytest.mark.slow
def test_an_installed_strategy_runs_with_its_own_code(site: Path, tmp_path: Path) -> None:
    """Its term and its procedure are found without any further key, and belong to what is compared."""
    fedkd(site, tmp_path, "run", "--strategy", "teach-each-other", "--smoke", *SMALL)
    (folder,) = (tmp_path / "runs").iterdir()
    run = Run.load(folder)
    assert (run.experiment.strategy, run.experiment.client_code) == ("TeachEachOther", "teach")
    assert [row["dropped"] for row in run.rounds] == [{}, {}]
    assert len(run.rounds) == 2
    everything = 2 * 3 * 120 * 10 * 4
    assert 0 < run.bytes_up < everything / 3  # half of the samples, as float16


@pytest.mark.ray
@pytest.mark.slow
def test_an_installed_strategys_code_reaches_ray(site: Path, tmp_path: Path) -> None:
    arguments = ("--strategy", "TeachEachOther", "--smoke", "--plan", "loop", *SMALL)
    for engine in ("cohort", "flower"):
        fedkd(site, tmp_path, "run", *arguments, "--engine", engine, "--name", engine)
    here, there = (Run.load(tmp_path / "runs" / engine) for engine in ("cohort", "flower"))
    assert [row["dropped"] for row in there.rounds] == [{}, {}]
    assert there.client_accuracy == here.client_accuracy

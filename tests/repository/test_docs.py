"""What README and docs tell a reader to type works."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT

import fedkd
from fedkd.cli import main


def blocks(path: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / path).read_text(encoding="utf-8"), re.DOTALL)


def test_the_readmes_python_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With sizes of a smoke test."""
    (source,) = blocks("README.md")
    whole = fedkd.Experiment

    def small(**keys: Any) -> fedkd.Experiment:
        return whole(**keys).smoke()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(fedkd.__dict__, "Experiment", small)
    exec(compile(source, "README.md", "exec"), {})
    first, second = capsys.readouterr().out.strip().splitlines()
    accuracy, bytes_up = first.split()
    assert 0 < float(accuracy) < 1
    assert int(bytes_up) == 2 * 3 * 120 * 10 * 4
    assert second


@pytest.mark.parametrize(
    "path",
    [
        "README.md",
        "docs/central.md",
        "docs/compare.md",
        "docs/export.md",
        "docs/findings.md",
        "docs/flower.md",
        "docs/report.md",
        "docs/sweep.md",
        "docs/trackers.md",
        "docs/write-a-strategy.md",
    ],
)
def test_the_commands_in_the_docs_are_spelt_right(
    path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (ROOT / path).read_text(encoding="utf-8")
    commands = re.findall(
        r"(?:^    |`)fedkd (\w+)((?: --[\w-]+(?: [^\s`-][^\s`]*)?)*)", text, re.MULTILINE
    )
    assert commands
    for command, flags in commands:
        main([command, "--help"])
        shown = capsys.readouterr().out
        for flag in re.findall(r"--[\w-]+", flags):
            assert flag == "--help" or flag in shown, (command, flag)


def test_every_link_in_the_docs_leads_somewhere() -> None:
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (path.parent / target).exists(), (path.name, target)


def test_the_glossary_holds_every_field_of_a_record(tmp_path: Path) -> None:
    experiment = fedkd.Experiment(
        dataset="digits",
        public_size=97,
        num_clients=3,
        num_server_rounds=2,
        teacher="mlp-37",
        run_dir=str(tmp_path),
    )
    run = fedkd.run(experiment)
    central = fedkd.central(experiment, save=False)
    fields = {*run.rounds[0], *run.rounds[1], *run.result, *central.as_json()}
    named = {re.sub(r"_(transfer|digest|revisit)$", "_<phase>", field) for field in fields}
    text = (ROOT / "docs/records.md").read_text(encoding="utf-8")
    assert sorted(field for field in named if f"`{field}`" not in text) == []

"""Fingerprints of everything that small runs write: equal before and after a change that moves code.

    python tests/tools/fingerprints.py DATA > before.txt

DATA is a folder with MNIST and CIFAR-10 (FEDKD_DATA_DIR), which the central presets train on. Every
strategy runs for three rounds on the digits data, and beside them the paths that few strategies take:
local teachers, mixed architectures, codecs, noise, attacks, the loop plan, a sweep, a comparison. One
line a file: what it is, and a hash of its content without seconds, paths, versions and code fingerprints.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

import fedkd
import strategies

COMMON = fedkd.Experiment(
    dataset="digits",
    train_size=600,
    test_size=200,
    public_size=120,
    num_clients=5,
    num_server_rounds=3,
    student="mlp-20",
    plan="stacked",
    device="cpu",
    public_labels=False,
)

CASES: dict[str, dict[str, Any]] = {
    "teacher": {"strategy": "DSFL", "teacher": "mlp-32", "plan": "loop", "distill_epochs": 3},
    "mixed": {"strategy": "FedMD", "student": "mlp-20,mlp-13", "public_labels": True},
    "lanes": {"strategy": "FedAvg", "plan": "stacked-2x2", "fraction_train": 0.6},
    "convolutions": {"strategy": "FedProx", "student": "cnn", "augment": "jitter-2", "seed": 1},
    "few": {"strategy": "DSFL", "public_per_round": 37, "codec": "simplex:8", "evaluate_every": 2},
    "changed": {
        "strategy": "SCARLET",
        "codec": "simplex:1+changed+range",
        "evaluate_phases": "last",
    },
    "noise": {"strategy": "DSFL", "dp_noise": 1.0},
    "attack": {"strategy": "Cronus", "attack": "least-likely", "attackers": 0.4},
    "pathological": {"strategy": "FedMD", "partition": "pathological", "optimizer": "sgd"},
}
PRESETS = ("mnist-mlp", "mnist-hinton", "cifar10-cnn")

ASIDE = {
    "seconds",
    "environment",
    "path",
    "run_dir",
    "folder",
    "sources",
    "identity",
    "data_dir",
    "when",
    "host",
}
"""Entries of records that say when, where and by which code."""


def main() -> None:
    """Run everything in a temporary folder and print the fingerprints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="folder with mnist and cifar10 .safetensors")
    data = parser.parse_args().data.resolve()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        run_everything(Path(folder), data)
        for path, found in fingerprints(Path(folder)):
            print(f"{found}  {path}")


def run_everything(folder: Path, data: Path) -> None:
    """Write the runs, one folder each."""
    common = COMMON.replace(run_dir=str(folder))
    for name in sorted(strategies.__all__):
        facts = getattr(strategies, name).facts
        model = "mlp-13" if facts.server_model == "required" else "none"
        fedkd.run(
            common.replace(
                strategy=name, name=name, public_labels=facts.public_labels, server_model=model
            )
        )
    for name, keys in CASES.items():
        fedkd.run(common.replace(name=f"case-{name}", **keys))
    fedkd.sweep(
        common.replace(name="sweep", strategy="FedMD", public_labels=True),
        {"alpha": [0.3, 0.7], "tau": [1.0, 5.0]},
        seeds=[0, 1],
        folds=2,
    )
    fedkd.compare(
        common.replace(name="comparison", teacher="mlp-32", public_labels=True),
        ["teacher", "student-alone", "student-distilled", "LocalOnly", "FedAvg", "DSFL"],
        seeds=[0, 1],
    )
    for preset in PRESETS:
        central(preset, folder, data)


def central(preset: str, folder: Path, data: Path) -> None:
    """Train a preset's models, by the command line as nothing else names presets."""
    call = [
        sys.executable,
        "-m",
        "fedkd",
        "central",
        "--preset",
        preset,
        "--smoke",
        "--device",
        "cpu",
    ]
    keys = {"plan": "stacked", "name": preset, "run-dir": str(folder), "data-dir": str(data)}
    flags = [word for key, value in keys.items() for word in (f"--{key}", value)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*call, *flags], check=True, stdout=subprocess.DEVNULL, env=environment)


def fingerprints(folder: Path) -> Iterator[tuple[str, str]]:
    """Return every file's path within a folder and the hash of what it says."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name not in (".lock", "identity.json", "identities.json"):
            content = said(path).replace(str(folder), "")
            yield (
                str(path.relative_to(folder)),
                blake2b(content.encode(), digest_size=8).hexdigest(),
            )


def said(path: Path) -> str:
    """Return what a file says that must not change."""
    if path.suffix == ".json":
        return canonical(json.loads(path.read_text()))
    if path.suffix == ".jsonl":
        return "\n".join(canonical(json.loads(line)) for line in path.read_text().splitlines())
    if path.suffix == ".safetensors":
        return tensors(path)
    lines = path.read_text().splitlines()
    return "\n".join(line for line in lines if not line.startswith(("#", "run-dir", "data-dir")))


def canonical(value: Any) -> str:
    """Return JSON without the entries of `ASIDE`."""
    return json.dumps(without(value), sort_keys=True)


def without(value: Any) -> Any:
    """Return a record without the entries of `ASIDE`, at any depth."""
    if isinstance(value, dict):
        return {key: without(each) for key, each in value.items() if key not in ASIDE}
    return [without(each) for each in value] if isinstance(value, list) else value


def tensors(path: Path) -> str:
    """Return a hash of each tensor of a file with its name, type and shape, and the file's header."""
    lines = []
    with safe_open(path, "pt") as file:
        for name in sorted(file.keys()):
            tensor = file.get_tensor(name).contiguous()
            content = (
                tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
            )
            shown = blake2b(content, digest_size=8).hexdigest()
            lines.append(f"{name} {tensor.dtype} {tuple(tensor.shape)} {shown}")
        header = file.metadata() or {}
        described = {"fedkd": canonical(json.loads(header["fedkd"]))} if "fedkd" in header else {}
        lines.append(json.dumps({**header, **described}, sort_keys=True))
    return "\n".join(lines)


if __name__ == "__main__":
    main()

"""Write what a run folder holds before any work: the experiment, its code, its machine, the reasons."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fedkd.experiment import Experiment
from fedkd.records.files import write_json
from fedkd.records.folder import RunFolder, environment
from fedkd.records.identity import FILE, Identity


def record_beginning(
    folder: RunFolder,
    experiment: Experiment,
    device: str,
    reasons: Mapping[str, str] | None = None,
    identity: Identity | None = None,
) -> None:
    """Write ``identity.json`` and ``experiment.toml``.

    Args:
        folder: of the run.
        experiment: as it is run, with all that was left open decided.
        device: the device of this process.
        reasons: why a key has the value that was chosen for it, by key.
        identity: what the numbers of the run depend on; `None` for a folder that holds no run.
    """
    if identity is not None:
        write_json(folder.path / FILE, dict(identity))
    surroundings = environment(device, torch.get_num_threads())
    folder.write_experiment(experiment, {**surroundings, **(reasons or {})})

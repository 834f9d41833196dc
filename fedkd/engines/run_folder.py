"""Write what a run folder holds before any work: the experiment, its code, its machine, the reasons."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fedkd.experiment import Experiment
from fedkd.records.folder import RunFolder, environment
from fedkd.user_code import fingerprint


def record_beginning(
    folder: RunFolder, experiment: Experiment, device: str, reasons: Mapping[str, str] | None = None
) -> None:
    """Write ``experiment.toml``.

    Args:
        folder: of the run.
        experiment: as it is run, with all that was left open decided.
        device: the device of this process.
        reasons: why a key has the value that was chosen for it, by key.
    """
    surroundings = environment(device, torch.get_num_threads())
    sources = {"sources": fingerprint(experiment.client_modules)}
    folder.write_experiment(experiment, {**surroundings, **sources, **(reasons or {})})

"""What a run folder holds before any work: what is run, by which code, where, and why so."""

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
        experiment: as it is to be found there, with all that was left open decided.
        device: that this process works on.
        reasons: why something was decided so, by key.
    """
    surroundings = environment(device, torch.get_num_threads())
    sources = {"sources": fingerprint(experiment.client_modules)}
    folder.write_experiment(experiment, {**surroundings, **sources, **(reasons or {})})

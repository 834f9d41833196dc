"""The Flower engine: every client is a Flower client in a worker process of Ray."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from flwr.serverapp import Grid

from fedkd.client_app import app
from fedkd.experiment import Experiment
from fedkd.records import Row
from fedkd.strategy import DistillationStrategy
from fedkd.transport.simulation import simulate


def run(
    strategy: DistillationStrategy, experiment: Experiment, on_round: Callable[[Row], None]
) -> None:
    """Run a federation on Ray; its records are in the experiment's run folder."""
    # Workers have a working directory of their own.
    located = experiment.replace(
        run_dir=str(Path(experiment.run_dir).absolute()),
        data_dir=experiment.data_dir and str(Path(experiment.data_dir).absolute()),
    )

    def server(grid: Grid) -> None:
        strategy.open(grid, located, on_round).run()

    simulate(
        server,
        app,
        num_clients=located.num_clients,
        client_cpus=located.client_cpus,
        client_gpus=located.client_gpus,
    )

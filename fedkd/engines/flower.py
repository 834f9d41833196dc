"""The Flower engine: every client is a Flower client in a worker process of Ray."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from flwr.serverapp import Grid

from fedkd.client_app import app
from fedkd.experiment import Experiment
from fedkd.records import Row, RunFolder
from fedkd.strategy import DistillationStrategy
from fedkd.transport.simulation import simulate


def run(
    strategy: DistillationStrategy,
    experiment: Experiment,
    folder: RunFolder,
    on_round: Callable[[Row], None],
) -> None:
    """Run a federation on Ray and write its records to `folder`."""
    # Workers have a working directory of their own.
    located = experiment.replace(
        run_dir=str(Path(experiment.run_dir).absolute()),
        data_dir=experiment.data_dir and str(Path(experiment.data_dir).absolute()),
    )

    def server(grid: Grid) -> None:
        strategy.open(grid, located, folder, on_round).run()

    simulate(
        server,
        app,
        num_clients=located.num_clients,
        client_cpus=located.client_cpus,
        client_gpus=located.client_gpus,
    )

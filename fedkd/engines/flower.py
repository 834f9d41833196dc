"""The Flower engine: every client is a Flower client in a worker process of Ray."""

from __future__ import annotations

from collections.abc import Callable

from flwr.serverapp import Grid

from fedkd.engines.client_app import app
from fedkd.engines.workers import located
from fedkd.events import Events
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
    placed, events = located(experiment), Events()

    def server(grid: Grid) -> None:
        strategy.open(grid, placed, folder, on_round, events).run()

    simulate(
        server,
        app,
        num_clients=placed.num_clients,
        client_cpus=placed.client_cpus,
        client_gpus=placed.client_gpus,
        events=events,
    )

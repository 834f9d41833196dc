"""The Flower engine: every client is a Flower client in a worker process of Ray."""

from __future__ import annotations

from pathlib import Path

from flwr.serverapp import Grid

from fedkd.client_app import app
from fedkd.engines.simulation import simulate
from fedkd.experiment import Experiment
from fedkd.messages import experiment_record
from fedkd.strategy import DistillationStrategy


def run(strategy: DistillationStrategy, experiment: Experiment) -> None:
    """Run a federation on Ray; its records are in the experiment's run folder."""
    # Workers have a working directory of their own.
    located = experiment.replace(
        run_dir=str(Path(experiment.run_dir).absolute()),
        data_dir=experiment.data_dir and str(Path(experiment.data_dir).absolute()),
    )

    def server(grid: Grid) -> None:
        strategy.start(
            grid,
            num_rounds=located.num_server_rounds,
            timeout=located.round_timeout,
            train_config=experiment_record(located),
        )

    simulate(
        server,
        app,
        num_clients=located.num_clients,
        client_cpus=located.client_cpus,
        client_gpus=located.client_gpus,
    )

"""The Flower server under ``flwr run .``, whose experiment comes from Flower's run config."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedkd.engines.deployment import DeployedGrid
from fedkd.engines.identity import identity_of
from fedkd.engines.preflight import check, default_name
from fedkd.engines.run_folder import record_beginning
from fedkd.engines.simulation import guarded
from fedkd.experiment import Experiment
from fedkd.federation.events import Events
from fedkd.federation.flower_internals.backend import is_simulated
from fedkd.machine import resolve_device
from fedkd.records.folder import RunFolder
from fedkd.registry import reproducible_keys
from fedkd.training.tuning import plan_reasons, with_plan

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation that the run config describes, on the nodes that Flower has."""
    experiment = Experiment.load(
        ("Flower's run config", context.run_config), ("flwr run", {"engine": "flower"})
    )
    strategy = check(experiment)
    reasons = plan_reasons(experiment)
    experiment = with_plan(experiment).replace(**reproducible_keys(experiment, strategy))
    # Clients find their folder by this path, whatever the working directory of their process.
    experiment = experiment.replace(run_dir=str(Path(experiment.run_dir).absolute()))
    device, identity = str(resolve_device(experiment.device)), identity_of(experiment, strategy)

    def begin(folder: RunFolder, name: str) -> None:
        record_beginning(folder, experiment.replace(name=name), device, reasons, identity)

    default = f"{default_name(experiment, strategy)}-flwr-run"
    folder = RunFolder.create(experiment, default, begin)
    named = experiment.replace(name=folder.path.name)
    events = Events()
    with _tended(grid, events) as tended:
        strategy.open(tended, named, folder, events=events).run()


@contextmanager
def _tended(grid: Grid, events: Events) -> Iterator[Grid]:
    """Yield a grid on which a client that fails is an error reply, simulated or deployed."""
    if is_simulated(grid):
        with guarded(grid, events) as simulated:
            yield simulated
    else:
        yield DeployedGrid(grid)

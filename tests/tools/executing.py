"""Clients that execute instructions, their states, and a step of the formula in float64."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from federation_tools import execute
from torch import Tensor, nn

from fedkd.clients.instructions import ClientReport, Failure, Instruction
from fedkd.clients.state_files import StateFiles
from fedkd.clients.state_store import ResidentStates
from fedkd.clients.states import INITIAL
from fedkd.data.federated import FederatedData, federated_data
from fedkd.data.images import Images
from fedkd.experiment import Experiment
from fedkd.knowledge import SoftLabels, Space
from fedkd.phases import Digest, Phase, Predict, Revisit
from fedkd.training.architectures import architectures_of
from fedkd.training.models import build
from fedkd.training.parameters import State

K, C = 3, 10
NOTHING = torch.empty(0, dtype=torch.int64)
ROWS = torch.tensor([31, 2, 17, 5, 3, 29, 11])
"""Public samples in no particular order."""
USUAL: tuple[Phase, ...] = (Digest(), Revisit(), Predict())


def received(
    seed: int = 1, samples: Tensor = ROWS, space: Space = "logits", number: float = 3.0
) -> SoftLabels:
    """Return soft labels for some public samples; of probabilities, one is certain."""
    generator = torch.Generator().manual_seed(seed)
    values = number * torch.randn(len(samples), C, generator=generator)
    if space == "probabilities":
        values = values.softmax(-1)
        values[0] = torch.eye(C)[3]
    return SoftLabels.shared(values, samples, space)


def new_store(experiment: Experiment, limit: int = K) -> ResidentStates:
    """Return an empty store whose folder goes with it; up to `limit` clients stay in memory."""
    folder = tempfile.mkdtemp(prefix="fedkd-tests-states-")
    store = ResidentStates(StateFiles(Path(folder), experiment.architecture_period), limit)
    weakref.finalize(store, shutil.rmtree, folder)
    return store


def run(
    experiment: Experiment,
    phases: Sequence[Phase],
    clients: Sequence[int] = range(K),
    *,
    data: FederatedData | None = None,
    store: ResidentStates | None = None,
    **instruction: Any,
) -> tuple[list[ClientReport | Failure], ResidentStates]:
    """Execute the same phases for some clients; the states are those of round 1 by default."""
    store = store or new_store(experiment)
    fields = {"round": 1, "base": INITIAL, "asked": NOTHING, **instruction}
    instructions = [Instruction(client=k, phases=tuple(phases), **fields) for k in clients]
    return execute(experiment, data or federated_data(experiment), instructions, store), store


def reports(results: Sequence[ClientReport | Failure]) -> list[ClientReport]:
    good = [result for result in results if isinstance(result, ClientReport)]
    assert len(good) == len(results), results
    return good


@dataclass(frozen=True)
class Kept:
    """What one client has on disk, without the axis of the stack."""

    models: dict[str, State]
    digested: int


def state(store: ResidentStates, client: int, number: int = 1) -> Kept:
    found = store.files.load({client: number})
    assert found.clients == [client]
    models = {role: {n: t[0] for n, t in model.items()} for role, model in found.models.items()}
    return Kept(models, found.digested[0])


def assert_same_state(one: Kept, other: Kept) -> None:
    """Compare bit for bit."""
    assert one.digested == other.digested
    assert one.models.keys() == other.models.keys()
    for role, model in one.models.items():
        assert model.keys() == other.models[role].keys()
        for name, tensor in model.items():
            assert tensor.dtype == other.models[role][name].dtype
            assert torch.equal(tensor, other.models[role][name]), (role, name)


# --- The reference: one step in float64 ----------------------------------------------------------


def images(source: Images, rows: Tensor | None = None) -> Tensor:
    """Normalise as the paper of a data set does: pixels over 255, minus mean, over deviation."""
    mean = torch.tensor(source.mean, dtype=torch.float64)[:, None, None]
    std = torch.tensor(source.std, dtype=torch.float64)[:, None, None]
    pixels = source.pixels if rows is None else source.pixels[rows]
    return (pixels.double() / 255 - mean) / std


def module(data: FederatedData, name: str, weights: dict[str, Tensor]) -> nn.Module:
    model = build(name, data.input_shape, data.num_classes).double()
    model.load_state_dict({n: t.double() for n, t in weights.items()})
    return model


def initial(experiment: Experiment, name: str = "mlp-8") -> dict[str, Tensor]:
    return architectures_of(federated_data(experiment)).initial_state(name, experiment.seed)

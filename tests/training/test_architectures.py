"""Models built for an experiment's images: what they begin with, and how long they are kept."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from typing import Any

import torch
from federation_tools import tiny

from fedkd.data.federated import FederatedData, federated_data
from fedkd.training.architectures import architectures_of


def data(**keys: Any) -> FederatedData:
    return federated_data(tiny(**keys))


def test_initial_weights_follow_from_seed_and_name_alone() -> None:
    found = architectures_of(data())
    one = found.initial_state("mlp-8", 3)
    torch.manual_seed(123)
    again = architectures_of(data(seed=8)).initial_state("mlp-8", 3)
    assert all(torch.equal(one[n], again[n]) for n in one)
    assert not torch.equal(one["head.weight"], found.initial_state("mlp-8", 4)["head.weight"])
    wider = found.initial_state("mlp-9", 3)["head.bias"]
    assert not torch.equal(one["head.bias"], wider)
    assert set(one) == set(found.model("mlp-8").state_dict())


def test_drawing_initial_weights_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    architectures_of(data()).initial_state("lenet", 3)
    assert torch.equal(torch.rand(3), expected)


def test_the_architectures_of_data_are_made_once_and_go_with_them() -> None:
    found = replace(data())
    built = architectures_of(found)
    assert architectures_of(found) is built
    assert built.skeleton("mlp-8") is built.skeleton("mlp-8")
    assert architectures_of(data()) is not built
    gone = weakref.ref(built)
    del found, built
    gc.collect()
    assert gone() is None

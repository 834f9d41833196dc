"""What is asked of the machine: which device a name means."""

from __future__ import annotations

import pytest
import torch

from fedkd.errors import FedkdError
from fedkd.machine import resolve_device


def test_a_device_that_is_not_there_is_named() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type in ("cpu", "cuda", "mps")
    for name in ("gpu", "", "cuda:999", "tpu:0"):
        with pytest.raises(FedkdError, match=rf"device = '{name}'.*auto, cpu, cuda") as caught:
            resolve_device(name)
        assert "\n" not in str(caught.value)

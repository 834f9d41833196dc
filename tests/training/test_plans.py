"""How a plan is written, what a key says for which architecture, and what runs where nothing is said."""

from __future__ import annotations

import pytest
import torch
from federation_tools import choosy
from torch import nn

from fedkd.errors import FedkdError
from fedkd.experiment import Experiment
from fedkd.training import models
from fedkd.training.plans import Plan, convolves, default_plan, largest_block, plan_from_key

SHAPE, C = (1, 8, 8), 7
TWO = torch.zeros(2, *SHAPE)


def dense() -> nn.Module:
    return models.build("mlp-20", SHAPE, C)


def convolutional() -> nn.Module:
    return models.build("cnn", SHAPE, C)


def wanted(key: str, architecture: str = "mlp-20", model: nn.Module | None = None) -> Plan:
    return plan_from_key(key, architecture, model or dense(), TWO)


# --- Text ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "plan"),
    [
        ("loop", Plan(False)),
        ("loopx3", Plan(False, lanes=3)),
        ("stacked-1", Plan(True, 1)),
        ("stacked-53", Plan(True, 53)),
        ("stacked-53x2", Plan(True, 53, 2)),
        ("stacked-107x11", Plan(True, 107, 11)),
    ],
)
def test_a_plan_is_read_as_it_is_written(text: str, plan: Plan) -> None:
    assert str(plan) == text
    assert wanted(text) == plan
    assert wanted(f"mlp-20={text}") == plan
    assert wanted(f"lenet=loop, mlp-20={text},mlp-7=loopx5") == plan
    assert Experiment(plan=text).plan == text


def test_a_stack_without_a_size_is_as_large_as_pays() -> None:
    most = largest_block(dense())
    assert wanted("stacked") == Plan(True, most)
    assert wanted("stackedx3") == Plan(True, most, 3)
    assert wanted("mlp-20=stackedx3") == Plan(True, most, 3)


def test_models_that_run_one_by_one_make_blocks_of_one() -> None:
    with pytest.raises(ValueError, match="block = 3"):
        Plan(stacked=False, block=3)


# --- Which architecture a key speaks of ----------------------------------------------------------


def test_every_architecture_finds_its_own_entry() -> None:
    key = "mlp-20=stacked-3, mlp-2=loopx2, mine:mlp-20=stacked-7"
    assert wanted(key) == Plan(True, 3)
    assert wanted(key, "mlp-2") == Plan(False, lanes=2)
    assert wanted(key, "mine:mlp-20") == Plan(True, 7)


def test_one_plan_without_a_name_is_everybodys() -> None:
    for architecture in ("mlp-20", "lenet", "mine:net"):
        assert wanted("stacked-5", architecture) == Plan(True, 5)


@pytest.mark.parametrize("key", ["auto", "mlp-2=loopx3", "mlp-200=stacked-3,20=loop"])
def test_what_a_key_does_not_name_runs_by_default(key: str) -> None:
    assert wanted(key) == default_plan(dense(), TWO) != Plan(False, lanes=3)
    assert wanted(key, "cnn", convolutional()) == Plan(False)


GOOD = (
    "auto",
    "stacked",
    "stacked-2x2",
    "loopx2",
    "mlp-20=stacked",
    "mlp-20=stacked-10x2, lenet=loop",
    "mlp-20=stacked,lenet=loop",
    "some.module:function=loopx2",
)


@pytest.mark.parametrize("key", GOOD)
def test_an_experiment_takes_plans(key: str) -> None:
    assert Experiment(plan=key).plan == key
    assert Experiment.load(("command line", {"plan": key})).plan == key


BAD = (
    "vmap",
    "Loop",
    "loop-2",
    "loopx",
    "loopx0",
    "loop x2",
    "stacked-",
    "stacked-0",
    "stacked-01",
    "stacked--2",
    "stackedx2-3",
    "stacked-2.5",
    "autox2",
    "loop, stacked",
    "auto, lenet=loop",
    "=loop",
    "lenet=",
    "lenet=auto",
    "lenet=loop mlp-20=loop",
    "lenet=loop,",
    ", lenet=loop",
    "lenet=mlp-20=loop",
    "loop\n",
)


@pytest.mark.parametrize("key", BAD)
def test_what_is_no_plan_is_refused_in_words_that_say_what_is_one(key: str) -> None:
    with pytest.raises(FedkdError) as caught:
        Experiment.load(("command line", {"plan": key}))
    text = str(caught.value)
    assert text.startswith(f"plan = {key!r} (from command line): must be ")
    accepted = text.partition("must be ")[2]
    for word in ("auto", "loop", "stacked", "stacked-BLOCK", "xLANES", "architecture=plan"):
        assert word in accepted


@pytest.mark.parametrize("key", [3, True, None, "", ["loop"]])
def test_what_is_no_text_is_no_plan(key: object) -> None:
    with pytest.raises(FedkdError, match="plan = "):
        Experiment(plan=key)


# --- Without a word ------------------------------------------------------------------------------


def test_small_dense_nets_are_stacked_and_convolutions_are_not_on_a_cpu() -> None:
    assert default_plan(dense(), TWO) == Plan(True, largest_block(dense()))
    assert default_plan(convolutional(), TWO) == Plan(False)
    assert wanted("stacked", "cnn", convolutional()).stacked
    assert wanted("loop") == Plan(False)


@pytest.mark.parametrize(
    ("model", "does"),
    [
        (nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(64, C))), False),
        (nn.Sequential(nn.Sequential(nn.Conv2d(1, 3, 3)), nn.Flatten()), True),
        (nn.Sequential(nn.Flatten(2), nn.Conv1d(1, 3, 3)), True),
    ],
)
def test_a_convolution_is_found_at_any_depth(model: nn.Module, does: bool) -> None:
    assert convolves(model) == does


@pytest.mark.parametrize("width", [1, 20, 101, 401, 1201, 2003])
def test_a_block_of_models_is_bounded_by_number_and_memory(width: int) -> None:
    """At most 100 models and 8 MiB of float32, but one at least."""
    size = 4 * (width * (64 + 1) + width * (width + 1) + C * (width + 1))
    block = largest_block(models.build(f"mlp-{width}", SHAPE, C))
    assert 1 <= block <= 100
    assert block * size <= 8 * 2**20 or block == 1
    assert (block + 1) * size > 8 * 2**20 or block == 100


def test_models_that_vmap_refuses_are_run_one_by_one(caplog: pytest.LogCaptureFixture) -> None:
    model = choosy(SHAPE, C).train()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    assert default_plan(model, TWO) == Plan(False)
    assert "vmap refuses" in caplog.text
    assert model.training
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())

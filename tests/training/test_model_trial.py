"""What a trial says of models that plain PyTorch runs otherwise than a cohort does, and before a run."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import unfit_models
from federation_tools import tiny
from torch import Tensor, nn

import fedkd
from fedkd.data.images import Images
from fedkd.errors import FedkdError
from fedkd.training.cohort import Cohort
from fedkd.training.parameters import initial_state
from fedkd.training.plans import Plan
from fedkd.training.trials import models as trial
from fedkd.training.trials.models import Verdict, verdict_on

SHAPE, C, N = (1, 4, 3), 7, 13


def images() -> Images:
    draw = torch.Generator().manual_seed(2)
    pixels = torch.randint(0, 256, (N, *SHAPE), generator=draw).to(torch.uint8)
    return Images(pixels, torch.randint(0, C, (N,), generator=draw), [0.4], [0.3])


def verdict(build: Callable[..., nn.Module]) -> Verdict:
    return verdict_on(lambda: build(SHAPE, C), images())


@pytest.mark.parametrize("build", unfit_models.REFUSED, ids=lambda b: b.__name__)
def test_what_no_plan_runs_as_plain_pytorch_does_is_refused(
    build: Callable[..., nn.Module],
) -> None:
    with pytest.raises(FedkdError, match=unfit_models.REFUSED[build]):
        verdict(build)


def test_what_is_right_one_by_one_alone_is_not_stacked() -> None:
    assert (
        "forward method of Centred lets the images" in verdict(unfit_models.Centred).why_not_stacked
    )
    assert "affect each other in tests too" in verdict(unfit_models.Centred).remark
    for build in (unfit_models.Net, unfit_models.Masked, unfit_models.Normed, unfit_models.Frozen):
        assert verdict(build) == Verdict()


def test_a_trial_leaves_no_trace() -> None:
    before, used = torch.get_rng_state(), images()
    pixels = used.pixels.clone()
    verdict_on(lambda: unfit_models.Normed(SHAPE, C), used)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(used.pixels, pixels)


class OnlyFloat32(unfit_models.Net):
    def between(self, x: Tensor) -> Tensor:
        return x @ torch.eye(5)


class Float32Mean(OnlyFloat32):
    def between(self, x: Tensor) -> Tensor:
        return super().between(x - x.mean(0))


def test_a_model_that_needs_float32_is_tried_there() -> None:
    assert verdict(OnlyFloat32) == Verdict()
    assert "affect each other" in verdict(Float32Mean).why_not_stacked


def test_testing_a_model_does_not_change_it(caplog: pytest.LogCaptureFixture) -> None:
    """In either way of changing a buffer, and in either plan."""
    assert (
        "'calls' in evaluation mode, which is not kept" in verdict(unfit_models.CountsTests).remark
    )
    build = partial(unfit_models.CountsTests, SHAPE, C)
    for plan in (Plan(stacked=False), Plan(stacked=True, block=2)):
        cohort = Cohort.of(build(), [initial_state(build, k) for k in range(2)], plan)
        first, second = (cohort.predict(images()) for _ in range(2))
        assert torch.equal(first, second)
        assert not any(t.any() for t in cohort.buffers.values())


# --- Before a run --------------------------------------------------------------------------------


def of(name: str) -> str:
    return f"unfit_models:{name}"


def test_a_run_is_refused_before_its_folder_exists(tmp_path: Path) -> None:
    for name in ("CountsCalls", "Infinite", "Frozen", "DropsAlways"):
        with pytest.raises(FedkdError, match=rf"student = '{of(name)}': "):
            fedkd.run(tiny(student=f"mlp-8,{of(name)}", run_dir=str(tmp_path)))
    with pytest.raises(
        FedkdError, match=rf"teacher = '{of('Frozen')}': it has no parameters to tr"
    ):
        fedkd.run(tiny(teacher=of("Frozen"), run_dir=str(tmp_path)))
    with pytest.raises(FedkdError, match=rf"teacher = '{of('Remembers')}': 'seen' changes"):
        fedkd.central(tiny(teacher=of("Remembers"), run_dir=str(tmp_path)))
    assert not list(tmp_path.iterdir())


def test_models_that_share_samples_run_one_by_one_whatever_the_plan(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedkd.training.architectures._VERDICTS", {})
    centred, keys = of("Centred"), {"run_dir": str(tmp_path), "num_server_rounds": 2}
    with caplog.at_level(logging.WARNING):
        auto = fedkd.run(tiny(student=centred, name="auto", **keys))
        again = fedkd.run(tiny(student=centred, name="again", plan="loop", **keys))
    said = [m for m in caplog.messages if "is run one by one" in m]
    assert len(said) == 1
    assert auto.experiment.plan.startswith(f"{centred}=loop")
    assert auto.accuracy == again.accuracy
    # Other processes read the plan, and try no models.
    partly = fedkd.run(
        tiny(student=f"mlp-8,{centred}", name="partly", plan="mlp-8=stacked", **keys)
    )
    assert partly.experiment.plan.startswith(f"mlp-8=stacked, {centred}=loop")
    for plan in ("stacked", f"{centred}=stacked-2"):
        with pytest.raises(FedkdError, match=r"must be run one by one, not by plan = "):
            fedkd.run(tiny(student=centred, plan=plan, **keys))


def test_a_model_is_tried_once_for_all_runs_until_its_code_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []
    monkeypatch.setattr("fedkd.training.architectures._VERDICTS", {})

    def noting(self: trial._Trial) -> Verdict:
        tried.append(type(self._build()).__name__)
        return Verdict()

    monkeypatch.setattr(trial._Trial, "verdict", noting)
    experiment = tiny(student=of("Normed"), num_server_rounds=1, run_dir=str(tmp_path))
    for name in ("a", "b"):
        fedkd.run(experiment.replace(name=name))
    assert tried == ["Normed"]
    monkeypatch.setattr(unfit_models.Normed, "between", lambda self, x: self.norm(2 * x))
    fedkd.run(experiment.replace(name="c"))
    assert tried == ["Normed"] * 2


def test_infinite_buffers_pass_where_no_weights_are_averaged(tmp_path: Path) -> None:
    masked = tiny(student=of("Masked"), num_server_rounds=1, run_dir=str(tmp_path))
    assert fedkd.run(masked.replace(strategy="FedMD")).rounds[-1]["answered"] == [0, 1, 2]
    with pytest.raises(
        FedkdError, match=r"FedAvg averages all tensors, but 'mask' is not made of fini"
    ):
        fedkd.run(masked.replace(strategy="FedAvg", name="other"))


def test_batch_normalisation_refuses_single_images_as_pytorch_does(tmp_path: Path) -> None:
    normed = tiny(student=of("Normed"), run_dir=str(tmp_path))
    with pytest.raises(FedkdError, match=r"at least 2 samples in a batch: batch-size = 1"):
        fedkd.run(normed.replace(batch_size=1))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        unfit_models.Normed(SHAPE, C)(torch.zeros(1, *SHAPE))

"""Users' terms are tried before a run; what needs the batch does it right by ``step.mask``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import user_terms
from federation_tools import tiny
from plain_training import (
    F64,
    LOOP,
    STACKED_2,
    STACKED_ALL,
    C,
    cohort_of,
    fit,
    images,
    inputs,
    plan_name,
    shard,
    soft_labels,
    stream,
)
from torch import Tensor, nn

import fedkd
from fedkd.errors import FedkdError
from fedkd.losses import Step, Term
from fedkd.randomness import permutation
from fedkd.training.batches import BatchStream
from fedkd.training.plans import Plan
from fedkd.training.trials.terms import try_term


def tried(term: Term) -> None:
    model = nn.Linear(3, 7)
    state = {n: p.detach().clone() for n, p in model.named_parameters()}
    try_term(term, model, state, 7, {})


@pytest.mark.parametrize("term", user_terms.REFUSED, ids=lambda t: t.function.__name__)
def test_a_term_that_a_stack_or_padding_would_change_is_refused(term: Term) -> None:
    with pytest.raises(FedkdError, match=user_terms.REFUSED[term]) as caught:
        tried(term)
    assert "\n" not in str(caught.value)
    assert term.import_path in str(caught.value)


@pytest.mark.parametrize("term", [user_terms.masked_dist, user_terms.of_the_weights])
def test_a_term_that_leaves_padding_out_passes(term: Term) -> None:
    tried(term)


# --- In a fit ------------------------------------------------------------------------------------


def plain_dist(student: Tensor, teacher: Tensor) -> Tensor:
    """DIST of one batch by numpy's correlations, as its authors' code averages rows and columns."""
    s, t = student.softmax(-1), teacher.softmax(-1)
    rows = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(s, t, strict=True)])
    columns = torch.stack(
        [torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(s.t(), t.t(), strict=True)]
    )
    return (1 - rows).mean() + (1 - columns).mean()


@pytest.mark.parametrize("plan", [LOOP, STACKED_2, STACKED_ALL], ids=plan_name)
def test_a_term_of_the_batch_sees_the_samples_of_its_batch_alone(plan: Plan) -> None:
    """In its first step, on 5 and 6 of 8 rows: its loss is that of the unpadded batch."""
    clients, teachers = [0, 1], soft_labels(1, 6)
    rows = [shard(0), shard(1)[:6]]

    def build() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(64, C))

    cohort = cohort_of(build, clients, plan)
    weights = [cohort.state(i) for i in range(2)]
    losses = fit(
        cohort,
        clients,
        [BatchStream("public", images(F64), rows, {user_terms.masked_dist: 1.0}, teachers)],
        epochs=1,
    )
    for i, k in enumerate(clients):
        order = permutation(len(rows[i]), *stream(k), "public", 0)
        x = inputs()[rows[i]][order].flatten(1)
        logits = x @ weights[i]["1.weight"].t() + weights[i]["1.bias"]
        expected = plain_dist(logits, teachers[0][order])
        assert float(losses[i]) == pytest.approx(float(expected), abs=1e-6)


def test_every_step_says_which_rows_are_samples() -> None:
    seen: list[int] = []

    def counting(step: Step) -> Tensor:
        assert step.mask is not None
        seen.append(len(step.mask))
        return step.logits.square().sum(-1) * step.mask

    cohort = cohort_of(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, C)), [1], LOOP)
    term = Term(counting, None)
    fit(cohort, [1], [BatchStream("private", images(F64), [shard(1)], {term: 1.0})], epochs=1)
    assert seen == [8, 8, 1]


# --- Before a run --------------------------------------------------------------------------------


def strategy_file(folder: Path, term: str) -> str:
    path = folder / "with_a_term.py"
    path.write_text(f'''
from user_terms import {term}

from fedkd.knowledge import SoftLabels
from fedkd.phases import Digest, Fit, Predict
from fedkd.strategy import DistillationStrategy, Facts
from torch import Tensor


class WithATerm(DistillationStrategy):
    """The mean, and a fit on the public samples by a term of the user."""

    facts = Facts("none", "P*C*4", "P*C*4")

    def phases(self, round: int) -> list[object]:
        return [Fit("digest", public={{{term}: 1.0}}), Fit("train", private={{"ce": 1.0}}), Predict()]

    def aggregate(self, labels: SoftLabels) -> Tensor:
        return labels.mean_logits()
''')
    return f"{path}:WithATerm"


def test_a_run_is_refused_before_it_begins(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    keys = {"client_code": "user_terms", "run_dir": str(runs), "num_server_rounds": 2}
    with pytest.raises(
        FedkdError, match="user_terms:dist gives other losses when a batch is padded"
    ):
        fedkd.run(tiny(strategy=strategy_file(tmp_path, "dist"), **keys))
    assert not runs.exists()
    (tmp_path / "masked").mkdir()
    path = strategy_file(tmp_path / "masked", "masked_dist")
    done = fedkd.run(tiny(strategy=path, **keys))
    assert done.rounds[1]["answered"] == [0, 1, 2]

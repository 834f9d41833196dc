"""What a curious server can read from soft labels: the attacks, and the script that measures them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from federation_tools import P, tiny
from paths import DOCS
from scipy.stats import ks_2samp
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor

from fedkd.data.federated import FederatedData, federated_data
from fedkd.errors import FedkdError
from fedkd.knowledge import SoftLabels
from fedkd.losses import ce
from fedkd.randomness import generator
from fedkd.studies import leakage
from fedkd.training.architectures import architectures_of
from fedkd.training.batches import BatchStream
from fedkd.training.cohort import Cohort
from fedkd.training.optimizers import OptimizerSettings
from simulations import privacy_audit

K, N, C = 3, 5, 7


def _normal(*shape: int, name: str = "x") -> Tensor:
    return torch.randn(*shape, generator=generator(name, *shape), dtype=torch.float64)


# --- Scores ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("decimals", [0, 1, 12])  # few decimals: many ties
@pytest.mark.parametrize(("members", "others"), [(307, 211), (13, 409), (1, 1)])
def test_detection_is_what_other_libraries_make_of_the_curve(
    members: int, others: int, decimals: int
) -> None:
    a = _normal(members).round(decimals=decimals) + 0.6
    b = (_normal(others, name="y") + 0.1).round(decimals=decimals) + 0.1
    found = leakage.detection(a, b)
    truth = np.r_[np.ones(members), np.zeros(others)]
    scores = torch.cat([a, b]).numpy()
    fpr, tpr, _ = roc_curve(truth, scores, drop_intermediate=False)
    assert found.auc == pytest.approx(roc_auc_score(truth, scores), abs=1e-12)
    assert found.tpr_at_1 == pytest.approx(tpr[fpr <= 0.01].max(), abs=1e-12)
    below = ks_2samp(a.numpy(), b.numpy(), alternative="less")  # members lie higher
    assert found.advantage == pytest.approx(below.statistic, abs=1e-12)


def test_the_ends_of_detection() -> None:
    low, high = torch.arange(5.0), torch.arange(5.0) + 9
    assert leakage.detection(high, low) == leakage.Detection(1.0, 1.0, 1.0)
    assert leakage.detection(low, high) == leakage.Detection(0.0, 0.0, 0.0)
    assert leakage.detection(low, low).auc == 0.5
    with pytest.raises(FedkdError, match="0 members and 5 others"):
        leakage.detection(low[:0], low)


def test_log_likelihoods_are_those_of_the_true_class() -> None:
    logits, labels = 9 * _normal(K, N, C), torch.tensor([6, 0, 3, 3, 1])
    found = leakage.log_likelihoods(logits, labels)
    for k in range(K):
        for n in range(N):
            row = logits[k, n].tolist()
            wanted = row[labels[n]] - math.log(sum(math.exp(z) for z in row))
            assert float(found[k, n]) == pytest.approx(wanted)


def test_calibration_subtracts_what_the_other_clients_say() -> None:
    scores = _normal(K, N)
    found = leakage.calibrated(scores)
    for k in range(K):
        others = [scores[j] for j in range(K) if j != k]
        torch.testing.assert_close(found[k], scores[k] - sum(others) / (K - 1))


def test_matched_images_are_as_many_of_every_class() -> None:
    draw = generator("classes")
    members = torch.randint(0, 5, (83,), generator=draw)
    others = torch.randint(2, 7, (47,), generator=draw)
    mine, theirs = leakage.matched(members, others, 5, "a")
    for label in range(7):
        count = min(int((members == label).sum()), int((others == label).sum()))
        assert int((members[mine] == label).sum()) == count
        assert int((others[theirs] == label).sum()) == count
    assert len(mine.unique()) == len(mine) == len(theirs.unique()) == len(theirs) > 20
    again, _ = leakage.matched(members, others, 5, "a")
    other_draw, _ = leakage.matched(members, others, 5, "b")
    assert torch.equal(mine, again)
    assert not torch.equal(mine, other_draw)


# --- What the server has --------------------------------------------------------------------------


def _heard() -> list[SoftLabels]:
    """Return answers of three rounds, in which not all clients answer, and not all samples."""
    asked = (torch.tensor([4, 0, 2]), torch.tensor([1, 2]), torch.arange(5))
    who = (torch.tensor([0, 3]), torch.tensor([3, 8]), torch.tensor([8, 0, 3]))
    heard = []
    for round, (samples, clients) in enumerate(zip(asked, who, strict=True)):
        values = _normal(len(clients), len(samples), C, name=f"{round}").softmax(-1).float()
        mask = torch.rand(values.shape[:2], generator=generator("mask", round)) < 0.7
        heard.append(SoftLabels(values, "probabilities", samples, clients, mask=mask))
    return heard


def test_answers_are_averaged_over_the_rounds_in_which_they_came() -> None:
    heard = _heard()
    found = leakage.averaged(heard, 5)
    assert found.clients.tolist() == [0, 3, 8]
    assert found.space == "probabilities"
    for k, client in enumerate((0, 3, 8)):
        for sample in range(5):
            rows = [
                labels.values[j, n].double()
                for labels in heard
                for j in range(len(labels.clients))
                for n in range(len(labels.samples))
                if labels.clients[j] == client and labels.samples[n] == sample and labels.mask[j, n]
            ]
            assert bool(found.mask[k, sample]) is bool(rows)
            if rows:
                mean = torch.stack(rows).mean(0).float()
                torch.testing.assert_close(found.values[k, sample], mean)


# --- Label distributions --------------------------------------------------------------------------


def test_a_label_distribution_is_recovered_from_answers_that_follow_it() -> None:
    """Answers tilted towards frequent classes: the mean probability is prior × public share."""
    priors = _normal(K, C).softmax(-1)
    public = torch.tensor([7, 1, 3, 11, 2, 5, 8])
    mean = priors * public
    mean /= mean.sum(1, keepdim=True)
    spread = 0.01 * _normal(K, N, C)  # which averages to nothing
    spread -= spread.mean(1, keepdim=True)
    values = mean.unsqueeze(1) + spread
    labels = SoftLabels(values, "probabilities")
    torch.testing.assert_close(leakage.label_distributions(labels, public), priors)
    # What is not answered does not count.
    wrong = torch.cat([values, torch.full((K, 2, C), 1 / C).double()], 1)
    mask = torch.tensor([True] * N + [False] * 2).expand(K, -1)
    masked = SoftLabels(wrong, "probabilities", mask=mask)
    torch.testing.assert_close(leakage.label_distributions(masked, public), priors)


def test_a_class_that_is_not_in_the_public_set_is_taken_as_it_is() -> None:
    values = torch.tensor([[[0.5, 0.3, 0.2]]], dtype=torch.float64)
    found = leakage.label_distributions(
        SoftLabels(values, "probabilities"), torch.tensor([4, 4, 0])
    )
    torch.testing.assert_close(found, torch.tensor([[1.0, 0.6, 0.2]]).double() / 1.8)


def test_total_variation() -> None:
    p, q = torch.tensor([[0.5, 0.5, 0.0], [1, 0, 0]]), torch.tensor([[0.2, 0.5, 0.3], [0, 0, 1.0]])
    torch.testing.assert_close(leakage.total_variation(p, q), torch.tensor([0.3, 1.0]).double())
    assert float(leakage.total_variation(p, p).max()) == 0


# --- The attack itself ----------------------------------------------------------------------------


def _labels(what: str, shard: Tensor) -> Tensor:
    return torch.randint(0, 10, (len(shard),), generator=generator("random", what))


def _memorising() -> tuple[FederatedData, Cohort]:
    """Return models that have learnt random labels of their shards by heart."""
    experiment = tiny(train_size=300)
    data = federated_data(experiment)
    architectures = architectures_of(data)
    models = architectures.cohort(
        experiment, "mlp-64", architectures.initial_states("mlp-64", 0, 3)
    )
    labels = [_labels(f"{k}", shard) for k, shard in enumerate(data.shards)]
    models.fit(
        [BatchStream("private", data.train, data.shards, {ce: 1.0}, labels=labels)],
        epochs=60,
        batch_size=16,
        optimizer=OptimizerSettings(learning_rate=0.01),
        streams=[("memorise", k) for k in range(3)],
    )
    return data, models


def test_what_a_model_knows_by_heart_is_detected_and_what_it_never_saw_is_not() -> None:
    data, models = _memorising()
    outputs = models.predict(data.train)
    for client in range(3):
        mine, next_one, last_one = (data.shards[(client + step) % 3] for step in range(3))
        others = outputs[client, next_one], _labels("others", next_one)
        members = outputs[client, mine], _labels(f"{client}", mine)
        found = leakage.detection(*(leakage.log_likelihoods(*each) for each in (members, others)))
        assert found.auc > 0.95
        assert found.advantage > 0.8
        # Neither is known to the model of the client in between.
        strangers = (
            (outputs[(client + 1) % 3, shard], _labels(name, shard))
            for shard, name in ((mine, f"{client}"), (last_one, "last"))
        )
        found = leakage.detection(*(leakage.log_likelihoods(*each) for each in strangers))
        assert abs(found.auc - 0.5) < 5 * math.sqrt(1 / 6 / min(len(mine), len(last_one)))


def test_a_proxy_answers_like_its_client_and_like_no_other() -> None:
    data, models = _memorising()
    public = models.predict(data.public)
    experiment = tiny(train_size=300, student="mlp-64", learning_rate=0.01)
    mask = torch.ones(3, P, dtype=torch.bool)
    mask[1, 5:] = False
    labels = SoftLabels(public.softmax(-1), "probabilities", mask=mask)
    proxies = leakage.distilled_proxies(labels, data, experiment, 100)
    said, wanted = proxies.classify(data.public), public.argmax(-1)
    agreement = (said.unsqueeze(1) == wanted).double().mean(-1)  # [proxy, client]
    assert bool((agreement.diagonal()[[0, 2]] > 0.9).all())
    assert float((said[1, :5] == wanted[1, :5]).double().mean()) == 1
    off = agreement[~torch.eye(3, dtype=torch.bool)]
    assert float(off.max()) < 0.8
    # A client's proxy does not depend on who else is looked at.
    alone = SoftLabels(labels.values[2:], "probabilities", clients=torch.tensor([2]))
    (only,) = leakage.distilled_proxies(alone, data, experiment, 100).predict(data.public)
    torch.testing.assert_close(only, proxies.predict(data.public)[2], rtol=1e-3, atol=1e-3)


# --- The script -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_audit_runs_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    privacy_audit.main(["--smoke", "--write", str(tmp_path / "docs")])
    said = capsys.readouterr().out
    tables = json.loads((tmp_path / "docs/privacy_audit.json").read_text(encoding="utf-8"))
    assert list(tables) == list(privacy_audit.SETTINGS)
    for title, table in tables.items():
        assert privacy_audit.markdown(title, table) in said
        assert list(table) == ["0", "1", privacy_audit.ALONE]
        assert table["0"]["epsilon"] == [None]
        assert table["1"]["epsilon"][0] > 0
    assert (tmp_path / "docs/privacy_audit.svg").read_text(encoding="utf-8").startswith("<?xml")
    assert not (tmp_path / "runs").exists()


def test_the_tables_of_the_page_are_those_that_were_measured() -> None:
    tables = json.loads((DOCS / "privacy_audit.json").read_text(encoding="utf-8"))
    page = (DOCS / "privacy.md").read_text(encoding="utf-8")
    assert list(tables) == list(privacy_audit.SETTINGS)
    for title, table in tables.items():
        assert privacy_audit.markdown(title, table) in page
        assert {len(values) for found in table.values() for values in found.values()} == {3}
        assert set(table["0"]["test_size"]) == {1000.0}

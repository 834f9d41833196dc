"""Clients in company and alone: where they start, whom a failure costs its round, and their states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import federation_tools
import pytest
import torch
from executing import (
    NOTHING,
    ROWS,
    USUAL,
    K,
    assert_same_state,
    initial,
    new_store,
    received,
    reports,
    run,
    state,
)
from federation_tools import P, execute, refuses_nines, tiny

from fedkd.clients.instructions import ClientReport, Failure, Instruction
from fedkd.clients.state_files import StateFiles
from fedkd.clients.state_store import ResidentStates
from fedkd.clients.states import INITIAL
from fedkd.data.federated import FederatedData, federated_data
from fedkd.experiment import Experiment
from fedkd.knowledge import Knowledge, ModelWeights, SoftLabels, Weights
from fedkd.phases import Digest, Fit, Load, Phase, Predict, Revisit, SendWeights
from fedkd.training.architectures import architectures_of


def has(store: ResidentStates, client: int, number: int) -> bool:
    return store.files.load({client: number}).clients == [client]


def assert_same_report(one: ClientReport | Failure, other: ClientReport | Failure) -> None:
    """Compare bit for bit, seconds aside."""
    assert isinstance(one, ClientReport)
    assert isinstance(other, ClientReport)
    assert (one.client, one.num_examples) == (other.client, other.num_examples)
    assert one.metrics == other.metrics
    assert one.seconds.keys() == other.seconds.keys()
    assert type(one.answer) is type(other.answer)
    if isinstance(one.answer, SoftLabels):
        assert isinstance(other.answer, SoftLabels)
        assert torch.equal(one.answer.values, other.answer.values)
        assert torch.equal(one.answer.samples, other.answer.samples)


# --- Where everybody starts ----------------------------------------------------------------------


def test_all_clients_start_from_the_same_weights_which_follow_from_the_seed() -> None:
    results, _ = run(tiny(), [SendWeights()])
    for report in reports(results):
        assert isinstance(report.answer, Weights)
        sent = report.answer.by_model["mlp-8"].tensors
        for name, tensor in initial(tiny()).items():
            assert torch.equal(sent[name][0], tensor)
    other = architectures_of(federated_data(tiny())).initial_state("mlp-8", 6)
    assert not torch.equal(other["head.weight"], initial(tiny())["head.weight"])


def test_loading_replaces_the_student_and_leaves_the_teacher() -> None:
    experiment = tiny(teacher="mlp-9")
    weights = {n: torch.full_like(t, 0.25).unsqueeze(0) for n, t in initial(experiment).items()}
    part = ModelWeights(weights, torch.tensor([0]), torch.tensor([1]))
    results, store = run(
        experiment, [Load()], knowledge=Weights({"mlp-8": part}), knowledge_round=1
    )
    reports(results)
    for k in range(K):
        models = state(store, k).models
        assert all(bool((t == 0.25).all()) for t in models["student"].values())
        for name, tensor in initial(experiment, "mlp-9").items():
            assert torch.equal(models["teacher"][name], tensor)


def test_nothing_to_load_is_no_failure_and_the_wrong_thing_is_one() -> None:
    reports(run(tiny(), [Load()])[0])
    part = ModelWeights({}, torch.tensor([0]), torch.tensor([1]))
    wrong: list[Knowledge] = [Weights({"lenet": part}), received()]
    for knowledge in wrong:
        results, _ = run(tiny(), [Load()], knowledge=knowledge, knowledge_round=1)
        assert all(isinstance(r, Failure) and "weights of mlp-8" in r.reason for r in results)


def test_a_lost_state_is_a_failure_that_names_the_round() -> None:
    results, _ = run(tiny(), USUAL, base=4, round=5)
    assert [isinstance(r, Failure) and r.reason for r in results] == [
        "has no state of round 4 to start from"
    ] * K


@pytest.mark.parametrize("limit", [0, K])
def test_one_clients_lost_state_does_not_touch_the_others(limit: int) -> None:
    store = new_store(tiny(), limit)
    run(tiny(), [Revisit()], [0, 2], store=store)
    results, _ = run(tiny(), [Revisit()], base=1, round=2, store=store)
    assert [type(r) for r in results] == [ClientReport, Failure, ClientReport]
    whole, other = run(tiny(), [Revisit()])
    reports(whole)
    run(tiny(), [Revisit()], base=1, round=2, store=other)
    for k in (0, 2):
        assert_same_state(state(store, k, 2), state(other, k, 2))


@pytest.mark.parametrize("other", [{"student": "mlp-9"}, {"teacher": "mlp-8"}])
def test_states_of_other_models_are_another_runs(other: dict[str, Any]) -> None:
    """They are not taken for lost ones, over which a client would write."""
    for mine, theirs in ((tiny(), tiny(**other)), (tiny(**other), tiny())):
        store = new_store(mine, 0)
        run(theirs, [Revisit()], store=store)
        (path,) = store.files.folder.glob("*.safetensors")
        before = path.read_bytes()
        models = [name for name in (mine.student_of(0), mine.teacher_of(0)) if name != "none"]
        reason = (
            f"{path} holds states of other models than {' and '.join(models)}: it is another run's"
        )
        results, _ = run(mine, [Revisit()], base=1, round=2, store=store)
        assert results == [Failure(k, reason) for k in range(K)]
        assert path.read_bytes() == before


# --- In company and alone ------------------------------------------------------------------------


COMPANY: dict[str, dict[str, Any]] = {
    "mlp": {},
    "teacher": {"teacher": "mlp-12", "public_labels": False},
    "mixed": {"student": "mlp-8,lenet", "partition": "dirichlet"},
    "resnet": {"student": "resnet-8", "teacher": "mlp-8"},
    "augmented": {"student": "lenet", "augment": "jitter-2"},
    "odd": {"batch_size": 7, "optimizer": "sgd"},
    "lanes": {"plan": "stacked-2x2"},
    "loops": {"student": "lenet", "plan": "loopx2"},
}


@pytest.mark.parametrize(
    ("keys", "threads"),
    [
        *(pytest.param(keys, 1, id=name) for name, keys in COMPANY.items()),
        *(pytest.param(COMPANY[n], 2, id=f"{n}-2") for n in ("mlp", "loops")),
        pytest.param(COMPANY["resnet"], 2, id="resnet-2", marks=pytest.mark.slow),
    ],
)
def test_a_clients_numbers_do_not_depend_on_who_else_takes_part(
    keys: dict[str, Any], threads: int
) -> None:
    """Bit for bit, through two rounds; seven samples are asked for, and not all take equal steps."""
    torch.set_num_threads(threads)
    experiment = tiny(local_epochs=2, **keys)
    first: dict[str, Any] = {"asked": ROWS}
    second: dict[str, Any] = {
        "asked": ROWS,
        "round": 2,
        "base": 1,
        "knowledge": received(),
        "knowledge_round": 1,
    }
    together, store = run(experiment, USUAL, **first)
    together_again, _ = run(experiment, USUAL, store=store, **second)
    for k in (2, 1):  # where students differ, one of each
        alone, own = run(experiment, USUAL, [k], **first)
        alone_again, _ = run(experiment, USUAL, [k], store=own, **second)
        assert_same_report(alone[0], together[k])
        assert_same_report(alone_again[0], together_again[k])
        assert_same_state(state(own, k, 2), state(store, k, 2))


def test_rows_of_odd_width_stay_within_rounding_of_a_clients_own() -> None:
    """Rows of a stack that are not aligned take other kernels: bits may differ, numbers may not."""
    experiment = tiny(student="mlp-13", local_epochs=2)
    together, store = run(experiment, USUAL, asked=ROWS)
    for k, report in enumerate(reports(together)):
        alone, own = run(experiment, USUAL, [k], asked=ROWS)
        assert report.metrics["accuracy_after_revisit"] == pytest.approx(
            reports(alone)[0].metrics["accuracy_after_revisit"], abs=1 / 61 + 1e-9
        )
        for name, tensor in state(store, k).models["student"].items():
            torch.testing.assert_close(
                state(own, k).models["student"][name], tensor, rtol=1e-5, atol=1e-5
            )


def test_results_come_in_the_order_of_the_orders() -> None:
    forth, _ = run(tiny(student="mlp-8,lenet"), USUAL, [0, 1, 2], asked=ROWS)
    back, _ = run(tiny(student="mlp-8,lenet"), USUAL, [2, 1, 0], asked=ROWS)
    assert [r.client for r in back] == [2, 1, 0]
    for one, other in zip(forth, reversed(back), strict=True):
        assert_same_report(one, other)


def test_clients_have_draws_of_their_own_in_every_round_and_phase() -> None:
    """The same images for all, so that only the draws can differ."""
    experiment = tiny(local_epochs=1, batch_size=5)
    data = federated_data(experiment)
    data = replace(data, shards=(data.shards[0],) * K)

    def weight(number: int, client: int, phase: str = "revisit") -> tuple[float, ...]:
        fit = Fit(phase, private={"ce": 1.0})
        _, store = run(experiment, [fit], [client], data=data, round=number)
        bias = state(store, client, number).models["student"]["head.bias"]
        return tuple(bias.tolist())

    drawn = {weight(1, 0), weight(2, 0), weight(1, 1), weight(1, 0, "again")}
    assert len(drawn) == 4
    assert weight(1, 0) == weight(1, 0)


def test_personal_knowledge_is_digested_by_its_recipient_alone() -> None:
    experiment = tiny()
    own = {k: received(seed=k) for k in range(K)}
    instructions = [
        Instruction(k, 1, INITIAL, (Digest(),), NOTHING, own[k], knowledge_round=1)
        for k in range(K)
    ]
    store = new_store(experiment)
    results = execute(experiment, federated_data(experiment), instructions, store)
    for k, result in enumerate(results):
        alone, other = run(experiment, [Digest()], [k], knowledge=own[k], knowledge_round=1)
        assert_same_report(alone[0], result)
        assert_same_state(state(other, k), state(store, k))


# --- One of three fails --------------------------------------------------------------------------


def raised(text: str) -> str:
    """Return where the tools raise an error of this text, as a reason says it."""
    lines = Path(federation_tools.__file__).read_text(encoding="utf-8").splitlines()
    (number,) = (n for n, line in enumerate(lines, 1) if f'raise ArithmeticError("{text}' in line)
    return f"(federation_tools.py, line {number})"


def assert_only_the_second_fails(
    experiment: Experiment, data: FederatedData, phases: Sequence[Phase], reason: str
) -> None:
    """Check the reason of client 1, and the others' numbers against a run without it."""
    common: dict[str, Any] = {
        "data": data,
        "asked": ROWS,
        "knowledge": received(),
        "knowledge_round": 1,
    }
    results, store = run(experiment, phases, round=2, **common)
    assert [type(r) for r in results] == [ClientReport, Failure, ClientReport]
    assert results[1] == Failure(1, reason)
    assert not has(store, 1, 2)
    others, their_store = run(experiment, phases, [0, 2], round=2, **common)
    for k, other in zip((0, 2), others, strict=True):
        assert_same_report(results[k], other)
        assert_same_state(state(store, k, 2), state(their_store, k, 2))


@pytest.mark.parametrize("student", ["mlp-8", "lenet"], ids=["stacked", "loop"])
def test_a_client_without_data_fails_alone(student: str) -> None:
    experiment = tiny(student=student)
    data = federated_data(experiment)
    data = replace(data, shards=(data.shards[0], NOTHING, data.shards[2]))
    assert_only_the_second_fails(
        experiment, data, USUAL, "model 0 of the cohort has no private samples"
    )


def test_a_client_whose_term_raises_fails_alone() -> None:
    """Client 1 holds all the nines."""
    experiment = tiny(plan="loop", client_code="federation_tools")
    data = federated_data(experiment)
    assert data.train.labels is not None
    private = torch.cat(data.shards)
    nines = data.train.labels[private] == 9
    first, third = private[~nines].chunk(2)
    data = replace(data, shards=(first, private[nines], third))
    phases: list[Phase] = [Digest(), Revisit({refuses_nines: 1.0}), Predict()]
    assert_only_the_second_fails(
        experiment,
        data,
        phases,
        f"ArithmeticError: a nine of all things {raised('a nine')}",
    )


def test_a_client_whose_model_raises_fails_alone() -> None:
    """Client 1 holds an image that is white all over."""
    experiment = tiny(plan="loop", student="federation_tools:fragile")
    data = federated_data(experiment)
    pixels = data.train.pixels.clone()
    pixels[data.shards[1][3]] = 255
    data = replace(data, train=replace(data.train, pixels=pixels))
    assert_only_the_second_fails(
        experiment, data, USUAL, f"ArithmeticError: blinded {raised('blinded')}"
    )


def test_code_that_a_client_does_not_allow_is_a_failure_that_says_so() -> None:
    phases = [Revisit({"federation_tools:refuses_nines": 1.0})]
    for result in run(tiny(), phases)[0]:
        assert isinstance(result, Failure)
        assert "federation_tools:refuses_nines" in result.reason
        assert "client-code" in result.reason


def test_samples_that_do_not_exist_are_a_failure() -> None:
    for result in run(tiny(), [Predict()], asked=torch.tensor([0, P]))[0]:
        assert isinstance(result, Failure)
        assert result.reason


# --- States --------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [0, 1, K])
def test_an_order_can_be_repeated_from_its_base(limit: int) -> None:
    """After a lost round the next one starts from the same state."""
    experiment = tiny()
    store = new_store(experiment, limit)
    run(experiment, [Revisit()], store=store)
    lost, _ = run(experiment, [Revisit()], base=1, round=2, store=store)
    next_one, _ = run(experiment, [Revisit()], base=1, round=3, store=store)
    again, other = run(experiment, [Revisit()])
    direct, _ = run(experiment, [Revisit()], base=1, round=3, store=other)
    reports(lost)
    reports(again)
    for one, two in zip(next_one, direct, strict=True):
        assert_same_report(one, two)


@pytest.mark.parametrize("limit", [1, 2, K])
def test_states_in_memory_and_states_on_disk_give_the_same_run(limit: int) -> None:
    """Two clients share a stack, and the third has models of its own."""
    experiment = tiny(student="resnet-8,mlp-8,resnet-8", teacher="mlp-9,none,mlp-9")
    disk, memory = new_store(experiment, 0), new_store(experiment, limit)
    for number in (1, 2, 3):
        instruction: dict[str, Any] = {"asked": ROWS, "round": number, "base": number - 1}
        if number > 1:
            instruction |= {"knowledge": received(seed=number), "knowledge_round": number - 1}
        one, _ = run(experiment, USUAL, store=disk, **instruction)
        two, _ = run(experiment, USUAL, store=memory, **instruction)
        for a, b in zip(one, two, strict=True):
            assert_same_report(a, b)
    for k in range(K):
        assert_same_state(state(disk, k, 3), state(memory, k, 3))
        assert_same_state(state(disk, k, 2), state(memory, k, 2))
        assert not has(memory, k, 1)


def test_states_on_disk_hold_no_pickle_and_leave_no_scraps(tmp_path: Path) -> None:
    experiment = tiny(student="mlp-8,mlp-7")
    files = StateFiles(tmp_path / "clients", experiment.architecture_period)
    run(experiment, USUAL, asked=ROWS, store=ResidentStates(files, K))
    found = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    assert found == ["clients/0-0.safetensors", "clients/1-0.safetensors"]


@pytest.mark.parametrize("limit", [0, K])
def test_what_is_stored_is_not_what_is_trained_on(limit: int) -> None:
    """A stack may not write into a state that another round may start from."""
    experiment = tiny(student="resnet-8")
    store = new_store(experiment, limit)
    run(experiment, [Revisit()], store=store)
    before = {n: t.clone() for n, t in state(store, 0).models["student"].items()}
    run(experiment, [Revisit(epochs=2), SendWeights()], base=1, round=2, store=store)
    taken = store.take(dict.fromkeys(range(K), 1), torch.device("cpu")).models["student"]
    moved = state(store, 0, 2).models["student"]
    assert not torch.equal(moved["head.bias"], before["head.bias"])
    for name, tensor in state(store, 0, 1).models["student"].items():
        assert torch.equal(tensor, before[name])
        assert torch.equal(taken[name][0], before[name])


def test_a_term_that_vmap_refuses_is_run_client_by_client() -> None:
    """``.item()`` cannot be mapped; one by one the numbers are those of the mean absolute error."""
    experiment = tiny(plan="auto", client_code="federation_tools")
    data = federated_data(experiment)
    values = torch.randn(1, len(data.public), 10, generator=torch.Generator().manual_seed(3))
    instructions = {
        name: [
            Instruction(
                k, 2, INITIAL, (Fit("digest", public={name: 1.0}),), torch.empty(0).long(),
                SoftLabels(values, "logits"), 1,
            )
            for k in range(3)
        ]
        for name in ("mae_logits", "federation_tools:mae_by_item")
    }  # fmt: skip
    easy = execute(experiment, data, instructions["mae_logits"], new_store(experiment))
    hard = execute(
        experiment, data, instructions["federation_tools:mae_by_item"], new_store(experiment)
    )
    for once, again in zip(easy, hard, strict=True):
        assert isinstance(once, ClientReport)
        assert isinstance(again, ClientReport), again
        assert again.metrics["loss_digest"] == pytest.approx(once.metrics["loss_digest"], rel=1e-5)

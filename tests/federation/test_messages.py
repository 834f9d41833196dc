"""Instructions and reports as records: nothing is lost, every byte is counted, garbage is an error."""

from __future__ import annotations

import math
from dataclasses import replace
from io import BytesIO
from typing import Any

import numpy as np
import pytest
import torch
from federation_tools import tiny
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from torch import Tensor

from fedkd.clients.instructions import WITHHOLDABLE, ClientReport, Instruction
from fedkd.errors import FedkdError
from fedkd.federation.exchange import payload_bytes, wire_bytes
from fedkd.federation.flower_internals.local_grid import task_identity
from fedkd.federation.flower_internals.replies import error_reply, failure_reason
from fedkd.federation.knowledge_records import decode_knowledge, encode_knowledge
from fedkd.federation.messages import (
    HELLO,
    Introduction,
    decode_experiment,
    decode_instruction,
    decode_introduction,
    decode_report,
    encode_instruction,
    encode_introduction,
    encode_report,
    encode_request,
    experiment_record,
)
from fedkd.knowledge import Knowledge, ModelWeights, Sizes, SoftLabels, Space, Weights
from fedkd.knowledge.codec import Packed
from fedkd.phases import Digest, Fit, Load, Phase, Predict, Revisit, SendWeights

N, C, P = 5, 7, 41
SIZES = Sizes(P, C)
SAMPLES = torch.tensor([31, 2, 17, 5, 3])
PHASES: tuple[Phase, ...] = (
    Load(),
    Digest(epochs=3),
    Fit("joint", private={"ce": 1.0}, public={"kl": "alpha"}, numbers={"mu": 0.125}),
    Revisit(),
    Predict("probabilities"),
    SendWeights(),
)


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


def soft_labels(space: Space = "logits", client: int = 4) -> SoftLabels:
    values = rand(1, N, C) if space == "logits" else rand(1, N, C).softmax(-1)
    return SoftLabels(values, space, SAMPLES, torch.tensor([client]), torch.tensor([83]))


def weights(client: int = 4) -> Weights:
    tensors = {
        "body.weight": rand(1, 3, 5),
        "body.scalar": rand(1),
        "norm.num_batches_tracked": torch.tensor([2**40 + 1]),
    }
    return Weights({"mlp-3": ModelWeights(tensors, torch.tensor([client]), torch.tensor([83]))})


def assert_same(got: Knowledge | Packed | None, sent: Knowledge, samples: Tensor = SAMPLES) -> None:
    if isinstance(sent, SoftLabels):
        assert isinstance(got, SoftLabels)
        assert got.space == sent.space
        assert got.values.dtype == sent.values.dtype
        assert torch.equal(got.values, sent.values)
        assert got.samples.dtype == torch.int64
        assert torch.equal(got.samples, samples)
        return
    assert isinstance(got, Weights)
    assert isinstance(sent, Weights)
    assert list(got.by_model) == list(sent.by_model)
    for name, model in sent.by_model.items():
        assert list(got.by_model[name].tensors) == list(model.tensors)
        for parameter, tensor in model.tensors.items():
            back = got.by_model[name].tensors[parameter]
            assert back.dtype == tensor.dtype
            assert torch.equal(back, tensor)


def order_records(knowledge: Knowledge | None, asked: Tensor | None = None) -> RecordDict:
    instruction = Instruction(4, 7, 5, PHASES, SAMPLES if asked is None else asked, None, 6, "none")
    packed = {} if knowledge is None else encode_knowledge(knowledge, SIZES, asked=False)
    return encode_instruction(
        instruction, experiment_record(tiny()), packed, encode_request(instruction.asked, SIZES)
    )


def report(answer: Knowledge | None) -> ClientReport:
    metrics = {"accuracy_after_revisit": 0.625, "loss_digest": 1.5}
    return ClientReport(4, 83, answer, metrics, {"revisit": 0.25, "digest": 3.0})


# --- Round trips ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "knowledge", [None, soft_labels(), soft_labels("probabilities"), weights()]
)
def test_an_order_arrives_as_it_was_given(knowledge: Knowledge | None) -> None:
    got = decode_instruction(order_records(knowledge), SIZES, num_examples=83)
    assert (got.client, got.round, got.base) == (4, 7, 5)
    assert (got.knowledge_round, got.evaluate) == (6, "none")
    assert got.phases == PHASES
    assert got.asked.dtype == torch.int64
    assert torch.equal(got.asked, SAMPLES)
    if knowledge is None:
        assert got.knowledge is None
    else:
        assert_same(got.knowledge, knowledge)


def test_an_order_may_ask_for_nothing() -> None:
    records = order_records(None, torch.empty(0, dtype=torch.int64))
    assert decode_instruction(records, SIZES, num_examples=1).asked.tolist() == []
    assert payload_bytes(records) == {}


@pytest.mark.parametrize("answer", [soft_labels(), soft_labels("probabilities"), weights()])
def test_a_report_arrives_as_it_was_given(answer: Knowledge) -> None:
    got = decode_report(encode_report(report(answer), SAMPLES, SIZES, decoding=2.0), SAMPLES, SIZES)
    assert_same(got.answer, answer)
    assert (got.client, got.num_examples) == (4, 83)
    assert got.metrics == report(None).metrics
    # Packing and unpacking are counted by whoever does them.
    assert got.seconds.pop("encode") > 2
    assert got.seconds == report(None).seconds
    answered = got.answer.by_model["mlp-3"] if isinstance(got.answer, Weights) else got.answer
    assert isinstance(answered, SoftLabels | ModelWeights)
    assert answered.clients.tolist() == [4]
    assert answered.num_examples.tolist() == [83]


def test_a_report_without_an_answer_brings_its_numbers() -> None:
    got = decode_report(encode_report(report(None), SAMPLES, SIZES), SAMPLES, SIZES)
    assert got.answer is None
    assert got.metrics == report(None).metrics


@pytest.mark.parametrize("rows", [[0, 2, 4], [4, 3, 2, 1, 0], []])
def test_an_answer_to_other_samples_than_asked_names_them(rows: list[int]) -> None:
    """A full answer does not: the server knows what it asked."""
    partial = soft_labels().keep(torch.tensor(rows, dtype=torch.int64))
    records = encode_report(report(partial), SAMPLES, SIZES)
    assert list(records.array_records["knowledge"]) == ["values", "samples"]
    got = decode_report(records, SAMPLES, SIZES)
    assert_same(got.answer, partial, SAMPLES[torch.tensor(rows, dtype=torch.int64)])
    whole = encode_report(report(soft_labels()), SAMPLES, SIZES)
    assert list(whole.array_records["knowledge"]) == ["values"]


def test_the_experiment_travels_with_every_message() -> None:
    experiment = tiny(student="mlp-8,lenet", name="x", public_size=None, tau=0.1)
    got = decode_experiment(RecordDict({"experiment": experiment_record(experiment)}))
    assert got == experiment


def test_an_introduction_arrives_as_it_was_given() -> None:
    said = Introduction(3, 41, "mlp-8", "00ff")
    assert decode_introduction(encode_introduction(said)) == said
    silent = replace(said, num_examples=None)
    assert decode_introduction(encode_introduction(silent)) == silent


def test_what_is_withheld_is_not_sent_and_said_to_be_withheld() -> None:
    full = encode_report(report(None), SAMPLES, SIZES)
    quiet = encode_report(report(None), SAMPLES, SIZES, withheld=("metrics",))
    left = set(full.metric_records["report"]) - set(quiet.metric_records["report"])
    assert left == set(report(None).metrics)
    assert decode_report(quiet, SAMPLES, SIZES).withheld == ("metrics",)
    silent = encode_report(report(None), SAMPLES, SIZES, withheld=WITHHOLDABLE)
    assert set(silent.metric_records["report"]) == {"partition-id", "round"}
    got = decode_report(silent, SAMPLES, SIZES, num_examples=83)
    assert (got.client, got.num_examples, got.metrics, got.seconds) == (4, 83, {}, {})
    with pytest.raises(FedkdError, match="num-examples"):
        decode_report(quiet_without_size(quiet), SAMPLES, SIZES, num_examples=83)


def quiet_without_size(records: RecordDict) -> RecordDict:
    """Return a report that leaves out its number of images without a word."""
    numbers = dict(records.metric_records["report"])
    del numbers["num-examples"]
    return RecordDict({**records, "report": MetricRecord(numbers)})


@pytest.mark.parametrize("parts", [["everything"], "metrics", [3], [b"metrics"]])
def test_only_known_parts_are_withheld(parts: Any) -> None:
    records = encode_report(report(None), SAMPLES, SIZES)
    records["withheld"] = ConfigRecord({"parts": parts})
    with pytest.raises(FedkdError, match="withholds"):
        decode_report(records, SAMPLES, SIZES)


def test_a_failure_is_an_error_reply_with_its_reason() -> None:
    with task_identity():
        message = Message(RecordDict(), 7, HELLO)
        reply = error_reply(message, "ArithmeticError: blinded")
    assert reply.has_error()
    assert failure_reason(reply) == "ArithmeticError: blinded"


def test_encoding_detaches_and_does_not_change_what_it_is_given() -> None:
    labels = soft_labels()
    grown = SoftLabels(
        labels.values.clone().requires_grad_().transpose(1, 2), "logits"
    )  # not contiguous, with a gradient
    records = RecordDict(encode_knowledge(grown, SIZES, asked=False))
    got = decode_knowledge(records, SIZES, client=0, num_examples=1)
    assert isinstance(got, Packed)
    assert torch.equal(got.arrays["values"], labels.values[0].T)
    assert not got.arrays["values"].requires_grad


# --- Shared knowledge ----------------------------------------------------------------------------


def resent(records: RecordDict) -> RecordDict:
    """Rebuild records as the in-process grid does: new arrays around the same bytes."""
    rebuilt: dict[str, Any] = dict(records)
    for name, record in records.array_records.items():
        rebuilt[name] = ArrayRecord(
            {key: Array(a.dtype, a.shape, a.stype, a.data) for key, a in record.items()}
        )
    return RecordDict(rebuilt)


def test_what_all_receive_is_decoded_once() -> None:
    packed = encode_knowledge(soft_labels(), SIZES, asked=False)
    instruction = Instruction(4, 7, 5, PHASES, SAMPLES)
    experiment = experiment_record(tiny())
    seen: dict[Any, Knowledge | Packed | None] = {}
    first, second = (
        decode_instruction(
            resent(encode_instruction(instruction, experiment, packed, {})),
            SIZES,
            num_examples=1,
            seen=seen,
        )
        for _ in range(2)
    )
    assert first.knowledge is not None
    assert first.knowledge is second.knowledge
    own = encode_knowledge(soft_labels(), SIZES, asked=False)
    personal = decode_instruction(
        encode_instruction(instruction, experiment, own, {}), SIZES, num_examples=1, seen=seen
    )
    assert personal.knowledge is not first.knowledge
    nothing = decode_instruction(
        encode_instruction(instruction, experiment, {}, {}), SIZES, num_examples=1, seen=seen
    )
    assert nothing.knowledge is None
    assert_same(personal.knowledge, soft_labels())


# --- Bytes ---------------------------------------------------------------------------------------


def test_an_upload_is_four_bytes_a_number() -> None:
    counted = payload_bytes(encode_report(report(soft_labels()), SAMPLES, SIZES))
    assert counted == {"values": N * C * 4}


def test_a_partial_upload_counts_its_indices_as_well() -> None:
    partial = soft_labels().keep(torch.tensor([0, 3]))
    counted = payload_bytes(encode_report(report(partial), SAMPLES, SIZES))
    assert counted == {"values": 2 * C * 4, "samples": 2 * 4}


def test_a_download_counts_knowledge_its_indices_and_the_request() -> None:
    records = order_records(soft_labels(), torch.arange(11))
    assert payload_bytes(records) == {
        "values": N * C * 4,
        "samples": N * 4,
        "requested samples": math.ceil(P / 8),  # sorted, so that a bitmap does
    }
    assert records.array_records["request"]["samples"].numpy().dtype == np.uint8


def test_indices_are_left_out_of_what_needs_none() -> None:
    everything = order_records(soft_labels(), torch.arange(P))
    assert "requested samples" not in payload_bytes(everything)
    assert torch.equal(decode_instruction(everything, SIZES, num_examples=1).asked, torch.arange(P))


def test_weights_are_counted_by_tensor() -> None:
    counted = payload_bytes(encode_report(report(weights()), SAMPLES, SIZES))
    assert counted == {"body.weight": 60, "body.scalar": 4, "norm.num_batches_tracked": 8}


def test_a_report_without_an_answer_has_no_payload() -> None:
    assert payload_bytes(encode_report(report(None), SAMPLES, SIZES)) == {}


@pytest.mark.parametrize("knowledge", [soft_labels(), weights()])
def test_the_wire_carries_more_than_the_payload(knowledge: Knowledge) -> None:
    """Headers of arrays, keys of the experiment, the instruction: counted as Flower counts them."""
    for records in (order_records(knowledge), encode_report(report(knowledge), SAMPLES, SIZES)):
        payload, wire = sum(payload_bytes(records).values()), wire_bytes(records)
        assert wire == sum(record.count_bytes() for record in records.values())
        arrays = [a for record in records.array_records.values() for a in record.values()]
        assert wire > payload + 128 * len(arrays)


# --- Garbage -------------------------------------------------------------------------------------


def junk_array(**changes: Any) -> Array:
    fields: dict[str, Any] = {"dtype": "float32", "shape": (N, C), "stype": "numpy.ndarray"}
    return Array(**{**fields, "data": b"not an array", **changes})


def pickled() -> Array:
    """An array of objects, which only a pickle could bring back."""
    buffer = BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    return junk_array(dtype="object", shape=(1,), data=buffer.getvalue())


SAID: dict[str, Any] = {
    "kind": "soft-labels", "space": "logits", "wire": "float32", "sets": 1, "samples": "asked"
}  # fmt: skip
KIND = ConfigRecord(dict(SAID))
LISTED = ConfigRecord({**SAID, "samples": "listed"})
GOOD = Array(np.zeros((N, C), dtype=np.float32))


def with_knowledge(arrays: dict[str, Array], kind: ConfigRecord | None = KIND) -> RecordDict:
    records: dict[str, Any] = dict(encode_report(report(None), SAMPLES, SIZES))
    records["knowledge"] = ArrayRecord(arrays)
    if kind is not None:
        records["knowledge-kind"] = kind
    return RecordDict(records)


def with_numbers(**changes: Any) -> RecordDict:
    numbers: dict[str, Any] = {"partition-id": 4, "num-examples": 83}
    numbers |= {name.replace("_", "-"): value for name, value in changes.items()}
    kept = {name: value for name, value in numbers.items() if value is not None}
    return RecordDict({"report": MetricRecord(kept)})


BAD_KNOWLEDGE = [
    with_knowledge({"values": GOOD}, kind=None),
    with_knowledge({}, kind=KIND),
    with_knowledge({"logits": GOOD}),
    *[
        with_knowledge({"values": GOOD}, ConfigRecord({n: v for n, v in SAID.items() if n != left}))
        for left in SAID
    ],
    with_knowledge({"values": GOOD}, ConfigRecord({**SAID, "space": "dreams"})),
    with_knowledge({"values": GOOD}, ConfigRecord({**SAID, "space": [1, 2]})),
    with_knowledge({"values": GOOD}, ConfigRecord({**SAID, "wire": "float16"})),
    with_knowledge({"values": GOOD}, ConfigRecord({**SAID, "wire": "float33"})),
    with_knowledge({"values": GOOD}, ConfigRecord({**SAID, "wire": "simplex:1+changed+range"})),
    with_knowledge({"values": GOOD}, ConfigRecord({**SAID, "sets": 2**40})),
    with_knowledge({"values": GOOD}, ConfigRecord({**SAID, "sets": -1})),
    with_knowledge({"values": GOOD}, ConfigRecord({**SAID, "samples": "some"})),
    with_knowledge({"values": GOOD}, ConfigRecord({"kind": "weights"})),
    with_knowledge({"values": junk_array()}),
    with_knowledge({"values": junk_array(stype="pickle")}),
    with_knowledge({"values": pickled()}),
    with_knowledge({"values": Array(np.array(3.0, dtype=np.float32))}),
    with_knowledge({"values": Array(np.zeros((N, 2, C), dtype=np.float32))}),
    with_knowledge({"values": Array(np.zeros((N - 1, C), dtype=np.float32))}),
    with_knowledge({"values": Array(np.array(["a"]))}),
    with_knowledge({"values": GOOD, "samples": Array(np.arange(N + 1, dtype=np.int32))}, LISTED),
    with_knowledge({"values": GOOD, "samples": Array(np.array([1, 2, 3, 4, P]))}, LISTED),
    with_knowledge({"values": GOOD, "samples": junk_array()}, LISTED),
    with_knowledge({"w": junk_array()}, ConfigRecord({"kind": "weights", "model": "mlp-3"})),
]
BAD_REPORTS = [
    RecordDict(),
    RecordDict({"report": ConfigRecord({"partition-id": 4, "num-examples": 83})}),
    RecordDict({"metrics": MetricRecord({"partition-id": 4, "num-examples": 83})}),
    with_numbers(partition_id=None),
    with_numbers(num_examples=None),
    with_numbers(partition_id=4.0),
    with_numbers(num_examples=83.5),
    with_numbers(num_examples=[83]),
    with_numbers(loss=math.nan),
    with_numbers(loss=-math.inf),
    with_numbers(loss=[0.5, 0.25]),
    with_numbers(loss=[]),
    *BAD_KNOWLEDGE,
]


@pytest.mark.parametrize("records", BAD_REPORTS, ids=range(len(BAD_REPORTS)))
def test_a_report_that_is_none_is_refused_in_one_line(records: RecordDict) -> None:
    with pytest.raises(FedkdError) as caught:
        decode_report(records, SAMPLES, SIZES)
    assert "\n" not in str(caught.value)


def test_huge_numbers_do_not_upset_the_decoder() -> None:
    for value in (2**62, -(2**62), 0, -39, 10**12):
        got = decode_report(with_numbers(num_examples=value, partition_id=value), SAMPLES, SIZES)
        assert (got.client, got.num_examples) == (value, value)


def broken_order(**changes: Any) -> RecordDict:
    """Return an instruction with another instruction; None takes a key away."""
    records: dict[str, Any] = dict(order_records(soft_labels()))
    fields: dict[str, Any] = {**records["instruction"]}
    fields |= {name.replace("_", "-"): value for name, value in changes.items()}
    kept = {name: value for name, value in fields.items() if value is not None}
    records["instruction"] = ConfigRecord(kept)
    return RecordDict(records)


def order_with(**records: Any) -> RecordDict:
    named = {name.replace("_", "-"): record for name, record in records.items()}
    return RecordDict({**order_records(soft_labels()), **named})


BAD_ORDERS = [
    RecordDict(),
    RecordDict({"instruction": MetricRecord({"client": 4})}),
    *[
        broken_order(**{key: None})
        for key in ("client", "round", "base", "phases", "knowledge-round", "evaluate", "wire")
    ],
    broken_order(phases="[3]"),
    broken_order(phases=3),
    broken_order(client="four"),
    broken_order(round="seven"),
    broken_order(base=[1]),
    broken_order(wire="float33"),
    order_with(request=ArrayRecord({"samples": junk_array()})),
    order_with(request=ArrayRecord({"samples": pickled()})),
    order_with(knowledge=ArrayRecord({"values": junk_array()})),
    order_with(knowledge_kind=ConfigRecord({"kind": "soft-labels"})),
]


@pytest.mark.parametrize("records", BAD_ORDERS, ids=range(len(BAD_ORDERS)))
def test_an_order_that_is_none_is_refused_in_one_line(records: RecordDict) -> None:
    with pytest.raises(FedkdError) as caught:
        decode_instruction(records, SIZES, num_examples=83)
    assert "\n" not in str(caught.value)


BAD_INTRODUCTIONS: list[dict[str, Any]] = [
    {},
    {"client": 3},
    {"client": "3", "num_examples": 41, "student": "mlp-8", "sources": "00ff"},
    {"client": 3, "num_examples": "many", "student": "mlp-8", "sources": "00ff"},
    {"client": 3, "num_examples": 41.5, "student": "mlp-8", "sources": "00ff"},
    {"client": 3, "num_examples": 41, "student": 20, "sources": "00ff"},
    {"client": 3, "num_examples": 41, "student": "mlp-8", "sources": "00ff", "more": 1},
]


@pytest.mark.parametrize("fields", BAD_INTRODUCTIONS, ids=range(len(BAD_INTRODUCTIONS)))
def test_an_introduction_that_is_none_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(FedkdError, match="introduction"):
        decode_introduction(RecordDict({"introduction": ConfigRecord(fields)}))
    with pytest.raises(FedkdError, match="introduction"):
        decode_introduction(RecordDict())


@pytest.mark.parametrize(
    ("records", "reason"),
    [
        (RecordDict(), "no experiment"),
        (RecordDict({"experiment": ConfigRecord({"alpha": 2.0})}), r"alpha = 2.0.*the message"),
        (RecordDict({"experiment": ConfigRecord({"alfa": 0.5})}), r"alfa.*the message.*alpha"),
    ],
)
def test_an_experiment_that_is_none_names_the_message(records: RecordDict, reason: str) -> None:
    with pytest.raises(FedkdError, match=reason):
        decode_experiment(records)


@pytest.mark.parametrize(
    "array",
    [
        junk_array(dtype="float99"),
        junk_array(dtype=""),
        junk_array(shape=(-1, C)),
        junk_array(shape=(2**40, 2**20)),
    ],
    ids=["type", "no-type", "negative", "vast"],
)
def test_counting_believes_the_buffers_and_not_what_a_client_says_of_them(array: Array) -> None:
    """A client that lies about shape or type neither ends the round nor inflates the count."""
    records = with_knowledge({"values": array})
    assert 0 <= sum(payload_bytes(records).values()) <= len(array.data)


def test_counting_survives_records_that_flower_cannot_count() -> None:
    """Flower's own count raises at empty texts and lists."""
    for odd in (ConfigRecord({"note": ""}), ConfigRecord({"n": []}), MetricRecord({"n": []})):
        assert wire_bytes(RecordDict({**with_numbers(), "odd": odd})) > 0

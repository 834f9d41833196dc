"""Clients for test_grids.py, in a module of their own that Ray's workers can import."""

from __future__ import annotations

import os
import time

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedkd.federation.flower_internals.replies import always_reply

app = ClientApp()


@app.train()
def learn(message: Message, context: Context) -> Message:
    """Move the state towards the knowledge received and return it as float16 soft labels."""
    partition = int(context.node_config["partition-id"])
    knowledge = message.content.array_records["knowledge"]["labels"].numpy()
    if "own" not in context.state:
        context.state["own"] = ArrayRecord([np.sin(np.arange(knowledge.size) * (partition + 1.7))])
    own = context.state.array_records["own"]["0"].numpy().reshape(knowledge.shape)
    own = own + 0.3 * (knowledge - own)
    context.state["own"] = ArrayRecord([own])
    labels = ArrayRecord({"labels": Array(own.astype(np.float16))})
    metrics = MetricRecord({"partition-id": partition, "num-examples": partition + 2})
    return Message(RecordDict({"labels": labels, "metrics": metrics}), reply_to=message)


@app.train("meddle")
def meddle(message: Message, context: Context) -> Message:
    """Change the message, send what was in it, and keep the very records that are sent."""
    seen = message.content
    answer = RecordDict({"arrays": seen["arrays"], "metrics": seen["metrics"]})
    for name, record in answer.items():
        context.state[name] = record
    seen.array_records["arrays"]["extra"] = Array(np.ones(3))
    numbers = seen.metric_records["metrics"]["numbers"]
    assert isinstance(numbers, list)
    numbers.append(7)
    del seen["config"]
    return Message(answer, reply_to=message)


def do(message: Message, context: Context) -> Message:
    """Do what the message tells this partition to do."""
    partition = int(context.node_config["partition-id"])
    deeds = message.content.config_records["deeds"]
    context.state["last"] = ConfigRecord({"partition": partition})
    match deeds.get(str(partition)):
        case "exit":
            os._exit(1)
        case "raise":
            raise ArithmeticError("nothing but\nnonsense")
        case "return-nothing":
            return None  # type: ignore[return-value]
        case "hang":
            time.sleep(10_000)
    metrics = MetricRecord({"partition-id": partition})
    about = ConfigRecord({"threads": os.environ["OMP_NUM_THREADS"]})
    return Message(RecordDict({"metrics": metrics, "about": about}), reply_to=message)


app.query("do")(do)
app.query("do_and_reply", mods=[always_reply])(do)

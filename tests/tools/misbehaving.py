"""fedkd's client for a test: what a node sends may be spoilt, if the node itself is told to."""

from __future__ import annotations

import time
from random import Random

from flwr.app import Context, Message, MetricRecord
from flwr.clientapp import ClientApp
from fuzzing import CASES, with_content, with_records

from fedkd.engines.client_app import app as honest
from fedkd.engines.deployment import within_limits
from fedkd.federation.flower_internals.replies import always_reply
from fedkd.federation.messages import HELLO, TRAIN

HANGS, UNREADABLE = "hangs", "not Flower's"

WAYS = (
    "nothing",
    HANGS,
    UNREADABLE,
    "examples-absurd",
    "kind-unknown",
    "shape-of-terabytes",
    "pickle",
    "nan",
)
"""What is sent, by round from the first: names of `fuzzing.CASES`, and two of our own."""


class Unreadable(MetricRecord):
    """A record with Flower's header and a digest that is right, and garbage behind the header."""

    def deflate(self) -> bytes:
        """Return what is stored and sent on without being read."""
        head, end, body = super().deflate().partition(b"\x00")
        return head.replace(b"Unreadable", b"MetricRecord") + end + b"\xff" * len(body)


def spoilt(reply: Message, way: str) -> Message:
    """Return what is sent instead of an honest reply."""
    if way == UNREADABLE:
        numbers = reply.content.metric_records["report"]
        return with_content(reply, with_records(reply.content, report=Unreadable({**numbers})))
    return with_content(reply, CASES[way].spoil(reply.content, Random(way)))


app = ClientApp()


@app.query(HELLO.partition(".")[2])
def hello(message: Message, context: Context) -> Message:
    """Introduce this node honestly."""
    return honest(message, context)


@app.train(TRAIN.partition(".")[2], mods=[always_reply, within_limits])
def train(message: Message, context: Context) -> Message:
    """Execute an instruction, and spoil the reply."""
    number = int(message.metadata.group_id)
    if not context.node_config.get("misbehaves", False) or number > len(WAYS):
        return honest(message, context)
    way = WAYS[number - 1]
    if way == HANGS:
        time.sleep(3600)
    return spoilt(honest(message, context), way)

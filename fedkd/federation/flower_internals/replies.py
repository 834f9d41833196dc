"""Client failures: the error reply that a client sends, and the reason read from one."""

from __future__ import annotations

import re
from collections.abc import Callable

from flwr.app import Context, Error, Message
from flwr.common.constant import ErrorCode  # noqa: TID251

from fedkd.errors import one_line, safe_logger
from fedkd.federation.flower_internals.local_grid import isolated_records

_LOST = 1001
"""Our own code, far from Flower's: the client has lost a part of what it is to continue from."""


def error_reply(message: Message, failure: Exception | str, *, is_lost: bool = False) -> Message:
    """Return the reply of a client that failed, with "ValueError: text" or the text passed.

    Args:
        message: to which it replies.
        failure: why.
        is_lost: whether it has lost a part of what it is to continue from; see `says_lost`.
    """
    if isinstance(failure, Exception):
        failure = f"{type(failure).__name__}: {failure}".removesuffix(": ")
    code = _LOST if is_lost else ErrorCode.CLIENT_APP_RAISED_EXCEPTION
    return Message(Error(code, failure), reply_to=message)


def says_lost(reply: Message) -> bool:
    """Whether a reply says that its client has lost a part of what it is to continue from."""
    return reply.has_error() and reply.error.code == _LOST


def always_reply(
    message: Message, context: Context, call_next: Callable[[Message, Context], Message]
) -> Message:
    """Return a reply in every case: a Flower mod, `ClientApp(mods=[always_reply])`.

    For a client that raises, or returns no `Message`, the reply is an `error_reply`. Flower would put a
    traceback of the worker into the reply of the first, and wait for the second until the round's
    timeout; here the traceback is logged. The state is then as before the call, in every engine
    (Flower's simulation drops the changes of a call that raised, a deployment keeps them).
    """
    before = isolated_records(context.state)
    try:
        reply: object = call_next(message, context)
        if not isinstance(reply, Message):
            raise no_message(reply)
    except Exception as exception:
        context.state = before
        safe_logger(__name__).warning("a client failed", exc_info=True)
        return error_reply(message, exception)
    return reply


def no_message(reply: object) -> TypeError:
    """Return the error of a client that returned something other than a message."""
    return TypeError(f"the client returned {type(reply).__name__} instead of a Message")


_DIED = "client process died"
_REASONS: dict[int, str] = {
    ErrorCode.MESSAGE_UNAVAILABLE: "no reply in time",
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE: "no reply in time",
    ErrorCode.NODE_UNAVAILABLE: "node is gone",
}
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_WRAPPED = re.compile(r"<class '([\w.]+)(?:\(\w+\))?'>:<['\"]?(.*?)['\"]?>", re.DOTALL)
_CHAINED = re.compile(
    r"\n\nThe above exception was the direct cause of the following exception:\n\n"
    r"|\n\nDuring handling of the above exception, another exception occurred:\n\n"
)
_FLOWERS_WORDS = re.compile(r"Exception ClientAppException occurred\. Message: ")


def failure_reason(reply: Message) -> str:
    """Return why a client failed, in one short line without colours and tracebacks.

    "ValueError: text" for a client that raised, "client process died", "no reply in time" for a
    message that expired, "node is gone" for a SuperNode that left.

    Raises:
        ValueError: the reply is not an error.
    """
    code, text = reply.error.code, _ANSI.sub("", reply.error.reason or "")
    if code in _REASONS:
        return _REASONS[code]
    wrapped = _WRAPPED.fullmatch(text.strip())
    if wrapped:
        text = _of_exception(wrapped[1].rpartition(".")[2], wrapped[2])
    return one_line(text if text.split() else f"error {code} without a reason")


def _of_exception(kind: str, text: str) -> str:
    """Return "Type: text" for an exception that Flower reports as its class and its text."""
    if kind.startswith(("Actor", "RayActor", "WorkerCrashed", "OutOfMemory", "NodeDied")):
        return _DIED
    blocks = _CHAINED.split(text)
    # Ray's traceback; the last exception is Flower's ClientAppException around the client's own.
    block = blocks[-2] if len(blocks) > 1 and "ClientAppException" in blocks[-1] else blocks[-1]
    lines = block.splitlines()
    in_traceback = [number for number, line in enumerate(lines) if line.startswith("  ")]
    if in_traceback:
        return " ".join(lines[in_traceback[-1] + 1 :])
    words = _FLOWERS_WORDS.sub("", block.strip())
    return words if kind == "ClientAppException" else f"{kind}: {words}"

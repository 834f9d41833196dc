"""Errors in command-line arguments, in one line."""

from __future__ import annotations

from collections.abc import Iterable

from cyclopts.exceptions import (
    CycloptsError,
    MissingArgumentError,
    UnknownCommandError,
    UnknownOptionError,
    UnusedCliTokensError,
)

from fedkd.errors import FedkdError, nearest
from fedkd.experiment import Experiment
from fedkd.keys import accepted, kebab, snake


def usage(error: CycloptsError, commands: Iterable[str]) -> str:
    """Return in one line what is wrong with the arguments of one of the commands."""
    command = " ".join(["fedkd", *(error.command_chain or ())])
    word = (error.unused_tokens or [""])[0]
    if isinstance(error, UnknownCommandError):
        names = [name for name in commands if not name.startswith("-")]
        return (
            f"unknown command '{word}'{nearest(word, names)}; the commands are {', '.join(names)}"
        )
    if isinstance(error, UnknownOptionError):
        return _unknown_option(error, command)
    if isinstance(error, MissingArgumentError) and error.argument is not None:
        flag = error.keyword or error.argument.name
        field = Experiment.model_fields.get(snake(flag.removeprefix("--")))
        must = f"must be {accepted(field)}" if field else f"`{command} --help` lists its values"
        return f"{flag} has no value: {must}"
    if isinstance(error, UnusedCliTokensError):
        key, equals, value = word.partition("=")
        hint = f" (did you mean '--{key} {value}'?)" if equals else ""
        hint = f" (did you mean '--config {word}'?)" if word.endswith(".toml") else hint
        return f"unexpected argument '{word}'{hint}; `{command} --help` lists its options"
    return str(error)


def _unknown_option(error: UnknownOptionError, command: str) -> str:
    """Return the error for an unknown flag: that of an unknown key, where the command takes keys."""
    flag, _, value = (error.token.keyword or error.token.value).partition("=")
    options = [name for a in error.argument_collection for name in a.names if name[:1] == "-"]
    keys = [f"--{kebab(name)}" for name in Experiment.model_fields]
    other = [option for option in options if option not in keys]
    hint = nearest(flag, options)
    if len(other) == len(options) or any(f"'{option}'" in hint for option in other):
        return f"unknown option {flag}{hint or f'; `{command} --help` lists them'}"
    try:
        Experiment.load((flag, {flag.lstrip("-"): value}))
    except FedkdError as unknown:
        return str(unknown)
    return f"unknown option {flag}{hint}"

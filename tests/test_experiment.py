"""The experiment: every key has its bounds, and every mistake is one line that names it."""

from __future__ import annotations

import math
import tomllib
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import tomli_w
from federation_tools import DATA
from flwr.app import RecordDict
from paths import ROOT
from pydantic import ValidationError

from fedkd.data.federated import federated_data
from fedkd.errors import FedkdError
from fedkd.experiment import Experiment, read_toml
from fedkd.federation.exchange import wire_bytes
from fedkd.federation.messages import experiment_record
from fedkd.keys import accepted, kebab, snake

FIELDS = Experiment.model_fields
VAST = 10**9


def bound(name: str, kind: str) -> float | None:
    for constraint in FIELDS[name].metadata:
        value: float | None = getattr(constraint, kind, None)
        if value is not None:
            return value
    return None


def is_whole(name: str) -> bool:
    return "int" in str(FIELDS[name].annotation)


def is_number(name: str) -> bool:
    kind = FIELDS[name].annotation
    return get_origin(kind) is not Literal and (is_whole(name) or "float" in str(kind))


def outside() -> list[tuple[str, float]]:
    """Return values just outside of every key's bounds."""
    found: list[tuple[str, float]] = []
    for name in FIELDS:
        step = 1 if is_whole(name) else 1e-9
        for kind, sign in (("ge", -1), ("le", 1)):
            limit = bound(name, kind)
            if limit is not None:
                found += [(name, limit + sign * step), (name, limit + sign * VAST)]
        for kind, sign in (("gt", -1), ("lt", 1)):
            limit = bound(name, kind)
            if limit is not None:
                found += [(name, limit), (name, limit + sign * VAST)]
    return found


TOGETHER: dict[str, dict[str, Any]] = {
    "momentum": {"optimizer": "sgd"},
    "attack": {"attackers": 0.5},
    "attackers": {"attack": "random"},
    "classes_per_client": {"partition": "shard"},
    "dp_clip": {"dp_noise": 3.0},
    "dp_delta": {"dp_noise": 3.0},
    "client_cpus": {"engine": "flower"},
    "client_gpus": {"engine": "flower"},
}
"""What a key must not be set without."""


def beside(name: str, value: object) -> dict[str, Any]:
    """Return a key with what it must not be set without."""
    is_default = value == FIELDS[name].default
    return {**({} if is_default else TOGETHER.get(name, {})), name: value}


def inside() -> list[tuple[str, float]]:
    """Return the values at and just within every key's bounds."""
    found: list[tuple[str, float]] = []
    for name in FIELDS:
        step = 1 if is_whole(name) else 1e-6
        for kind, shift in (("ge", 0.0), ("le", 0.0), ("gt", step), ("lt", -step)):
            limit = bound(name, kind)
            if limit is not None:
                value = limit + shift
                found.append((name, int(value) if is_whole(name) else value))
    return found


# --- Bounds and types ----------------------------------------------------------------------------


def test_every_numeric_key_has_a_lower_bound() -> None:
    for name in FIELDS:
        if is_number(name):
            assert bound(name, "ge") is not None or bound(name, "gt") is not None, name


@pytest.mark.parametrize(("name", "value"), outside())
def test_a_value_out_of_range_is_refused_with_key_value_and_range(name: str, value: float) -> None:
    value = int(value) if is_whole(name) else value
    with pytest.raises(FedkdError) as caught:
        Experiment(**{**TOGETHER.get(name, {}), name: value})
    text = str(caught.value)
    assert text.startswith(f"{kebab(name)} = {shown(value)} ")
    assert accepted(FIELDS[name]) in text
    assert "\n" not in text


@pytest.mark.parametrize(("name", "value"), inside())
def test_a_value_at_its_limit_is_accepted(name: str, value: float) -> None:
    experiment = Experiment(**beside(name, value))
    assert getattr(experiment, name) == value


@pytest.mark.parametrize("name", [n for n in FIELDS if is_number(n)])
@pytest.mark.parametrize("value", [math.nan, "many", [1], -math.inf, "", {}])
def test_what_is_not_a_number_is_refused_by_key(name: str, value: object) -> None:
    with pytest.raises(FedkdError, match=rf"^{kebab(name)} = .*must be"):
        Experiment(**{name: value})


def refusal(**keys: object) -> str:
    """Return what is said about keys that are refused."""
    try:
        Experiment(**{**UNLABELLED, **keys})
    except FedkdError as error:
        return str(error)
    return ""


def shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)


def taken(values: dict[str, object]) -> list[str]:
    """Return the keys that do not refuse their value by name."""
    return [
        name
        for name, value in values.items()
        if not refusal(**{name: value}).startswith(f"{kebab(name)} = {shown(value)} ")
    ]


UNLABELLED = {"public_labels": False}
"""So that `public` may be anything."""


def test_a_truth_value_is_not_a_number() -> None:
    """``num_clients=True`` is a mistake and not one client."""
    assert taken({name: True for name in FIELDS if is_number(name) and name != "momentum"}) == []


@pytest.mark.parametrize("name", [n for n in FIELDS if is_whole(n)])
def test_a_fraction_is_not_a_whole_number(name: str) -> None:
    with pytest.raises(
        FedkdError,
        match=rf"^{kebab(name)} = 12.5 .*must be (whole number|auto, or a whole number|0)",
    ):
        Experiment(**{name: 12.5})


@pytest.mark.parametrize("name", [n for n in FIELDS if FIELDS[n].annotation is bool])
@pytest.mark.parametrize("value", ["perhaps", 2, None, 0.5])
def test_what_is_neither_true_nor_false_is_refused(name: str, value: object) -> None:
    with pytest.raises(FedkdError, match=rf"^{kebab(name)} = .*true, false"):
        Experiment(**{name: value})


CHOICES = [n for n in FIELDS if get_origin(FIELDS[n].annotation) is Literal]


@pytest.mark.parametrize("name", CHOICES)
def test_a_choice_is_one_of_those_there_are(name: str) -> None:
    choices = get_args(FIELDS[name].annotation)
    for choice in choices:
        assert getattr(Experiment(**beside(name, choice)), name) == choice
    misspelt = choices[0] + "x"
    with pytest.raises(FedkdError) as caught:
        Experiment(**{name: misspelt})
    text = str(caught.value)
    assert text.startswith(f"{kebab(name)} = '{misspelt}' ")
    assert ", ".join(choices) in text
    assert f"did you mean '{choices[0]}'" in text


TEXTS = [name for name in FIELDS if "str" in str(FIELDS[name].annotation) and name not in CHOICES]


def test_an_empty_text_is_refused() -> None:
    """Flower cannot count a record that holds one; the word for nothing is 'none' or 'auto'."""
    assert taken(dict.fromkeys(TEXTS, "")) == []


def test_a_number_is_not_a_text() -> None:
    assert taken(dict.fromkeys(TEXTS, 7)) == []


@pytest.mark.parametrize("name", ["../up", "/root", "a/b", ".hidden", "-x", "a b", "a\n", ""])
def test_a_runs_name_cannot_leave_its_folder(name: str) -> None:
    with pytest.raises(FedkdError, match="letters, digits"):
        Experiment(name=name)


# --- Unknown keys and contradictions -------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("num_cliens", "num-clients"),
        ("studnet", "student"),
        ("learning_rat", "learning-rate"),
        ("public_label", "public-labels"),
        ("temperature", "tau"),
        ("lr", "learning-rate"),
        ("rounds", "num-server-rounds"),
        ("epochs", "local-epochs"),
    ],
)
def test_an_unknown_key_gets_the_nearest(key: str, meant: str) -> None:
    python = meant.replace("-", "_")  # as it is typed there
    with pytest.raises(FedkdError, match=rf"unknown key '{key}' \(from Python\).*'{python}'"):
        Experiment(**{key: 1})
    with pytest.raises(FedkdError, match=rf"unknown key '{kebab(key)}' \(from x.toml\).*'{meant}'"):
        Experiment.load(("x.toml", {kebab(key): 1}))


def test_a_key_like_no_other_says_where_the_keys_are_listed() -> None:
    with pytest.raises(FedkdError, match=r"unknown key 'zzz'.*fedkd run --help"):
        Experiment(zzz=1)


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"public": "fashion-mnist"}, ["public-labels", "public = 'fashion-mnist'"]),
        ({"momentum": 0.9}, ["momentum = 0.9", "optimizer = 'adam'"]),
        ({"momentum": 0.9, "optimizer": "adamw"}, ["momentum = 0.9", "optimizer = 'adamw'"]),
        ({"quorum": 11}, ["quorum = 11", "num-clients = 10"]),
        (
            {"attack": "random", "attackers": 0.05},
            ["attackers = 0.05", "num-clients = 10", "rounds to no client", "0.1"],
        ),
        (
            {"quorum": 3, "fraction_train": 0.2},
            ["quorum = 3", "fraction-train = 0.2", "only 2 are drawn"],
        ),
        (
            {"public_per_round": 12, "public_size": 11},
            ["public-per-round = 12", "public-size = 11"],
        ),
    ],
)
def test_contradictions_name_both_keys(keys: dict[str, Any], named: list[str]) -> None:
    with pytest.raises(FedkdError) as caught:
        Experiment(**keys)
    assert all(part in str(caught.value) for part in named), str(caught.value)
    assert "\n" not in str(caught.value)


IDLE: dict[str, tuple[Any, str, Any, Any]] = {
    "test_size": (101, "fold", "none", "2/3"),
    "partition_alpha": (0.1, "partition", "dirichlet", "iid"),
    "classes_per_client": (3, "partition", "pathological", "dirichlet"),
    "momentum": (0.9, "optimizer", "sgd", "adamw"),
    "attack": ("random", "attackers", 0.3, 0.0),
    "attackers": (0.3, "attack", "random", "none"),
    "dp_clip": (2.0, "dp_noise", 1.0, 0.0),
    "dp_delta": (1e-6, "dp_noise", 1.0, 0.0),
    "num_workers": (3, "engine", "cohort", "flower"),
    "ray_address": ("h:1", "num_workers", 2, 0),
    "client_cpus": (2.0, "engine", "flower", "cohort"),
    "client_gpus": (0.5, "engine", "flower", "cohort"),
}
"""By key: a value, the key that it needs, with which it has an effect and without."""


@pytest.mark.parametrize("name", IDLE)
def test_a_key_without_effect_must_keep_its_default(name: str) -> None:
    value, other, needed, without = IDLE[name]
    assert getattr(Experiment(**{name: value, other: needed}), name) == value
    assert Experiment(**{name: FIELDS[name].default, other: without}).flat()
    words = rf"^{kebab(name)} = .* has no effect with {kebab(other)} = .*: set {kebab(other)}"
    with pytest.raises(FedkdError, match=words):
        Experiment(**{name: value, other: without})
    varied = Experiment(**{name: value, other: needed}).varied(**{other: without})
    assert getattr(varied, name) == FIELDS[name].default


def test_several_mistakes_are_named_together() -> None:
    with pytest.raises(FedkdError) as caught:
        Experiment(alpha=7, tau=-1, seed="x")
    assert all(name in str(caught.value) for name in ("alpha = 7", "tau = -1", "seed = 'x'"))


# --- Frozen, replaced, derived -------------------------------------------------------------------


def test_an_experiment_is_frozen_and_can_be_compared() -> None:
    experiment = Experiment()
    with pytest.raises(ValidationError, match="frozen"):
        experiment.alpha = 0.5
    assert experiment == Experiment()
    assert experiment != Experiment(alpha=0.5)
    assert hash(experiment) == hash(Experiment())


def test_a_changed_copy_is_validated_again() -> None:
    experiment = Experiment(num_clients=4)
    changed = experiment.replace(alpha=0.25)
    assert (changed.alpha, changed.num_clients) == (0.25, 4)
    assert experiment.alpha == 0.7
    with pytest.raises(FedkdError, match="alpha = 7"):
        experiment.replace(alpha=7)
    with pytest.raises(FedkdError, match="quorum = 5"):
        experiment.replace(quorum=5)
    with pytest.raises(FedkdError, match="unknown key 'alfa'"):
        experiment.replace(alfa=0.5)


def test_lists_of_models_cycle_over_the_clients() -> None:
    experiment = Experiment(student="mlp-8, lenet,cnn", teacher="none,mlp-800")
    students = [experiment.student_of(k) for k in range(5)]
    assert students == ["mlp-8", "lenet", "cnn", "mlp-8", "lenet"]
    assert [experiment.teacher_of(k) for k in range(3)] == ["none", "mlp-800", "none"]


@pytest.mark.parametrize(
    ("clients", "fraction", "expected"),
    [(10, 1.0, 10), (7, 0.4, 3), (10, 0.04, 1), (3, 0.5, 2), (100, 0.1, 10)],
)
def test_a_share_of_the_clients_is_rounded_and_never_none(
    clients: int, fraction: float, expected: int
) -> None:
    experiment = Experiment(num_clients=clients, fraction_train=fraction)
    assert experiment.clients_per_round == expected


def test_the_split_has_the_seed_of_the_run_unless_it_has_its_own() -> None:
    assert Experiment(seed=3).split_seed == 3
    assert Experiment(seed=3, partition_seed=0).split_seed == 0


# --- Flat, files, sources ------------------------------------------------------------------------

UNUSUAL = Experiment(
    dataset="digits",
    data_dir="/some/where",
    train_size=700,
    public_size=77,
    public_per_round=11,
    public_labels=False,
    partition_seed=0,
    student="mlp-8,lenet",
    strategy_config="a=1 b='two' c=\"three\"",
    learning_rate=1e-5,
    tau=1,
    name="x.y_z-1",
    round_timeout=1e-3,
)


@pytest.mark.parametrize("experiment", [Experiment(), UNUSUAL], ids=["default", "unusual"])
def test_flat_keys_survive_messages_toml_and_loading(
    experiment: Experiment, tmp_path: Path
) -> None:
    flat = experiment.flat()
    assert list(flat) == [kebab(name) for name in FIELDS]
    assert all(type(value) in (bool, int, float, str) for value in flat.values())
    assert Experiment.load(("flat", flat)) == experiment
    assert Experiment.load(("record", dict(experiment_record(experiment)))) == experiment
    path = tmp_path / "experiment.toml"
    path.write_text(tomli_w.dumps(flat))
    assert Experiment.load(read_toml(path)) == experiment
    assert wire_bytes_of(experiment) > 500


def wire_bytes_of(experiment: Experiment) -> int:
    return wire_bytes(RecordDict({"experiment": experiment_record(experiment)}))


def test_pyproject_lists_every_key_with_its_default() -> None:
    """Flower overrides only keys that stand there."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["flwr"]["app"]["config"] == Experiment().flat()
    types = {k: type(v) for k, v in project["tool"]["flwr"]["app"]["config"].items()}
    assert types == {k: type(v) for k, v in Experiment().flat().items()}


def test_the_defaults_are_those_that_were_promised() -> None:
    promised: dict[str, Any] = {
        "dataset": "mnist-5k", "num_clients": 10, "partition": "dirichlet",
        "partition_alpha": 0.3, "student": "mlp-20", "teacher": "none", "strategy": "FedMD",
        "num_server_rounds": 10, "public_size": None, "public_per_round": None,
        "public_labels": True, "fraction_train": 1.0, "local_epochs": 1, "distill_epochs": 1,
        "batch_size": 64, "optimizer": "adam", "learning_rate": 1e-3, "alpha": 0.7, "tau": 5,
        "quorum": 1, "round_timeout": 600, "seed": 0,
    }  # fmt: skip
    experiment = Experiment()
    assert {name: getattr(experiment, name) for name in promised} == promised


def test_every_key_says_what_it_is_and_takes_either_spelling() -> None:
    for name, info in FIELDS.items():
        assert info.description, name
        assert snake(kebab(name)) == name
    loaded = Experiment.load(("a", {"num-clients": 4, "num_server_rounds": 2}))
    assert (loaded.num_clients, loaded.num_server_rounds) == (4, 2)


def test_later_sources_win() -> None:
    loaded = Experiment.load(
        ("a.toml", {"alpha": 0.1, "tau": 2}), ("command line", {"alpha": "0.5"})
    )
    assert (loaded.alpha, loaded.tau) == (0.5, 2)


@pytest.mark.parametrize(
    ("bad", "source"),
    [({"alpha": 7}, "a.toml"), ({"tau": "warm"}, "a.toml"), ({"partition": "iid2"}, "a.toml")],
)
def test_an_error_names_the_source_of_its_key(bad: dict[str, Any], source: str) -> None:
    with pytest.raises(FedkdError, match=rf"\(from {source}\)"):
        Experiment.load((source, bad), ("command line", {"seed": 3}))
    with pytest.raises(FedkdError, match=r"\(from command line\)"):
        Experiment.load((source, {"seed": 3}), ("command line", bad))
    with pytest.raises(FedkdError, match=r"\(from Python\)"):
        Experiment(**bad)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"alpha = ", r"not valid TOML.*end of document"),
        (b"alpha = 0.5\nalpha = 0.6\n", r"not valid TOML.*line 2"),
        (b"[training]\nalpha = 0.5\n", r"training in .*flat"),
        (b"seeds = [1, 2]\n", r"seeds in .*flat"),
        (b"alpha = \xff\n", "UTF-8"),
    ],
)
def test_a_file_that_is_no_experiment_is_named(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_bytes(content)
    with pytest.raises(FedkdError, match=reason) as caught:
        read_toml(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(FedkdError, match=str(path)):
            read_toml(path)


# --- Smoke ---------------------------------------------------------------------------------------

LARGE: dict[str, dict[str, Any]] = {
    "default": {},
    "many": {"num_clients": 1000, "fraction_train": 0.1, "quorum": 50, "num_server_rounds": 99},
    "shard": {"partition": "shard"},
    "iid": {"partition": "iid", "min_partition_size": 100},
    "pathological": {"partition": "pathological"},
    "skewed": {"partition_alpha": 0.1, "min_partition_size": 20},
    "public": {"public_size": 1000, "public_per_round": 500},
    "small": {"train_size": 100, "test_size": 50},
    "smaller": {"train_size": 60, "public_size": 11, "public_per_round": 7},
    "two": {"num_clients": 2, "num_server_rounds": 1},
    "unlabelled": {"public_labels": False},
}


@pytest.mark.parametrize("dataset", ["digits", "mnist-5k"])
@pytest.mark.parametrize("keys", LARGE.values(), ids=LARGE)
def test_smoke_shrinks_and_keeps_the_method_and_the_data_set(
    dataset: str, keys: dict[str, Any]
) -> None:
    large = Experiment(
        dataset=dataset, data_dir=DATA, local_epochs=5, distill_epochs=7, device="cpu", **keys
    )
    small = large.smoke()
    for name in ("dataset", "public", "public_labels", "partition", "student", "teacher",
                 "strategy", "strategy_config", "alpha", "tau", "optimizer", "seed"):  # fmt: skip
        assert getattr(small, name) == getattr(large, name)
    assert small.num_clients <= min(3, large.num_clients)
    assert small.num_server_rounds <= 2
    assert small.local_epochs == small.distill_epochs == 1
    assert small.train_size is not None
    assert small.train_size <= min(600, large.train_size or 600)
    data = federated_data(small)  # which can be built
    assert len(data.test) <= 200
    assert 1 <= len(data.public) <= 120
    assert len(data.public) <= large.public_size if large.public_size else True
    assert len(data.shards) == small.num_clients
    assert small.public_per_round is None or small.public_per_round <= len(data.public)
    assert small.smoke() == small


@pytest.mark.parametrize(
    "kept",
    [
        {"num_clients": 11},
        {"num_server_rounds": 7, "local_epochs": 3, "distill_epochs": 5},
        {"public_size": 211},
        {"public_per_round": 211, "public_size": None},
        {"train_size": 1103, "test_size": 307},
        {"quorum": 7, "fraction_train": 0.5, "num_clients": 37},
        {"num_workers": 5},
        {"partition": "pathological", "classes_per_client": 3},
        {"attack": "random", "attackers": 0.1},
    ],
    ids=str,
)
def test_smoke_keeps_what_is_asked_for(kept: dict[str, Any]) -> None:
    large = Experiment(dataset="digits", data_dir=DATA, device="cpu", **kept)
    small = large.smoke(*kept)
    assert {name: getattr(small, name) for name in kept} == kept
    assert len(federated_data(small).shards) == small.num_clients
    assert small.num_server_rounds == kept.get("num_server_rounds", 2)


def test_smoke_of_a_fold_leaves_the_test_set_alone() -> None:
    assert Experiment(fold="1/3").smoke().test_size is None

"""The experiment: one flat, frozen, validated description of a run.

The same keys are used in Python (``num_clients``), on the command line (``--num-clients``), in TOML files
and in Flower's run config (``num-clients``). Values are scalars only, because Flower's run config allows
nothing else; lists are comma-separated strings.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from math import lcm
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from fedkd.errors import FedkdError, Setting, one_line, printable
from fedkd.keys import (
    AUTO,
    Requirement,
    Role,
    Scalar,
    absolute,
    declared,
    extra,
    is_file,
    kebab,
    refusal,
    snake,
    unknown,
    without_effect,
)


def _auto_to_none(value: object) -> object:
    return None if value == AUTO else value


OptionalInt = Annotated[int | None, BeforeValidator(_auto_to_none)]
OptionalStr = Annotated[str | None, BeforeValidator(_auto_to_none)]

_PLAN = r"(loop|stacked(-[1-9]\d*)?)(x[1-9]\d*)?"
_PLANS = re.compile(rf"auto|{_PLAN}|[^=,\s][^=,]*={_PLAN}(, *[^=,\s][^=,]*={_PLAN})*")
"""Values of ``plan``; `fedkd.training.plans` reads them."""

_WIRE = r"[a-z0-9]+(:[0-9]+)?(\+[a-z]+)*"
_CODECS = re.compile(rf"auto|{_WIRE}(/{_WIRE})?")
"""Values of ``codec``; `fedkd.knowledge.wire` reads them."""

_WITHOUT_EFFECT_TOO = {"without_effect_too": True}
"""Context of a validation that accepts keys without effect."""


class Experiment(BaseModel):
    """Everything about one run.

    Raises:
        FedkdError: a key is unknown, out of range, of the wrong type, or contradicts another one.
            The text names the key, its value, where it came from, and what is accepted.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=False)

    # data
    dataset: str = declared(
        "data",
        "mnist-5k",
        "data set: see `fedkd data`, or module:function or file.py:function",
        names_code=True,
    )
    data_dir: OptionalStr = declared(
        "bookkeeping",
        None,
        "folder of the data cache (auto: $FEDKD_DATA_DIR, then your cache folder)",
        node_decides=True,
    )
    train_size: OptionalInt = declared(
        "data", None, "training images used, public set included (auto: all)", ge=10
    )
    test_size: OptionalInt = declared(
        "data",
        None,
        "test images used (auto: all)",
        ge=10,
        only_with=Requirement("fold", ("none",)),
    )
    fold: str = declared(
        "data",
        "none",
        "test on this part of the training images, held out from all clients, instead of the test set",
        pattern=r"^(none|[1-9]\d*/[1-9]\d*)$",
        accepted="none, or I/N such as 2/5, with 1 ≤ I ≤ N and N ≥ 2",
    )
    public: str = declared(
        "data",
        "train",
        "public set: cut from the training split, or another data set's name",
        names_code=True,
    )
    public_size: OptionalInt = declared(
        "data", None, "public images (auto: a fifth of the training images)", ge=1
    )
    public_labels: bool = declared(
        "federated data", True, "whether the public set comes with its labels"
    )
    partition: Literal["iid", "dirichlet", "shard", "pathological"] = declared(
        "federated data", "dirichlet", "how private images are divided among clients"
    )
    partition_alpha: float = declared(
        "federated data",
        0.3,
        "Dirichlet concentration: small is more skewed",
        gt=0,
        le=1_000_000,
        only_with=Requirement("partition", ("dirichlet",)),
    )
    classes_per_client: int = declared(
        "federated data",
        2,
        "classes (pathological) or shards (shard) a client holds",
        ge=1,
        only_with=Requirement("partition", ("shard", "pathological")),
    )
    min_partition_size: int = declared(
        "federated data", 2, "least number of private images of a client", ge=1
    )
    partition_seed: OptionalInt = declared(
        "seed", None, "seed of public set and shards (auto: the seed)", ge=0
    )
    num_clients: int = declared("federated data", 10, "clients in the federation", ge=1, le=100_000)

    # models
    student: str = declared(
        "models",
        "mlp-20",
        "local model, or a comma list that cycles over the clients",
        names_code=True,
    )
    teacher: str = declared(
        "models",
        "none",
        "local teacher (or comma list); none: the student is its own teacher",
        names_code=True,
    )
    server_model: str = declared("federation", "none", "model of the server; none: it has no model")

    # method
    strategy: str = declared("federation", "FedMD", "federated algorithm: see `fedkd strategies`")
    strategy_config: str = declared(
        "federation", "none", "settings of the strategy as key=value pairs separated by spaces"
    )
    num_server_rounds: int = declared("federation", 10, "rounds of the federation", ge=1)
    fraction_train: float = declared(
        "federation", 1.0, "share of clients drawn each round", gt=0, le=1
    )
    public_per_round: OptionalInt = declared(
        "federation", None, "public images drawn each round (auto: all)", ge=1
    )
    codec: str = declared(
        "federation",
        "auto",
        "how soft labels are encoded, up and down (auto: as the strategy sets it)",
        accepted="auto, or number+rows+pack such as simplex:1+changed+range; UP/DOWN for two",
    )
    evaluate_phases: Literal["all", "last"] = declared(
        "evaluation",
        "all",
        "after which phases of a round clients test: all that train, or the last",
    )
    evaluate_every: int = declared(
        "evaluation", 1, "rounds between evaluations on the test set", ge=1
    )
    quorum: int = declared(
        "federation", 1, "least number of good replies for a round to count", ge=1
    )
    round_timeout: float = declared(
        "clients", 600.0, "seconds until a round stops waiting for Flower clients", gt=0
    )
    client_code: str = declared(
        "clients",
        "none",
        "comma list of modules whose functions a server may ask a client to run",
        node_decides=True,
        names_code=True,
    )

    # training
    local_epochs: int = declared("optimisation", 1, "passes over the private shard per round", ge=1)
    distill_epochs: int = declared(
        "distillation", 1, "passes over the received soft labels per round", ge=1
    )
    batch_size: int = declared("training", 64, "images per step", ge=1)
    optimizer: Literal["adam", "adamw", "sgd"] = declared("training", "adam", "optimiser")
    learning_rate: float = declared("optimisation", 1e-3, "step size of the optimiser", gt=0, le=10)
    momentum: float = declared(
        "optimisation",
        0.0,
        "momentum (sgd only)",
        ge=0,
        lt=1,
        only_with=Requirement("optimizer", ("sgd",)),
    )
    weight_decay: float = declared("optimisation", 0.0, "weight decay", ge=0, le=1)
    augment: Literal["none", "crop-flip", "jitter-2"] = declared(
        "training", "none", "augmentation of private images while training on hard labels"
    )
    alpha: float = declared(
        "distillation", 0.7, "weight of the soft term; that of CE is 1 - alpha", ge=0, le=1
    )
    tau: float = declared("distillation", 5.0, "temperature of the soft term", gt=0, le=1000)
    kl_reduction: Literal["batchmean", "mean"] = declared(
        "training",
        "batchmean",
        "batchmean: mean over samples, the formula; mean: divided by the classes as well",
    )

    # attacks and privacy
    attack: Literal[
        "none",
        "label-flip",
        "random",
        "constant",
        "least-likely",
        "colluding",
        "little-is-enough",
    ] = declared(
        "federation",
        "none",
        "what malicious clients do (none: there are none)",
        node_decides=True,
        only_with=Requirement("attackers"),
    )
    attackers: float = declared(
        "federation",
        0.0,
        "share of the clients that are malicious, rounded",
        ge=0,
        le=1,
        node_decides=True,
        only_with=Requirement("attack"),
    )
    dp_noise: float = declared(
        "federation",
        0.0,
        "standard deviation of the Gaussian noise on the soft labels that a client sends, in "
        "units of dp-clip (0: none)",
        ge=0,
        le=1_000_000,
    )
    dp_clip: float = declared(
        "federation",
        1.0,
        "largest Euclidean norm of a row before noise is added",
        gt=0,
        le=1_000_000,
        only_with=Requirement("dp_noise"),
    )
    dp_delta: float = declared(
        "federation",
        1e-5,
        "δ of the (ε, δ)-differential privacy that is accounted for",
        gt=0,
        lt=1,
        only_with=Requirement("dp_noise"),
    )

    # running
    seed: int = declared("seed", 0, "seed of weights, shuffles and client samples", ge=0, lt=2**31)
    engine: Literal["cohort", "flower"] = declared(
        "clients", "cohort", "cohort: all clients in this process; flower: Flower clients on Ray"
    )
    num_workers: int = declared(
        "clients",
        0,
        "Ray workers of the cohort engine (0: the clients run in this process)",
        ge=0,
        only_with=Requirement("engine", ("cohort",)),
    )
    ray_address: OptionalStr = declared(
        "clients",
        None,
        "Ray cluster that the workers join (auto: Ray is started on this machine)",
        only_with=Requirement("num_workers"),
    )
    device: str = declared("machine", "auto", "auto, cpu, cuda, cuda:N or mps", node_decides=True)
    precision: Literal["float32", "tf32", "bfloat16"] = declared(
        "training", "float32", "arithmetic of the models: exact, or faster on a GPU's tensor cores"
    )
    plan: str = declared(
        "machine",
        "auto",
        "how models are run: one by one or stacked, and how many at once (auto: measured)",
        accepted="auto, loop, stacked or stacked-BLOCK, with xLANES for so many at once; or "
        "architecture=plan pairs with commas",
    )
    profile: bool = declared(
        "bookkeeping", False, "whether to measure the time of each part of the training"
    )
    client_cpus: float = declared(
        "clients",
        1.0,
        "CPUs that Ray reserves for a Flower client",
        gt=0,
        only_with=Requirement("engine", ("flower",)),
    )
    client_gpus: float = declared(
        "clients",
        0.0,
        "GPUs (or a fraction) that Ray reserves for a Flower client",
        ge=0,
        only_with=Requirement("engine", ("flower",)),
    )
    run_dir: str = declared("bookkeeping", "runs", "folder of the run folders", node_decides=True)
    name: OptionalStr = declared(
        "bookkeeping", None, "name of the run folder", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
    )

    def __init__(self, **keys: Any) -> None:
        try:
            super().__init__(**keys)
        except ValidationError as error:
            raise refusal(error, {}, type(self).model_fields) from None

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_empty_and_truth(cls, value: object, info: ValidationInfo) -> object:
        """Refuse what pydantic would accept: true for the number 1, a text that is empty or not shown."""
        annotation = cls.model_fields[info.field_name or ""].annotation
        if value == "" or (isinstance(value, bool) and annotation is not bool):
            raise ValueError("refused")
        if isinstance(value, str) and printable(value) != value:
            raise ValueError("refused")
        return value

    @field_validator("dataset", "public", "student", "teacher", "server_model")
    @classmethod
    def _find_files_from_anywhere(cls, value: str) -> str:
        """Return the value with absolute paths of files, the same in all processes and folders."""
        names = [name.strip() for name in value.split(",")]
        return ",".join(map(absolute, names)) if ".py:" in value else value

    @field_validator("plan")
    @classmethod
    def _find_planned_files_from_anywhere(cls, value: str) -> str:
        return (
            ", ".join(absolute(e.strip()) for e in value.split(",")) if ".py:" in value else value
        )

    @field_validator("plan")
    @classmethod
    def _refuse_other_plans(cls, value: str) -> str:
        if not _PLANS.fullmatch(value):
            raise ValueError("refused")
        return value

    @field_validator("codec")
    @classmethod
    def _refuse_other_codecs(cls, value: str) -> str:
        if not _CODECS.fullmatch(value):
            raise ValueError("refused")
        return value

    @field_validator("fold")
    @classmethod
    def _refuse_other_folds(cls, value: str) -> str:
        number, _, count = value.partition("/")
        if value != "none" and not 1 <= int(number) <= int(count) >= 2:
            raise ValueError("refused")
        return value

    @model_validator(mode="after")
    def _refuse_contradictions(self, info: ValidationInfo) -> Self:
        if info.context != _WITHOUT_EFFECT_TOO:
            self.refuse_without_effect(*type(self).model_fields)
        for contradiction in _CONTRADICTIONS:
            contradiction(self)
        return self

    @property
    def clients_per_round(self) -> int:
        """Number of clients sampled per round: ``fraction_train`` of all, rounded, at least 1."""
        return max(1, round(self.fraction_train * self.num_clients))

    @property
    def architecture_period(self) -> int:
        """Clients whose numbers differ by a multiple of this have the same architectures."""
        return lcm(len(self.student.split(",")), len(self.teacher.split(",")))

    @property
    def dataset_word(self) -> str:
        """The data set as part of a folder's name: of a file its name alone, without the path."""
        where, colon, function = self.dataset.rpartition(":")
        module = Path(where).stem if is_file(where) else where
        return f"{module}.{function}" if colon else function

    @property
    def split_seed(self) -> int:
        """Seed of the public set and the shards."""
        return self.seed if self.partition_seed is None else self.partition_seed

    @property
    def client_modules(self) -> list[str]:
        """The modules that ``client_code`` names."""
        names = [name.strip() for name in self.client_code.split(",")]
        return [] if names == ["none"] else names

    def student_of(self, client: int) -> str:
        """Return the student architecture of `client` (the comma list cycles)."""
        return _cycle(self.student, client)

    def teacher_of(self, client: int) -> str:
        """Return the local teacher's architecture of `client`, or ``"none"``."""
        return _cycle(self.teacher, client)

    @classmethod
    def keys(cls, *roles: Role) -> tuple[str, ...]:
        """Return the keys that have one of these roles, in order."""
        return tuple(name for name, key in cls.model_fields.items() if extra(key, "role") in roles)

    @classmethod
    def keys_that(cls, quality: Literal["names_code", "node_decides"]) -> tuple[str, ...]:
        """Return the keys that have a quality; see `fedkd.keys.declared`."""
        return tuple(name for name, key in cls.model_fields.items() if extra(key, quality))

    def replace(self, **keys: Any) -> Experiment:
        """Return a changed copy, validated again."""
        return Experiment(**{**self.model_dump(), **keys})

    def varied(self, **keys: Any) -> Experiment:
        """Return a changed copy, in which keys that then have no effect have their defaults."""
        values = {**self.model_dump(), **keys}
        while idle := without_effect(values, Experiment.model_fields):
            values |= {key: Experiment.model_fields[key].default for key in idle}
        return Experiment(**values)

    def refuse_without_effect(self, *keys: str) -> None:
        """Raise an error if one of these keys has no effect and yet is not at its default.

        Raises:
            FedkdError: the text names the key that it needs.
        """
        for key, requirement in without_effect(vars(self), Experiment.model_fields).items():
            if key in keys:
                default = Experiment.model_fields[key].default
                raise FedkdError(
                    _setting(self, key),
                    " has no effect with ",
                    _setting(self, requirement.key),
                    f": set {requirement}, or {Setting(kebab(key), _shown(default))}",
                )

    def at_default(self, *keys: str) -> Experiment:
        """Return a copy in which these keys have their defaults, for comparing all other keys."""
        return self.replace(**{key: Experiment.model_fields[key].default for key in keys})

    def smoke(self, *kept: str) -> Experiment:
        """Return a copy that runs in seconds: same data set and method, fewer images, clients, rounds.

        Args:
            kept: keys that keep their values. What they need stays large enough for them.
        """
        small = self._small_sizes(kept) | self._few_clients(kept)
        small |= {
            "num_server_rounds": min(self.num_server_rounds, 2),
            "local_epochs": 1,
            "distill_epochs": 1,
        }
        return self.replace(**{key: value for key, value in small.items() if key not in kept})

    def _small_sizes(self, kept: Sequence[str]) -> dict[str, Any]:
        """Return the numbers of images of a smoke test."""
        per_round = self.public_per_round or 0
        asked = self.public_size or 0 if "public_size" in kept else 0
        asked = max(asked, per_round if "public_per_round" in kept else 0)
        train_size = self.train_size
        if "train_size" not in kept and asked <= 120:
            train_size = min(train_size or 600, 600)
        public_size = min(self.public_size or 120, (train_size or 600) // 5)
        public_size = max(public_size, asked)
        return {
            "train_size": train_size,
            "test_size": min(self.test_size or 200, 200) if self.fold == "none" else None,
            "public_size": public_size,
            "public_per_round": self.public_per_round and min(per_round, public_size),
        }

    def _few_clients(self, kept: Sequence[str]) -> dict[str, Any]:
        """Return the number of clients of a smoke test, and what depends on it."""
        is_pathological = self.partition == "pathological"
        least = [1 if "classes_per_client" not in kept or not is_pathological else self.num_clients]
        if "num_workers" in kept:
            least.append(self.num_workers)
        if "quorum" in kept:
            least.append(math.ceil(self.quorum / self.fraction_train))
        if self.attackers:
            # Half a client and a little more is rounded to one.
            least.append(math.floor(0.5 / self.attackers) + 1)
        num_clients = min(self.num_clients, max(3, *least))
        if "num_clients" in kept:
            num_clients = self.num_clients
        return {
            "num_clients": num_clients,
            "num_workers": min(self.num_workers, num_clients, 3),
            "quorum": 1,
            # Three clients together have to hold ten classes.
            "classes_per_client": max(self.classes_per_client, 4 if is_pathological else 1),
        }

    def flat(self) -> dict[str, Scalar]:
        """Return every key in kebab-case with a scalar value, as in TOML and messages."""
        return {kebab(k): AUTO if v is None else v for k, v in self.model_dump().items()}

    @classmethod
    def load(
        cls, *sources: tuple[str, Mapping[str, object]], without_effect_too: bool = False
    ) -> Experiment:
        """Return the experiment merged from `sources`, validated once; later sources win.

        Args:
            sources: pairs of the name of the source (``"experiment.toml"``, ``"command line"``) and its
                keys, in kebab-case or snake_case.
            without_effect_too: whether to accept keys that have no effect; see `varied`.

        Raises:
            FedkdError: see the class; the text names the source of the wrong key.
        """
        values: dict[str, object] = {}
        origin: dict[str, str] = {}
        for source, keys in sources:
            for name, value in keys.items():
                field = snake(name)
                if field not in cls.model_fields:
                    raise FedkdError(unknown(name, source, cls.model_fields))
                values[field] = value
                origin[field] = source
        experiment = cls.__new__(cls)
        try:
            # Not through __init__, which assumes that the keys come from Python.
            context = _WITHOUT_EFFECT_TOO if without_effect_too else None
            cls.__pydantic_validator__.validate_python(
                values, self_instance=experiment, context=context
            )
        except ValidationError as error:
            raise refusal(error, origin, cls.model_fields) from None
        return experiment


def read_toml(path: str | Path) -> tuple[str, dict[str, object]]:
    """Return an experiment file as a source for `Experiment.load`: its path and its keys.

    Raises:
        FedkdError: the file cannot be read or is not TOML; the text names the file and the line.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise FedkdError(f"config = {path}: {error.strerror}") from None
    except ValueError as error:  # a name that no file can have
        raise FedkdError(f"config = {path!r}: {error}") from None
    return str(path), parse_toml(path, content)


def parse_toml(path: str | Path, content: bytes) -> dict[str, object]:
    """Return the keys in the content of an experiment file.

    Raises:
        FedkdError: it is not TOML, or nested; the text names the file and the line.
    """
    try:
        keys = tomllib.loads(content.decode())
    except UnicodeDecodeError:
        raise FedkdError(f"config = {path}: is not UTF-8 text") from None
    except RecursionError:
        raise FedkdError(f"{path} is not valid TOML: nested too deep") from None
    except ValueError as error:  # among them a number of more digits than Python reads
        raise FedkdError(f"{path} is not valid TOML: {one_line(str(error))}") from None
    nested = [name for name, value in keys.items() if isinstance(value, dict | list)]
    if nested:
        raise FedkdError(
            f"{nested[0]} in {path}: experiment files are flat, every value a string, number or "
            "boolean"
        )
    return keys


def _cycle(names: str, client: int) -> str:
    choices = [name.strip() for name in names.split(",")]
    return choices[client % len(choices)]


# --- Keys that contradict each other ----------------------------------------------------------------


def _refuse_labels_of_other_classes(experiment: Experiment) -> None:
    if experiment.public != "train" and experiment.public_labels:
        raise FedkdError(
            *_contradicting(experiment, "public_labels", "public"),
            ": labels of another data set name other classes; set public-labels = false",
        )


def _refuse_workers_without_clients(experiment: Experiment) -> None:
    if experiment.num_workers > experiment.num_clients:
        raise FedkdError(
            *_contradicting(experiment, "num_workers", "num_clients"), ": a worker needs a client"
        )


def _refuse_attackers_who_are_nobody(experiment: Experiment) -> None:
    clients = experiment.num_clients
    if experiment.attackers and not round(experiment.attackers * clients):
        raise FedkdError(
            *_contradicting(experiment, "attackers", "num_clients"),
            f": it rounds to no client; one of them is {1 / clients:.6g}",
        )


def _refuse_quorum_out_of_reach(experiment: Experiment) -> None:
    if experiment.quorum > experiment.clients_per_round:
        raise FedkdError(
            *_contradicting(experiment, "quorum", "fraction_train"),
            " of ",
            _setting(experiment, "num_clients"),
            f": only {experiment.clients_per_round} are drawn per round",
        )


def _refuse_drawing_more_than_there_are(experiment: Experiment) -> None:
    drawn, size = experiment.public_per_round, experiment.public_size
    if drawn and size and drawn > size:
        raise FedkdError(
            *_contradicting(experiment, "public_per_round", "public_size"),
            ": a round cannot draw more images than there are",
        )


_CONTRADICTIONS = (
    _refuse_labels_of_other_classes,
    _refuse_workers_without_clients,
    _refuse_attackers_who_are_nobody,
    _refuse_quorum_out_of_reach,
    _refuse_drawing_more_than_there_are,
)
"""In the order in which they are checked."""


def _contradicting(experiment: Experiment, key: str, other: str) -> tuple[Setting, str, Setting]:
    return _setting(experiment, key), " contradicts ", _setting(experiment, other)


def _setting(experiment: Experiment, key: str) -> Setting:
    return Setting(kebab(key), _shown(getattr(experiment, key)))


def _shown(value: object) -> object:
    return AUTO if value is None else value

"""The experiment: one flat, frozen, validated description of a run.

The same keys serve Python (``num_clients``), the command line (``--num-clients``), TOML files and
Flower's run config (``num-clients``). Values are scalars only, because Flower's run config knows
nothing else; lists are comma-separated strings.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from math import lcm
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args, get_origin

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

from fedkd.errors import FedkdError, nearest

Scalar = bool | int | float | str

AUTO = "auto"
"""How an optional key (``None`` in Python) is written in TOML, on the command line and on the wire."""


def _auto_to_none(value: object) -> object:
    return None if value == AUTO else value


OptionalInt = Annotated[int | None, BeforeValidator(_auto_to_none)]
OptionalStr = Annotated[str | None, BeforeValidator(_auto_to_none)]

_ALIASES = {
    "temperature": "tau",
    "rounds": "num-server-rounds",
    "num-rounds": "num-server-rounds",
    "lr": "learning-rate",
    "epochs": "local-epochs",
    "clients": "num-clients",
    "model": "student",
    "method": "strategy",
}
"""Words that other frameworks use, answered with ours."""


def kebab(name: str) -> str:
    """Spell a key as in TOML and on the command line."""
    return name.replace("_", "-")


def snake(name: str) -> str:
    """Spell a key as in Python."""
    return name.replace("-", "_")


_PLAN = r"(loop|stacked(-[1-9]\d*)?)(x[1-9]\d*)?"
_PLANS = re.compile(rf"auto|{_PLAN}|[^=,\s]+={_PLAN}(, *[^=,\s]+={_PLAN})*")
"""Values of ``plan``; `fedkd.plans` reads them."""

_WIRE = r"[a-z0-9]+(:[0-9]+)?(\+[a-z]+)*"
_CODECS = re.compile(rf"auto|{_WIRE}(/{_WIRE})?")
"""Values of ``codec``; `fedkd.codecs` reads them."""


class Experiment(BaseModel):
    """Everything about one run.

    Raises:
        FedkdError: a key is unknown, out of range, of the wrong type, or contradicts another one.
            The text names the key, its value, where it came from, and what is accepted.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=False)

    # data
    dataset: str = Field("mnist-5k", description="data set: see `fedkd data`, or module:function")
    data_dir: OptionalStr = Field(
        None, description="folder of the data cache (auto: $FEDKD_DATA_DIR, then your cache folder)"
    )
    train_size: OptionalInt = Field(
        None, ge=10, description="training images used, public set included (auto: all)"
    )
    test_size: OptionalInt = Field(None, ge=10, description="test images used (auto: all)")
    fold: str = Field(
        "none",
        pattern=r"^(none|[1-9]\d*/[1-9]\d*)$",
        description="test on this part of the training images, held out from everybody, instead of the "
        "test set",
        json_schema_extra={"accepted": "none, or I/N such as 2/5, with 1 ≤ I ≤ N and N ≥ 2"},
    )
    public: str = Field(
        "train", description="public set: cut from the training split, or another data set's name"
    )
    public_size: OptionalInt = Field(
        None, ge=1, description="public images (auto: a fifth of the training images)"
    )
    public_labels: bool = Field(True, description="whether the public set comes with its labels")
    partition: Literal["iid", "dirichlet", "shard", "pathological"] = Field(
        "dirichlet", description="how private images are dealt to clients"
    )
    partition_alpha: float = Field(
        0.3, gt=0, le=1_000_000, description="Dirichlet concentration: small is more skewed"
    )
    classes_per_client: int = Field(
        2, ge=1, description="classes (pathological) or shards (shard) a client holds"
    )
    min_partition_size: int = Field(2, ge=1, description="fewest private images of a client")
    partition_seed: OptionalInt = Field(
        None, ge=0, description="seed of public set and shards (auto: the seed)"
    )
    num_clients: int = Field(10, ge=1, le=100_000, description="clients in the federation")

    # models
    student: str = Field(
        "mlp-20", description="local model, or a comma list that cycles over the clients"
    )
    teacher: str = Field(
        "none", description="local teacher (or comma list); none: the student is its own teacher"
    )
    server_model: str = Field("none", description="model kept by the server; none: it keeps none")

    # method
    strategy: str = Field("FedMD", description="federated algorithm: see `fedkd strategies`")
    strategy_config: str = Field(
        "none", description="its own settings as key=value pairs separated by spaces"
    )
    num_server_rounds: int = Field(10, ge=1, description="rounds of the federation")
    fraction_train: float = Field(1.0, gt=0, le=1, description="share of clients drawn each round")
    public_per_round: OptionalInt = Field(
        None, ge=1, description="public images drawn each round (auto: all)"
    )
    codec: str = Field(
        "auto",
        description="how soft labels cross the wire, up and down (auto: as the strategy says)",
        json_schema_extra={
            "accepted": "auto, or number+rows+pack such as simplex:1+changed+range; UP/DOWN for two"
        },
    )
    evaluate_phases: Literal["all", "last"] = Field(
        "all", description="after which phases of a round clients test: all that train, or the last"
    )
    evaluate_every: int = Field(1, ge=1, description="rounds between evaluations on the test set")
    quorum: int = Field(1, ge=1, description="fewest good replies for a round to count")
    round_timeout: float = Field(
        600.0, gt=0, description="seconds until a round stops waiting for Flower clients"
    )
    client_code: str = Field(
        "none", description="comma list of modules whose functions a server may ask a client to run"
    )

    # training
    local_epochs: int = Field(1, ge=1, description="passes over the private shard a round")
    distill_epochs: int = Field(1, ge=1, description="passes over the received soft labels a round")
    batch_size: int = Field(64, ge=1, description="images a step")
    optimizer: Literal["adam", "adamw", "sgd"] = Field("adam", description="optimiser")
    learning_rate: float = Field(1e-3, gt=0, le=10, description="step size of the optimiser")
    momentum: float = Field(0.0, ge=0, lt=1, description="momentum (sgd only)")
    weight_decay: float = Field(0.0, ge=0, le=1, description="weight decay")
    augment: Literal["none", "crop-flip", "jitter-2"] = Field(
        "none", description="augmentation of private images while training on hard labels"
    )
    alpha: float = Field(0.7, ge=0, le=1, description="weight of the soft term, 1 - alpha of CE")
    tau: float = Field(5.0, gt=0, le=1000, description="temperature of the soft term")
    kl_reduction: Literal["batchmean", "mean"] = Field(
        "batchmean",
        description="batchmean: mean over samples, the formula; mean: divided by the classes as well",
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
    ] = Field("none", description="what malicious clients do (none: there are none)")
    attackers: float = Field(
        0.0, ge=0, le=1, description="share of the clients that are malicious, rounded"
    )
    dp_noise: float = Field(
        0.0,
        ge=0,
        le=1_000_000,
        description="standard deviation of the Gaussian noise on the soft labels that a client sends, in "
        "units of dp-clip (0: none)",
    )
    dp_clip: float = Field(
        1.0, gt=0, le=1_000_000, description="largest Euclidean norm of a row before noise is added"
    )
    dp_delta: float = Field(
        1e-5, gt=0, lt=1, description="δ of the (ε, δ)-differential privacy that is accounted for"
    )

    # running
    seed: int = Field(0, ge=0, lt=2**31, description="seed of weights, shuffles and client samples")
    engine: Literal["cohort", "flower"] = Field(
        "cohort", description="cohort: all clients in this process; flower: Flower clients on Ray"
    )
    num_workers: int = Field(
        0, ge=0, description="Ray workers of the cohort engine (0: the clients run in this process)"
    )
    ray_address: OptionalStr = Field(
        None, description="Ray cluster that the workers join (auto: Ray is started on this machine)"
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:N or mps")
    precision: Literal["float32", "tf32", "bfloat16"] = Field(
        "float32", description="arithmetic of the models: exact, or faster on a GPU's tensor cores"
    )
    plan: str = Field(
        "auto",
        description="how models are run: one by one or stacked, and how many at once (auto: measured)",
        json_schema_extra={
            "accepted": "auto, loop, stacked or stacked-BLOCK, with xLANES for so many at once; or "
            "architecture=plan pairs with commas"
        },
    )
    profile: bool = Field(False, description="whether to measure where the time goes, part by part")
    client_cpus: float = Field(1.0, gt=0, description="CPUs a Flower client gets from Ray")
    client_gpus: float = Field(0.0, ge=0, description="GPUs (or a fraction) a Flower client gets")
    run_dir: str = Field("runs", description="folder of the run folders")
    name: OptionalStr = Field(
        None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="name of the run folder"
    )

    def __init__(self, **keys: Any) -> None:
        try:
            super().__init__(**keys)
        except ValidationError as error:
            raise FedkdError(_one_line(error, {})) from None

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_empty_and_truth(cls, value: object, info: ValidationInfo) -> object:
        """Refuse what pydantic would take: true for the number 1, and an empty text."""
        wanted = cls.model_fields[info.field_name or ""].annotation
        if value == "" or (isinstance(value, bool) and wanted is not bool):
            raise ValueError("refused")
        return value

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
    def _contradictions(self) -> Self:
        if self.public != "train" and self.public_labels:
            raise ValueError(
                f"public-labels = true contradicts public = '{self.public}': labels of another data "
                "set name other classes; set public-labels = false"
            )
        if self.momentum and self.optimizer != "sgd":
            raise ValueError(
                f"momentum = {self.momentum} contradicts optimizer = '{self.optimizer}': "
                "set optimizer = 'sgd' or momentum = 0"
            )
        if self.num_workers and self.engine == "flower":
            raise ValueError(
                f"num-workers = {self.num_workers} contradicts engine = 'flower', whose Flower "
                "clients share out the machine by client-cpus; set engine = 'cohort'"
            )
        if self.num_workers > self.num_clients:
            raise ValueError(
                f"num-workers = {self.num_workers} contradicts num-clients = {self.num_clients}: "
                "a worker needs a client"
            )
        if self.ray_address is not None and not self.num_workers:
            raise ValueError(
                f"ray-address = '{self.ray_address}' contradicts num-workers = 0, which uses no Ray; "
                "set num-workers"
            )
        if self.attackers and self.attack == "none":
            raise ValueError(
                f"attackers = {self.attackers} contradicts attack = 'none': name an attack, or set "
                "attackers = 0"
            )
        if self.quorum > self.clients_per_round:
            raise ValueError(
                f"quorum = {self.quorum} contradicts fraction-train = {self.fraction_train} of "
                f"num-clients = {self.num_clients}: only {self.clients_per_round} are asked a round"
            )
        if self.public_size and self.public_per_round and self.public_per_round > self.public_size:
            raise ValueError(
                f"public-per-round = {self.public_per_round} contradicts public-size = "
                f"{self.public_size}: a round cannot draw more than there are"
            )
        return self

    @property
    def clients_per_round(self) -> int:
        """Clients sampled in a round: ``fraction_train`` of all, rounded, at least 1."""
        return max(1, round(self.fraction_train * self.num_clients))

    @property
    def architecture_period(self) -> int:
        """Clients whose numbers differ by a multiple of it have the same architectures."""
        return lcm(len(self.student.split(",")), len(self.teacher.split(",")))

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

    def replace(self, **keys: Any) -> Experiment:
        """Return a changed copy, validated again."""
        return Experiment(**{**self.model_dump(), **keys})

    def smoke(self) -> Experiment:
        """Return a copy shrunk to seconds: the same data set and method, fewer of everything."""
        train_size = min(self.train_size or 600, 600)
        public_size = min(self.public_size or 120, train_size // 5)
        few_clients = self.partition == "pathological"
        return self.replace(
            train_size=train_size,
            test_size=min(self.test_size or 200, 200),
            public_size=public_size,
            public_per_round=self.public_per_round and min(self.public_per_round, public_size),
            # Three clients have to hold ten classes between them.
            classes_per_client=max(self.classes_per_client, 4 if few_clients else 1),
            num_clients=min(self.num_clients, 3),
            num_workers=min(self.num_workers, 3),
            quorum=1,
            num_server_rounds=min(self.num_server_rounds, 2),
            local_epochs=1,
            distill_epochs=1,
        )

    def flat(self) -> dict[str, Scalar]:
        """Return every key in kebab-case with a scalar value, as TOML and messages carry them."""
        return {kebab(k): AUTO if v is None else v for k, v in self.model_dump().items()}

    @classmethod
    def load(cls, *sources: tuple[str, Mapping[str, object]]) -> Experiment:
        """Merge `sources`, later ones winning, and validate the result once.

        Args:
            sources: pairs of where the keys came from (``"experiment.toml"``, ``"command line"``)
                and the keys themselves, in kebab-case or snake_case.

        Raises:
            FedkdError: see the class; the text names the source of the offending key.
        """
        values: dict[str, object] = {}
        origin: dict[str, str] = {}
        for source, keys in sources:
            for name, value in keys.items():
                field = snake(name)
                if field not in cls.model_fields:
                    raise FedkdError(_unknown(name, source))
                values[field] = value
                origin[field] = source
        experiment = cls.__new__(cls)
        try:
            # Not through __init__, which would take the keys to come from Python.
            cls.__pydantic_validator__.validate_python(values, self_instance=experiment)
        except ValidationError as error:
            raise FedkdError(_one_line(error, origin)) from None
        return experiment


def read_toml(path: str | Path) -> tuple[str, dict[str, object]]:
    """Read an experiment file and return it as a source for `Experiment.load`.

    Raises:
        FedkdError: the file cannot be read or is not TOML; the text names the file and the line.
    """
    try:
        keys = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not UTF-8 text"
        raise FedkdError(f"config = {path}: {reason}") from None
    except tomllib.TOMLDecodeError as error:
        raise FedkdError(f"{path} is not valid TOML: {error}") from None
    nested = [name for name, value in keys.items() if isinstance(value, dict | list)]
    if nested:
        raise FedkdError(
            f"{nested[0]} in {path}: experiment files are flat, every value a string, number or "
            "boolean"
        )
    return str(path), keys


def accepted(field: FieldInfo) -> str:
    """Say in words which values a key accepts (``0 to 1``, ``iid, dirichlet, ...``)."""
    if isinstance(field.json_schema_extra, dict):
        return str(field.json_schema_extra["accepted"])
    annotation = field.annotation
    if get_origin(annotation) is Literal:
        return ", ".join(str(choice) for choice in get_args(annotation))
    if annotation is bool:
        return "true, false"
    low, high, kind = _bounds(field)
    if not low and not high:
        return kind
    if low[2:] == high[2:]:
        return low[2:]
    return f"{kind} " + " and ".join(part for part in (low, high) if part)


def _bounds(field: FieldInfo) -> tuple[str, str, str]:
    low = high = ""
    for constraint in field.metadata:
        for name, sign in (("ge", "≥"), ("gt", ">")):
            if (bound := getattr(constraint, name, None)) is not None:
                low = f"{sign} {bound}"
        for name, sign in (("le", "≤"), ("lt", "<")):
            if (bound := getattr(constraint, name, None)) is not None:
                high = f"{sign} {bound}"
    text = str(field.annotation)
    kind = "whole number" if "int" in text else "number" if "float" in text else "text"
    if "None" in text and kind != "text":
        kind = f"auto, or a {kind}"
    return low, high, kind


def _cycle(names: str, client: int) -> str:
    choices = [name.strip() for name in names.split(",")]
    return choices[client % len(choices)]


def _unknown(name: str, source: str) -> str:
    spell = snake if source == "Python" else kebab
    keys = [spell(field) for field in Experiment.model_fields]
    ours = _ALIASES.get(kebab(name))
    hint = f": the key is '{spell(ours)}'" if ours else nearest(spell(name), keys)
    return f"unknown key '{name}' (from {source}){hint or '; `fedkd run --help` lists the keys'}"


def _one_line(error: ValidationError, origin: Mapping[str, str]) -> str:
    """Turn pydantic's report into one line that names key, value, source and what is accepted."""
    return "; ".join(_describe(problem, origin) for problem in _distinct(error.errors()))


def _distinct(problems: Iterable[Any]) -> list[Any]:
    by_key = {problem["loc"][:1]: problem for problem in problems}
    return list(by_key.values())


def _describe(problem: Any, origin: Mapping[str, str]) -> str:
    if not problem["loc"]:
        return str(problem["msg"]).removeprefix("Value error, ")
    name = str(problem["loc"][0])
    source = origin.get(name, "Python")
    field = Experiment.model_fields.get(name)
    if field is None:
        return _unknown(name, source)
    value = problem["input"]
    text = f"{kebab(name)} = {value!r} (from {source}): must be {accepted(field)}"
    if isinstance(value, str) and get_origin(field.annotation) is Literal:
        text += nearest(value, [str(choice) for choice in get_args(field.annotation)])
    if name == "name":
        text += " made of letters, digits, '.', '_' and '-', starting with a letter or digit"
    return text

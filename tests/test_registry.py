"""Strategies are found by name, by module and by file, and every mistake is one line."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import strategies as package
from fedkd import registry
from fedkd.errors import FedkdError
from fedkd.experiment import Experiment
from fedkd.registry import find, strategies, strategy_of
from strategies import DSFL, FedAvg, FedMD, LocalOnly

SOURCE = '''\
from __future__ import annotations

from typing import Literal

from torch import Tensor

from fedkd.knowledge import SoftLabels
from fedkd.strategy import DistillationStrategy, Facts


class Median(DistillationStrategy):
    """Median of logits."""

    facts = Facts("none", "P*C*4", "P*C*4 + P*8")
    order: Literal["low", "high"] = "low"
    share_kept: float = 0.5
    at_least: int = 1
    twice: bool = False

    def aggregate(self, labels: SoftLabels) -> Tensor:
        return labels.values.median(0).values


class NotOne:
    pass
'''


@pytest.fixture(autouse=True)
def clean_modules() -> Iterator[None]:
    """Forget what a test has had imported."""
    before = dict(sys.modules)
    yield
    for name in set(sys.modules) - set(before):
        if not name.startswith(("fedkd", "strategies", "flwr", "torch")):
            del sys.modules[name]
    sys.modules.update(before)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str], Path]:
    def write(name: str, source: str) -> Path:
        path = tmp_path / name
        path.write_text(source)
        return path

    return write


Write = Callable[[str, str], Path]


# --- By name -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "cls"),
    [
        ("DSFL", DSFL),
        ("dsfl", DSFL),
        ("DS-FL", DSFL),
        ("ds_fl", DSFL),
        ("fedmd", FedMD),
        ("FED-MD", FedMD),
        ("FedAvg", FedAvg),
        ("local-only", LocalOnly),
    ],
)
def test_a_name_may_be_spelt_in_any_case_and_with_hyphens(name: str, cls: type) -> None:
    assert type(find(name)) is cls


def test_all_of_ours_are_there() -> None:
    assert set(package.__all__) <= set(strategies())


@pytest.mark.parametrize(("name", "meant"), [("FedMB", "FedMD"), ("fedavgg", "FedAvg")])
def test_a_misspelt_name_gets_the_nearest(name: str, meant: str) -> None:
    with pytest.raises(FedkdError, match=rf"strategy = '{name}'.*did you mean '{meant}'"):
        find(name)


@pytest.mark.parametrize("name", ["", "krum", "none", "__init__"])
def test_an_unknown_name_lists_what_there_is(name: str) -> None:
    with pytest.raises(FedkdError, match=re.escape(", ".join(package.__all__))) as caught:
        find(name)
    assert f"'{name}'" in str(caught.value)


# --- By module and by file -----------------------------------------------------------------------


def test_a_strategy_of_ours_is_found_by_its_module() -> None:
    assert type(find("strategies:DSFL")) is DSFL
    assert type(find("strategies.fedmd:FedMD")) is FedMD


def test_a_strategy_is_found_in_a_file_of_ones_own(write: Write) -> None:
    path = write("median_rule.py", SOURCE)
    strategy = find(f"{path}:Median", "order=high share-kept=0.25 at_least=3 twice=true")
    assert strategy.settings() == {
        "order": "high",
        "share_kept": 0.25,
        "at_least": 3,
        "twice": True,
    }
    assert strategy.name() == "Median"


def test_a_strategy_is_found_in_a_module_of_ones_own(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write("median_module.py", SOURCE)
    monkeypatch.syspath_prepend(str(path.parent))
    assert find("median_module:Median").name() == "Median"


@pytest.mark.parametrize("name", ["strategies.py", "json.py", "torch.py", "fedkd.py"])
def test_a_file_may_be_called_like_a_module(write: Write, name: str) -> None:
    """And that module stays what it is."""
    module = name.removesuffix(".py")
    before = importlib.import_module(module)
    path = write(name, SOURCE)
    assert find(f"{path}:Median").name() == "Median"
    assert sys.modules[module] is before
    assert type(find("DSFL")) is DSFL


def test_a_broken_file_leaves_a_module_of_its_name_alone(write: Write) -> None:
    path = write("json.py", "raise RuntimeError('not today')")
    with pytest.raises(FedkdError, match="not today"):
        find(f"{path}:Median")
    assert "json" in sys.modules


@pytest.mark.parametrize(
    ("source", "wanted", "reason"),
    [
        (SOURCE, "Medan", r"defines no strategy Medan \(did you mean 'Median'\?\)"),
        (SOURCE, "NotOne", r"defines no strategy NotOne.*subclass of fedkd.DistillationStrategy"),
        (SOURCE, "SoftLabels", "defines no strategy SoftLabels"),
        (SOURCE, "DistillationStrategy", "defines no strategy DistillationStrategy"),
        (SOURCE, "", "defines no strategy"),
        ("x = 1\nclass Half(\n", "Half", r"does not import: SyntaxError.*line 2"),
        ("import no_such_thing\n", "Half", "does not import: ModuleNotFoundError"),
        ("1 / 0\n", "Half", "does not import: ZeroDivisionError"),
    ],
    ids=["typo", "other", "knowledge", "base", "empty", "syntax", "import", "raises"],
)
def test_a_file_that_does_not_serve_says_why_in_one_line(
    write: Write, source: str, wanted: str, reason: str
) -> None:
    path = write("own_rule.py", source)
    with pytest.raises(FedkdError, match=reason) as caught:
        find(f"{path}:{wanted}")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FedkdError, match=r"nowhere\.py'.*no such file"):
        find(f"{tmp_path}/nowhere.py:Median")
    with pytest.raises(FedkdError, match="no_such_module does not import"):
        find("no_such_module:Median")


# --- Settings ------------------------------------------------------------------------------------


def test_settings_are_key_value_pairs() -> None:
    assert find("dsfl", "sharpening=mean era-temperature=0.25") == DSFL(
        sharpening="mean", era_temperature=0.25
    )
    assert find("fedmd", "transfer_epochs=7") == FedMD(transfer_epochs=7)
    assert find("dsfl", "none") == DSFL()


@pytest.mark.parametrize(
    ("name", "config", "reason"),
    [
        ("DSFL", "sharpning=mean", r"'sharpning=mean'.*did you mean 'sharpening'.*era-temperature"),
        ("DSFL", "sharpening", r"'sharpening' has no value: write sharpening=VALUE"),
        ("DSFL", "sharpening=man", r"sharpening = 'man'.*era, mean.*did you mean 'mean'"),
        ("DSFL", "era-temperature=cold", r"era-temperature = 'cold' of DSFL: must be .*number"),
        (
            "FedMD",
            "transfer-epochs=2.5",
            r"transfer-epochs = '2.5' of FedMD: must be .*whole number",
        ),
        ("FedAvg", "mu=0.1", r"'mu=0.1' is not a setting of FedAvg.*settings: none"),
        ("FedMD", "digest=mae, transfer-epochs=2", "digest = 'mae,'"),
    ],
)
def test_a_wrong_setting_is_named_with_what_is_accepted(
    name: str, config: str, reason: str
) -> None:
    with pytest.raises(FedkdError, match=reason):
        find(name, config)


def test_settings_of_a_users_strategy_have_the_types_of_its_fields(write: Write) -> None:
    path = write("typed_rule.py", SOURCE)
    for config, reason in {
        "twice=perhaps": "twice = 'perhaps' of Median: must be true, false",
        "order=middle": "order = 'middle' of Median: must be low, high",
        "at-least=many": "at-least = 'many' of Median: must be .*whole number",
    }.items():
        with pytest.raises(FedkdError, match=reason):
            find(f"{path}:Median", config)


# --- With an experiment --------------------------------------------------------------------------


def test_an_experiment_gets_its_strategy_with_its_settings() -> None:
    experiment = Experiment(strategy="ds-fl", strategy_config="sharpening=mean")
    assert strategy_of(experiment) == DSFL(sharpening="mean")


def test_a_strategy_that_needs_labels_refuses_an_experiment_without(write: Write) -> None:
    needy = SOURCE.replace('"P*C*4 + P*8")', '"P*C*4 + P*8", public_labels=True)')
    path = write("needy_rule.py", needy)
    keys: dict[str, Any] = {"strategy": f"{path}:Median"}
    strategy_of(Experiment(**keys))
    with pytest.raises(FedkdError, match="public-labels = false: Median needs the labels"):
        strategy_of(Experiment(public_labels=False, **keys))


# --- Who else is there ---------------------------------------------------------------------------


def installed(*points: tuple[str, str]) -> Callable[..., list[EntryPoint]]:
    return lambda group: [EntryPoint(name, value, group) for name, value in points]


@pytest.fixture
def theirs(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put somebody else's module with a strategy `Median` where Python looks."""
    monkeypatch.syspath_prepend(str(write("their_rule.py", SOURCE).parent))


@pytest.mark.usefixtures("theirs")
def test_installed_strategies_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "entry_points", installed(("Median", "their_rule:Median")))
    assert strategies()["Median"] is type(find("median"))
    assert find("median").__class__.__module__ == "their_rule"


@pytest.mark.usefixtures("theirs")
@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        (
            "Theirs",
            "no_such_module:X",
            r"\(no_such_module:X\) does not import: ModuleNotFoundError",
        ),
        ("Theirs", "their_rule:NotOne", r"\(their_rule:NotOne\) is not a strategy"),
        ("Theirs", "their_rule:Median", "have the name of its class: Median = 'their_rule:Median'"),
        ("DSFL", "strategies:DSFL", "DSFL .*has the same name as one of fedkd's own"),
    ],
    ids=["missing", "other", "renamed", "ours"],
)
def test_an_installed_strategy_that_does_not_serve_is_named_and_leaves_others_alone(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, reason: str
) -> None:
    monkeypatch.setattr(registry, "entry_points", installed((name, value)))
    with pytest.raises(FedkdError, match=reason):
        strategies()
    if name != "DSFL":
        with pytest.raises(FedkdError, match=reason):
            find(name)
    assert type(find("DSFL")) is DSFL
    assert type(find("FedMD")) is FedMD


def test_another_package_of_the_same_name_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    foreign = ModuleType("strategies")
    foreign.__file__ = str(tmp_path / "strategies" / "__init__.py")
    monkeypatch.setitem(sys.modules, "strategies", foreign)
    with pytest.raises(FedkdError, match=rf"'strategies' in {tmp_path} hides fedkd's own"):
        find("DSFL")


def test_a_file_without_a_class_is_answered_with_how_to_name_one() -> None:
    with pytest.raises(FedkdError, match=r"name a class of the file, as in my_rule\.py:MyStrategy"):
        find("my_rule.py")


def test_a_setting_without_a_default_is_named(tmp_path: Path) -> None:
    path = tmp_path / "bare_rule.py"
    path.write_text(
        "from fedkd import DistillationStrategy\nfrom fedkd.strategy import Facts\n\n\n"
        "class Bare(DistillationStrategy):\n"
        '    facts = Facts(paper="none", up="P*C*4", down="P*C*4 + 2*I")\n    warmth: float\n'
    )
    with pytest.raises(FedkdError, match="its setting warmth needs a default"):
        find(f"{path}:Bare")


# --- Settings that a subclass changes -------------------------------------------------------------

CHANGED = """
from strategies import FedProx
class Loose:
    mu = 3.0
class Typed(FedProx):
    mu: float = 0.7
class Typed2(Typed):
    closes = "revisit"
"""


def test_a_subclass_changes_a_setting_with_its_type(tmp_path: Path) -> None:
    file = tmp_path / "changed_mu.py"
    file.write_text(CHANGED)
    assert find(f"{file}:Typed").settings() == {"mu": 0.7}
    assert find(f"{file}:Typed2").settings() == {"mu": 0.7}


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("class Mine(FedProx):\n    mu = 0.7\n", "0.7"),
        ("class Mine(Loose, FedProx):\n    pass\n", "3.0"),
        ("class Mine(Typed2):\n    mu = 0.01\n", "0.01"),
    ],
)
def test_a_setting_that_would_be_ignored_is_refused(line: str, value: str, tmp_path: Path) -> None:
    file = tmp_path / "ignored_mu.py"
    file.write_text(CHANGED + line)
    expected = rf"Mine changes the setting mu of .* without its type.* = {value} \(ignored_mu.py"
    with pytest.raises(FedkdError, match=expected):
        find(f"{file}:Mine")

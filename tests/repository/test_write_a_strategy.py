"""A user's own strategy: what the page says works, clients run its code, and its errors are its own."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from federation_tools import call_client_app, tiny
from flwr.app import Message, RecordDict
from paths import ROOT

import fedkd
from fedkd.cli import main
from fedkd.clients.instructions import Instruction
from fedkd.engines.preflight import check
from fedkd.errors import FedkdError
from fedkd.experiment import Experiment
from fedkd.federation.flower_internals.replies import failure_reason
from fedkd.federation.messages import (
    HELLO,
    TRAIN,
    decode_introduction,
    encode_instruction,
    experiment_record,
)
from fedkd.phases import Fit
from fedkd.records import Run
from fedkd.records.callbacks import EachRound
from fedkd.registry import find, reproducible_keys, strategy_of
from fedkd.user_code import fingerprint

PAGE = (ROOT / "docs/write-a-strategy.md").read_text(encoding="utf-8")

SMALL: dict[str, Any] = {
    "dataset": "digits",
    "num_clients": 3,
    "num_server_rounds": 2,
    "public_size": 97,
    "public_labels": False,
    "min_partition_size": 11,
    "device": "cpu",
}

OWN = '''\
from __future__ import annotations

import torch
from torch import Tensor

from fedkd import DistillationStrategy, SoftLabels
from fedkd.losses import Step, kl_divergence, term
from fedkd.phases import Apply, Digest, LocalClient, Phase, Predict, Revisit, procedure
from fedkd.strategy import Facts


@procedure
def halve(client: LocalClient, share: float) -> None:
    """Choose some samples, by chance."""
    chance = torch.rand(len(client.public), generator=client.generator("half"))
    client.state["some"] = chance < share


@term(needs="soft-labels")
def doubled(step: Step) -> Tensor:
    """Twice the divergence."""
    return 2 * kl_divergence(step.teacher_logits, step.logits, step.numbers["tau"])


class Own(DistillationStrategy):
    """With a term and a procedure of its own."""

    facts = Facts("none", "<= P*C*4 + P*4", "P*C*4 + I")

    def phases(self, round: int) -> list[Phase]:
        choose = Apply(halve, {"share": 0.5})
        return [choose, Digest(doubled), Revisit(), Predict("probabilities", only="some")]

    def aggregate(self, labels: SoftLabels) -> Tensor:
        return labels.mean_probabilities()
'''


@pytest.fixture(autouse=True)
def clean_modules(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Work in an empty folder, and forget what a test has had imported from there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        file = getattr(sys.modules[name], "__file__", None)
        if file and Path(file).is_relative_to(tmp_path):
            del sys.modules[name]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder where Python does not look for modules."""
    path = tmp_path / "else where"
    path.mkdir()
    return path


# --- What the page says ---------------------------------------------------------------------------


@pytest.mark.slow
def test_the_page_works_as_it_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    """Every block of Python becomes a file, every command runs, on fewer images where it can."""
    blocks = re.findall(r'```python\n("""(\S+\.py)""".*?)```', PAGE, re.DOTALL)
    assert len(blocks) == PAGE.count("```python")
    for source, name in blocks:
        Path(name).write_text(source, encoding="utf-8")
    commands = re.findall(r"^    (fedkd [a-z].*)$", PAGE, re.MULTILINE)
    assert {command.split()[1] for command in commands} == {"check", "run", "compare"}
    for command in commands:
        words = shlex.split(command)[1:]
        main([*words, "--quiet"] if words[0] == "check" else [*words, "--smoke", "--quiet"])
    assert "Confident" in capsys.readouterr().out
    runs = [Run.load(path.parent) for path in sorted(Path("runs").glob("*/rounds.jsonl"))]
    assert len(runs) == sum("run" in command.split()[1] for command in commands) + 3
    assert all(row["dropped"] == {} for run in runs for row in run.rounds)
    shares = {run.path.name: run.bytes_up for run in runs if "teach" in run.path.name}
    assert len(set(shares.values())) == len(shares) == 2


def test_the_page_shows_the_strategy_of_the_file_to_copy() -> None:
    """In which the power is a setting."""
    (page,) = re.findall(r"class Confident.*?sum\(0\)\n", PAGE, re.DOTALL)
    script = (ROOT / "simulations/new_strategy.py").read_text(encoding="utf-8")
    Path("page.py").write_text(PAGE.split('```python\n"""my_strategy.py"""')[1].split("```")[0])
    ours, theirs = find("page.py:Confident"), find(f"{ROOT}/simulations/new_strategy.py:Confident")
    labels = fedkd.SoftLabels(torch.randn(3, 5, 7), "logits", mask=torch.rand(3, 5) < 0.9)
    torch.testing.assert_close(ours.aggregate(labels), theirs.aggregate(labels))
    assert page.splitlines()[0] in script.replace("fedkd.", "")


def test_the_file_to_copy_compares_a_strategy_that_stands_in_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["new_strategy.py", "--smoke"])
    runpy.run_path(str(ROOT / "simulations/new_strategy.py"), run_name="__main__")
    table = capsys.readouterr().out
    assert all(name in table for name in ("local only", "DSFL", "Confident"))
    run = Run.load(Path("runs/confident-mnist-5k-seed0"))
    assert len(run.rounds) == 2


# --- Where it stands ------------------------------------------------------------------------------


@pytest.mark.parametrize("relative", [True, False])
def test_a_strategy_in_a_file_brings_its_own_code(folder: Path, relative: bool) -> None:
    path = folder / "own_a.py"
    path.write_text(OWN)
    name = f"{path.relative_to(Path.cwd()) if relative else path}:Own"
    run = fedkd.run(Experiment(strategy=name, **SMALL))
    assert [row["dropped"] for row in run.rounds] == [{}, {}]
    assert (run.experiment.strategy, run.experiment.client_code) == (
        f"{path.absolute()}:Own",
        "own_a",
    )
    again = fedkd.run(run.experiment.replace(name="again"))
    assert again.client_accuracy == run.client_accuracy


def test_one_by_one_and_stacked_are_the_same(folder: Path) -> None:
    (folder / "own_b.py").write_text(OWN)
    experiment = Experiment(strategy=f"{folder}/own_b.py:Own", **SMALL)
    stacked, loop = (fedkd.run(experiment.replace(plan=plan)) for plan in ("stacked", "loop"))
    assert stacked.client_accuracy == pytest.approx(loop.client_accuracy, abs=0.011)
    assert stacked.bytes_up == loop.bytes_up


@pytest.mark.ray
@pytest.mark.slow
def test_on_ray_it_is_the_same(folder: Path) -> None:
    """As Flower clients, from a folder where Python does not look and without any further key."""
    (folder / "own_c.py").write_text(OWN)
    keys = SMALL | {"strategy": f"{folder.name}/own_c.py:Own", "plan": "loop"}
    here = fedkd.run(Experiment(**keys, name="here"))
    there = fedkd.run(Experiment(**keys, name="there", engine="flower"))
    assert [row["dropped"] for row in there.rounds] == [{}, {}]
    assert there.client_accuracy == here.client_accuracy
    assert there.bytes_up == here.bytes_up


def test_a_file_that_has_changed_is_read_again(folder: Path) -> None:
    path = folder / "own_d.py"
    path.write_text(OWN)
    first, same = (type(find(f"{path}:Own")) for _ in range(2))
    assert first is same
    before = fingerprint(["own_d"])
    path.write_text(OWN.replace("class Own", "class Other").replace("2 *", "3 *"))
    assert find(f"{path}:Other").name() == "Other"
    assert fingerprint(["own_d"]) != before


def test_the_digest_covers_a_users_file(folder: Path) -> None:
    (folder / "own_e.py").write_text(OWN)
    experiment = Experiment(strategy=f"{folder}/own_e.py:Own", **SMALL)
    keys = reproducible_keys(experiment, strategy_of(experiment))
    assert keys["client_code"] == "own_e"
    named = experiment.replace(**keys)
    assert fingerprint(named.client_modules) != fingerprint(experiment.client_modules)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return a module with `OWN` that is `__main__`, as in a script that is run."""
    module = ModuleType("__main__")
    module.__file__ = "script.py"
    module.__spec__ = None
    monkeypatch.setitem(sys.modules, "__main__", module)
    exec(compile(OWN, "script.py", "exec", dont_inherit=True), module.__dict__)
    Path("script.py").write_text(OWN)
    return module


@pytest.mark.usefixtures("script")
def test_a_script_brings_its_own_code_in_this_process() -> None:
    run = fedkd.run(Experiment(strategy="__main__:Own", **SMALL, name="script"))
    assert [row["dropped"] for row in run.rounds] == [{}, {}]
    assert run.experiment.strategy == "script.py:Own"  # where it is found when the script is over
    again = fedkd.run(run.experiment.replace(name="again"))
    assert again.client_accuracy == run.client_accuracy


@pytest.mark.usefixtures("script")
@pytest.mark.parametrize("keys", [{"engine": "flower"}, {"num_workers": 2}])
def test_a_scripts_own_code_cannot_reach_workers(keys: dict[str, Any]) -> None:
    experiment = Experiment(strategy="__main__:Own", **SMALL, **keys)
    with pytest.raises(FedkdError, match=r"__main__:halve.*move it to a module"):
        check(experiment)


def test_code_in_a_file_called_like_a_module_cannot_reach_workers(folder: Path) -> None:
    (folder / "json.py").write_text(OWN)
    experiment = Experiment(strategy=f"{folder}/json.py:Own", **SMALL)
    check(experiment)
    with pytest.raises(FedkdError, match=r"json\.py:Own'.*rename the file"):
        check(experiment.replace(engine="flower"))


# --- Whose code a client runs ---------------------------------------------------------------------


def asked(experiment: Experiment, kind: str, phases: tuple[Fit, ...] = (), **node: Any) -> Message:
    """Call a Flower client as Flower does, outside a simulation unless that is faked."""
    nothing = torch.empty(0, dtype=torch.int64)
    instruction = Instruction(
        client=0, round=1, base=0, phases=phases, asked=nothing, evaluate="none"
    )
    content = RecordDict({"experiment": experiment_record(experiment)})
    if kind == TRAIN:
        content = encode_instruction(instruction, experiment_record(experiment), {}, {})
    return call_client_app(content, kind, node)


@pytest.fixture
def own_module(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the name of a module that can be imported, with a term of its own."""
    (folder / "own_rules.py").write_text(
        OWN.replace('needs="soft-labels"', "needs=None").replace(
            'kl_divergence(step.teacher_logits, step.logits, step.numbers["tau"])',
            "step.logits.square().mean(-1)",
        )
    )
    monkeypatch.syspath_prepend(str(folder))
    return "own_rules"


DOUBLED = (Fit("revisit", private={"own_rules:doubled": 1.0}),)


def simulated(monkeypatch: pytest.MonkeyPatch, actor: str | None) -> None:
    """Have this process look like one that Ray runs in, as an actor or not."""
    ray = SimpleNamespace(
        is_initialized=lambda: True,
        get_runtime_context=lambda: SimpleNamespace(get_actor_id=lambda: actor),
    )
    monkeypatch.setitem(sys.modules, "ray", ray)


def test_in_a_simulation_the_experiment_says_what_code_runs(
    own_module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulated(monkeypatch, "ab12")
    experiment = tiny(client_code=own_module, name="simulated")
    reply = asked(experiment, HELLO)
    assert decode_introduction(reply.content).sources == fingerprint(experiment.client_modules)
    assert not asked(experiment, TRAIN, DOUBLED).has_error()
    without = asked(tiny(name="without"), TRAIN, DOUBLED)
    assert "only runs code of" in failure_reason(without)


@pytest.mark.parametrize("driver", [False, True], ids=["no ray", "a driver of ray"])
def test_in_a_deployment_the_node_says_what_code_runs(
    own_module: str, driver: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if driver:
        simulated(monkeypatch, None)
    claiming = tiny(client_code=own_module, name="claiming")
    refusing: list[dict[str, Any]] = [{}, {"client-code": "none"}, {"client-code": "own_rule,own"}]
    for node in refusing:
        for kind in (HELLO, TRAIN):
            said = failure_reason(asked(claiming, kind, DOUBLED, **node))
            assert f"client-code of the run names {own_module}" in said, (node, kind)
            assert "--node-config" in said
    silent = asked(tiny(name="silent"), TRAIN, DOUBLED)
    assert "only runs code of" in failure_reason(silent)
    allowed: dict[str, Any] = {"client-code": f"other_rules, {own_module}"}
    for experiment in (claiming, tiny(name="allowed")):
        assert not asked(experiment, TRAIN, DOUBLED, **allowed).has_error()
    reply = asked(claiming, HELLO, **allowed)
    assert decode_introduction(reply.content).sources == fingerprint(claiming.client_modules)


@pytest.mark.parametrize("key", ["dataset", "public", "student", "teacher"])
def test_in_a_deployment_data_and_models_go_by_the_nodes_list(key: str) -> None:
    """Or a server could have any function of any module called."""
    keys: dict[str, Any] = {key: "os:system", "public_labels": False, "name": "evil"}
    for kind in (HELLO, TRAIN):
        said = failure_reason(asked(tiny(**keys), kind))
        assert f"{key} of the run names os" in said


# --- Errors ---------------------------------------------------------------------------------------

HEAD = """\
import torch
from fedkd import DistillationStrategy
from fedkd.losses import ce, term
from fedkd.phases import Apply, Digest, Predict, Revisit, procedure
from fedkd.strategy import Facts


@term(needs=None)
def slips(step):
    raise ValueError("oh")


@procedure
def trips(client):
    raise ValueError("oh")


class Bad(DistillationStrategy):
    facts = Facts("none", "P*C*4", "P*C*4")

    def aggregate(self, labels):
        return labels.mean_logits()

"""
LINE = HEAD.count("\n") + 2
"""Where the body of a method stands that follows `HEAD`."""


def bad(folder: Path, method: str) -> Experiment:
    """Return an experiment with a strategy of which one method is not right."""
    (folder / "bad_rule.py").write_text(HEAD + method)
    return Experiment(strategy=f"{folder}/bad_rule.py:Bad", **SMALL)


@pytest.mark.parametrize(
    ("method", "where"),
    [
        ("phases(self, round)", "phases of Bad, round 1: "),
        ("wire(self)", "wire of Bad: "),
        ("request(self, server)", "request of Bad, round 1: "),
        ("aggregate(self, labels)", "update of Bad, round 1, clients 0, 1, 2: "),
        ("update(self, replies, server)", "update of Bad, round 1, clients 0, 1, 2: "),
        ("personalise(self, knowledge, client, server)", "personalise of Bad, round 2, client 0: "),
    ],
)
@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("        {}['x']\n", "KeyError: 'x'"),
        ("        torch.ones(2) @ torch.ones(3)\n", "RuntimeError: .*"),
    ],
    ids=["python", "torch"],
)
def test_what_a_method_raises_has_its_place(
    folder: Path, method: str, where: str, body: str, said: str
) -> None:
    experiment = bad(folder, f"    def {method}:\n{body}")
    with pytest.raises(
        FedkdError, match=rf"^{where}{said} \(bad_rule\.py, line {LINE}\)$"
    ) as error:
        fedkd.run(experiment)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        (
            "phases(self, round):\n        return Revisit()",
            "phases of Bad, round 1: Fit.*not a list",
        ),
        ("phases(self, round):\n        return None", "phases of Bad, round 1: None is not a list"),
        (
            "phases(self, round):\n        return [Revisit({lambda step: 0: 1.0})]",
            rf"phases of Bad, round 1: .*neither a loss term .*\.py, line {LINE}\)",
        ),
        (
            "phases(self, round):\n        @term(needs=None)\n        def inner(step): return 0\n"
            "        return [Revisit({inner: 1.0})]",
            rf"phases of Bad, round 1: .*pass what varies as numbers \(.*\.py, line {LINE + 2}\)",
        ),
        (
            "phases(self, round):\n        return [Apply(trips, {'x': torch.ones(3)}), Predict()]",
            "phases of Bad, round 1: numbers of apply: x = tensor.* must be a finite number",
        ),
        (
            "wire(self):\n        return None",
            "wire of Bad: None is not two of fedkd.knowledge.Wire",
        ),
    ],
    ids=["phase", "nothing", "lambda", "closure", "numbers", "wire"],
)
def test_what_a_method_says_wrongly_is_refused_before_anything_runs(
    folder: Path, method: str, reason: str
) -> None:
    with pytest.raises(FedkdError, match=reason):
        check(bad(folder, f"    def {method}\n"))


@pytest.mark.parametrize("plan", ["stacked", "loop"])
def test_what_client_code_raises_has_its_place(folder: Path, plan: str) -> None:
    phases = "[Apply(trips), Revisit(), Predict()]"
    experiment = bad(folder, f"    def phases(self, round):\n        return {phases}\n")
    rows: list[Any] = []
    with pytest.raises(FedkdError, match=r"round 3: .*ValueError: oh \(bad_rule\.py, line 15"):
        fedkd.run(experiment.replace(plan=plan, num_server_rounds=5), [EachRound(rows.append)])
    reasons = rows[0]["dropped"]
    assert list(reasons) == ["0", "1", "2"]
    assert all(
        re.fullmatch(r"ValueError: oh \(bad_rule\.py, line 15\)", r) for r in reasons.values()
    )


def test_what_a_term_raises_is_found_before_the_run(folder: Path) -> None:
    phases = "[Revisit({ce: 1.0, slips: 1.0}), Predict()]"
    experiment = bad(folder, f"    def phases(self, round):\n        return {phases}\n")
    with pytest.raises(
        FedkdError, match=r"^bad_rule:slips raises ValueError: oh \(bad_rule\.py, line 10"
    ):
        fedkd.run(experiment)


def test_a_long_reason_keeps_its_place(folder: Path) -> None:
    """Though a client's reason is cut where it is too long."""
    body = "        raise ValueError('oh' * 500)\n"
    path = folder / "bad_rule.py"
    path.write_text(
        HEAD.replace('    raise ValueError("oh")\n', body[4:])
        + "    def phases(self, round):\n        return [Apply(trips), Revisit(), Predict()]\n"
    )
    rows: list[Any] = []
    with pytest.raises(FedkdError, match="no quorum"):
        fedkd.run(
            Experiment(**SMALL | {"strategy": f"{path}:Bad", "num_server_rounds": 3}),
            [EachRound(rows.append)],
        )
    assert all(r.endswith("(bad_rule.py, line 15)") for r in rows[0]["dropped"].values())


def test_a_term_of_another_shape_is_refused(folder: Path) -> None:
    """Instead of being spread over the batch."""
    path = folder / "bad_rule.py"
    path.write_text(
        HEAD.replace('raise ValueError("oh")', "return step.logits.amax(-1, keepdim=True)", 1)
        + "    def phases(self, round):\n        return [Revisit({slips: 1.0}), Predict()]\n"
    )
    with pytest.raises(FedkdError, match=r"bad_rule:slips returns \[5, 1\] for 5 samples"):
        fedkd.run(Experiment(**SMALL | {"strategy": f"{path}:Bad", "num_server_rounds": 3}))


def test_our_own_refusals_have_the_users_place(folder: Path) -> None:
    """As of labels that do not fit together."""
    experiment = bad(
        folder,
        "    def aggregate(self, labels):\n"
        "        return type(labels)(labels.values, labels.space, labels.samples[1:])\n",
    )
    with pytest.raises(FedkdError, match=rf"^update of Bad, .*samples of .*line {LINE}\)$"):
        fedkd.run(experiment)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("\n\n1 / 0\n", r"ZeroDivisionError: division by zero \(broken_a\.py, line 3\)"),
        ("\nclass Half(\n", r"SyntaxError: .*broken_a\.py, line 2\)"),
        ("import no_such_thing\n", r"ModuleNotFoundError: .*no_such_thing.*broken_a\.py, line 1\)"),
        (
            HEAD + "    power: int = torch.ones('x')\n",
            rf"TypeError: .* \(broken_a\.py, line {LINE - 1}\)",
        ),
    ],
    ids=["raises", "syntax", "import", "field"],
)
@pytest.mark.parametrize("by", ["file", "module"])
def test_what_an_import_raises_has_its_place(
    folder: Path, monkeypatch: pytest.MonkeyPatch, source: str, said: str, by: str
) -> None:
    (folder / "broken_a.py").write_text(source)
    monkeypatch.syspath_prepend(str(folder))
    name = f"{folder}/broken_a.py" if by == "file" else "broken_a"
    with pytest.raises(FedkdError, match=rf"does not import: {said}") as error:
        find(f"{name}:Bad")
    assert "\n" not in str(error.value)

"""The command line: one line for every mistake, the same keys as everywhere, results for machines."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from sklearn.datasets import load_digits

import fedkd
from fedkd.cli import main
from fedkd.data import DATASETS
from fedkd.errors import FedkdError, Setting
from fedkd.experiment import Experiment
from fedkd.keys import accepted, kebab
from fedkd.records import Run
from fedkd.reports.findings.diagnose import findings

COMMAND = [sys.executable, "-c", "from fedkd.cli import main; main()"]
SMALL = ["--dataset", "digits", "--smoke"]


@pytest.fixture(autouse=True)
def here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Work in an empty folder, with the cache elsewhere."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("FEDKD_DATA_DIR", str(tmp_path_factory.getbasetemp() / "cli-data"))
    return folder


class Cli:
    """Runs commands in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *argv: str) -> str:
        """Return what a command that goes well writes to stdout."""
        main(argv)
        return self._capsys.readouterr().out

    def json(self, *argv: str) -> Any:
        return json.loads(self(*argv, "--json"))

    def error(self, *argv: str) -> str:
        """Return the one line of a command that is refused before it writes anything."""
        before = sorted(Path().rglob("*"))
        with pytest.raises(SystemExit) as exit_:
            main(argv)
        out, err = self._capsys.readouterr()
        assert exit_.value.code == 2
        assert out == ""
        assert err.startswith("fedkd: ")
        assert err.endswith("\n")
        assert err.count("\n") == 1
        assert sorted(Path().rglob("*")) == before
        return err.removeprefix("fedkd: ").rstrip("\n")


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    return Cli(capsys)


# --- Errors ---------------------------------------------------------------------------------------

WRONG = {
    "run --temperature 3": "unknown key 'temperature' (from --temperature): the key is 'tau'",
    "run --lr=0.1": "unknown key 'lr' (from --lr): the key is 'learning-rate'",
    "central --alhpa 0.5": "unknown key 'alhpa' (from --alhpa) (did you mean 'alpha'?)",
    "compare --no-public-labels": (
        "unknown key 'no-public-labels' (from --no-public-labels) (did you mean 'public-labels'?)"
    ),
    "run --xyz 1": "unknown key 'xyz' (from --xyz); `fedkd run --help` lists the keys",
    "run --quite": "unknown option --quite (did you mean '--quiet'?)",
    "central --seedss 1": "unknown option --seedss (did you mean '--seeds'?)",
    "strategies --alpha 1": "unknown option --alpha; `fedkd strategies --help` lists them",
    "rum --alpha 1": (
        "unknown command 'rum' (did you mean 'run'?); the commands are run, central, compare, sweep, "
        "report, list, diff, export, strategies, cite, check, data"
    ),
    "run alpha=0.5": (
        "unexpected argument 'alpha=0.5' (did you mean '--alpha 0.5'?); `fedkd run --help` lists "
        "its options"
    ),
    "run a.toml": (
        "unexpected argument 'a.toml' (did you mean '--config a.toml'?); `fedkd run --help` lists "
        "its options"
    ),
    "run --alpha": "--alpha has no value: must be number ≥ 0 and ≤ 1",
    "run --alpha --json": "--alpha has no value: must be number ≥ 0 and ≤ 1",
    "run --config": "--config has no value: `fedkd run --help` lists its values",
    "run --alpha 7": "alpha = '7' (from --alpha): must be number ≥ 0 and ≤ 1",
    "run --alpha=-0.1": "alpha = '-0.1' (from --alpha): must be number ≥ 0 and ≤ 1",
    "run --tau 0": "tau = '0' (from --tau): must be number > 0 and ≤ 1000",
    "central --batch-size x": "batch-size = 'x' (from --batch-size): must be whole number ≥ 1",
    "run --public-labels maybe": "public-labels = 'maybe' (from --public-labels): must be true, false",
    "compare --partition dirichlett": (
        "partition = 'dirichlett' (from --partition): must be iid, dirichlet, shard, pathological "
        "(did you mean 'dirichlet'?)"
    ),
    "run --alpha 7 --tau x": (
        "alpha = '7' (from --alpha): must be number ≥ 0 and ≤ 1; "
        "tau = 'x' (from --tau): must be number > 0 and ≤ 1000"
    ),
    "run --momentum 0.9": (
        "momentum = 0.9 (from --momentum) has no effect with optimizer = 'adam' (the default): "
        "set optimizer = 'sgd', or momentum = 0.0"
    ),
    "central --preset mnist-mlp --momentum .5": (
        "momentum = 0.5 (from --momentum) has no effect with optimizer = 'adam' "
        "(from --preset mnist-mlp): set optimizer = 'sgd', or momentum = 0.0"
    ),
    "run --partition iid --partition-alpha 0.1": (
        "partition-alpha = 0.1 (from --partition-alpha) has no effect with partition = 'iid' "
        "(from --partition): set partition = 'dirichlet', or partition-alpha = 0.3"
    ),
    "run --grad-clip 1": "unknown key 'grad-clip' (from --grad-clip): gradients are not clipped",
    "run --lr-decay 1": (
        "unknown key 'lr-decay' (from --lr-decay); `fedkd run --help` lists the keys"
    ),
    "run --batchsize 7": (
        "unknown key 'batchsize' (from --batchsize) (did you mean 'batch-size'?)"
    ),
    "run --quorum 5 --num-clients 3": (
        "quorum = 5 (from --quorum) contradicts fraction-train = 1.0 (the default) of "
        "num-clients = 3 (from --num-clients): only 3 are drawn per round"
    ),
    "run --public fashion-mnist": (
        "public-labels = true (the default) contradicts public = 'fashion-mnist' (from --public): "
        "labels of another data set name other classes; set public-labels = false"
    ),
    "central --dataset digits": (
        "teacher = 'none' (the default): the central baseline needs a teacher, such as 'mlp-800'"
    ),
    "central --seeds 0,x": ("seed = 'x' (from --seeds): must be whole number ≥ 0 and < 2147483648"),
    "compare --seeds=-1,2": (
        "seed = '-1' (from --seeds): must be whole number ≥ 0 and < 2147483648"
    ),
    "compare --seeds 0,1 --num-seeds 3": (
        "seeds = '0,1' contradicts num-seeds = '3': give one of the two"
    ),
    "sweep --vary tau=1,2 --num-seeds 0": (
        "num-seeds = '0' (from --num-seeds): must be a whole number ≥ 1"
    ),
    "central --seeds 3,4,3": "seeds = '3,4,3' (from --seeds): give each seed once",
}


@pytest.mark.parametrize("line", WRONG)
def test_mistakes_are_answered_with_key_value_source_and_what_is_accepted(
    cli: Cli, line: str
) -> None:
    assert cli.error(*line.split()) == WRONG[line]


BEGINNINGS = {
    "run --strategy FedMDD": (
        "strategy = 'FedMDD' (from --strategy): no such strategy (did you mean 'FedMD'?); there are "
        "CFD, COMET, "
    ),
    "run --strategy-config digset=kl": (
        "strategy-config = 'digset=kl' (from --strategy-config): 'digset=kl' is not a setting of "
        "FedMD (did you mean 'digest'?); settings: digest, transfer-epochs"
    ),
    "run --dataset digist": (
        "dataset = 'digist' (from --dataset): no such data set (did you mean 'digits'?)"
    ),
    "run --dataset digits --student mlp-20,lenett": (
        "student = 'lenett' (from --student): unknown model 'lenett' (did you mean 'lenet'?)"
    ),
    "run --preset mnist_mlp": "preset = 'mnist_mlp': no such preset (did you mean 'mnist-mlp'?)",
    "compare --methods fedmd,fedavgg --dataset digits": (
        "methods: no method 'fedavgg' (did you mean 'FedAvg'?)"
    ),
    "run --device cuba": "device = 'cuba' (from --device): ",
    "run --dataset digits --public-per-round 500": "public-per-round = 500 (from --public-per-round)",
    "data mnits": "dataset = 'mnits': no such data set (did you mean 'mnist'?)",
    "run --config nope.toml": "config = nope.toml: No such file",
}


@pytest.mark.parametrize("line", BEGINNINGS)
def test_names_that_are_not_there_are_answered_with_the_nearest(cli: Cli, line: str) -> None:
    assert cli.error(*line.split()).startswith(BEGINNINGS[line])


FILES = {
    "alpha = 0.5\ntau 4\n": "my.toml is not valid TOML: Expected '=' after a key in a key/value pair",
    "temperature = 4\n": "unknown key 'temperature' (from my.toml): the key is 'tau'",
    "alpha = 1.5\n": "alpha = 1.5 (from my.toml): must be number ≥ 0 and ≤ 1",
    "[data]\nalpha = 1\n": "data in my.toml: experiment files are flat",
    "momentum = 0.5\n": (
        "momentum = 0.5 (from my.toml) has no effect with optimizer = 'adam' (the default)"
    ),
    'strategy = "FedMDD"\n': "strategy = 'FedMDD' (from my.toml): no such strategy",
}


@pytest.mark.parametrize("text", FILES)
def test_mistakes_in_a_file_name_the_file(cli: Cli, here: Path, text: str) -> None:
    (here / "my.toml").write_text(text)
    assert cli.error("run", "--config", "my.toml").startswith(FILES[text])


def test_a_syntax_error_in_a_file_is_located(cli: Cli, here: Path) -> None:
    (here / "my.toml").write_text("alpha = 0.5\ntau = = 4\n")
    assert "line 2" in cli.error("central", "--config", "my.toml")


def test_a_strategy_file_that_does_not_import_is_one_line(cli: Cli, here: Path) -> None:
    (here / "mine.py").write_text("from fedkd import DistillationStrategy\nclass Mine(:\n")
    text = cli.error("run", "--dataset", "digits", "--strategy", "mine.py:Mine")
    assert text.startswith(
        "strategy = 'mine.py' (from --strategy): the file does not import: SyntaxError: "
    )
    assert "line 2" in text


def test_a_strategy_file_that_is_not_there_is_one_line(cli: Cli) -> None:
    text = cli.error("run", "--strategy", "absent.py:Mine")
    assert text == "strategy = 'absent.py' (from --strategy): there is no such file"


@pytest.mark.parametrize("command", ["run", "central"])
def test_an_existing_run_folder_is_refused_and_left_alone(
    cli: Cli, here: Path, command: str
) -> None:
    (here / "runs" / "mine").mkdir(parents=True)
    (here / "runs" / "mine" / "notes.txt").touch()
    text = cli.error(command, *SMALL, "--teacher", "mlp-64", "--name", "mine")
    assert text == (
        f"name = 'mine' (from --name): the run folder {Path('runs/mine')} exists; choose another "
        "name, or remove the folder"
    )


ORIGINS: dict[str, tuple[object, str]] = {
    "alpha": (0.5, "from a.toml"),
    "student": ("cnn,mlp-20", "from a.toml"),
    "tau": ("4", "from --tau"),
}


def test_settings_get_their_source_at_their_first_mention_alone() -> None:
    parts = Setting("tau", 4.0), " and ", Setting("alpha", 0.5), "; set ", Setting("tau", 4)
    assert str(FedkdError(*parts).with_sources(ORIGINS)) == (
        "tau = 4.0 (from --tau) and alpha = 0.5 (from a.toml); set tau = 4"
    )
    one_of_two = FedkdError(Setting("student", "cnn"), ": no").with_sources(ORIGINS)
    assert str(one_of_two) == "student = 'cnn' (from a.toml): no"


@pytest.mark.parametrize(
    "parts",
    [
        (Setting("tau", 4, "from run_config"), ": no"),  # named already
        (Setting("tau", 7), " was derived"),  # not the value that was given
        (Setting("batch-size", 4), " has another key"),
        ("tau = 4 in the text alone",),
        ("",),
    ],
)
def test_sources_are_not_added_elsewhere(parts: tuple[str | Setting, ...]) -> None:
    error = FedkdError(*parts)
    assert str(error.with_sources(ORIGINS)) == str(error)


def test_an_exception_that_is_no_users_mistake_is_not_swallowed(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> NoReturn:
        raise RuntimeError("ours")

    monkeypatch.setattr("fedkd.engines.run.run", broken)
    with pytest.raises(RuntimeError, match="ours"):
        cli("run", *SMALL)


# --- Help -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["run", "central", "compare"])
def test_help_states_description_range_and_default_of_every_key(command: str) -> None:
    # In a process of its own: the width of the terminal is read once a process.
    done = subprocess.run(
        [sys.executable, "-c", "from fedkd.cli import main; main()", command, "--help"],
        env={**os.environ, "COLUMNS": "300"},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = done.stdout.splitlines()
    for name, field in Experiment.model_fields.items():
        (line,) = [line for line in lines if f"--{kebab(name)} VALUE" in line]
        assert str(field.description) in line
        value = "auto" if field.default is None else field.default
        shown = str(value).lower() if isinstance(value, bool) else str(value)
        assert f"[{accepted(field)}; default {shown}]" in line
    assert any("--smoke" in line for line in lines)
    assert any("--quiet" in line for line in lines)


def test_no_command_at_all_shows_the_commands(cli: Cli) -> None:
    text = cli()
    for command in ("run", "central", "compare", "strategies", "data"):
        assert re.search(rf"^\W*{command} ", text, re.MULTILINE), command


def test_version(cli: Cli) -> None:
    assert cli("--version").strip() == fedkd.__version__


def test_help_and_errors_do_not_wait_for_torch() -> None:
    code = """
import contextlib, sys
from fedkd.cli import main
for line in ("--help", "run --help", "central --help", "compare --help", "run --alpha 7", "rum"):
    with contextlib.suppress(SystemExit):
        main(line.split())
heavy = {"torch", "flwr", "ray", "sklearn", "matplotlib"} & set(sys.modules)
sys.exit(f"imported: {heavy}" if heavy else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# --- run ------------------------------------------------------------------------------------------


def test_run_prints_what_runs_each_round_and_the_result(
    capsys: pytest.CaptureFixture[str],
) -> None:
    main(["run", *SMALL, "--strategy", "dsfl", "--server-model", "mlp-20", "--name", "mine"])
    out, err = capsys.readouterr()
    done = Run.load("runs/mine")
    percent = [100 * accuracy for accuracy in done.client_accuracy if accuracy is not None]
    facts = dict(re.findall(r"^(\S[a-z]+)  +(.+)$", out, re.MULTILINE))
    assert facts["data"] == "digits, 600 training and 200 test images"
    assert facts["public"] == "120 of the training images, with labels"
    # 64·20 + 20 + 20·20 + 20 + 20·10 + 10 weights of a perceptron on 8x8 images
    assert "student mlp-20 (1,930 parameters); teacher none; server-model mlp-20" in facts["models"]
    assert facts["loss"] == "digest 0.7·5² = 17.5 × KL + 0.3 × CE; revisit CE"
    assert facts["strategy"] == "DSFL (sharpening=era, era-temperature=0.1, combine=mean), 2 rounds"
    assert facts["engine"] == "cohort on cpu"
    assert facts["accuracy"] == (
        f"{np.mean(percent):.1f} % on average over 3 clients "
        f"({min(percent):.1f} % to {max(percent):.1f} %)"
    )
    assert facts["server"] == f"{100 * (done.server_accuracy or 0):.1f} %"
    # 3 clients × 2 rounds × 120 samples × 10 classes × 4 bytes
    assert facts["bytes"].startswith("28,800 up, ")
    assert facts["folder"] == str(Path("runs/mine"))
    last = done.rounds[-1]
    assert re.search(
        rf"^2 +3 of 3 +{100 * last['accuracy_after_digest']:.1f} % "
        rf"+{100 * last['accuracy_after_revisit']:.1f} % +{100 * last['server_accuracy']:.1f} % "
        r"+14,400 ",
        out,
        re.MULTILINE,
    )
    assert [line.partition(":")[0] for line in err.splitlines()] == ["round 1 of 2", "round 2 of 2"]
    assert f"{100 * last['accuracy_after_digest']:.1f} % after digest" in err


@pytest.mark.parametrize(
    ("flags", "loss"),
    [
        ("--strategy fedavg", "revisit CE"),
        (
            "--public-labels false --alpha 0.25 --tau 2",
            "digest 0.25·2² = 1 × KL + 0.75 × CE of private images; revisit CE",
        ),
        ("--kl-reduction mean", "digest 0.7·5²/10 = 1.75 × KL + 0.3 × CE; revisit CE"),
        ("--strategy-config digest=mae", "digest mae_logits; revisit CE"),
    ],
)
def test_run_spells_out_the_losses(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, flags: str, loss: str
) -> None:
    class Started(Exception):
        pass

    def stop(*_: object, **__: object) -> NoReturn:
        raise Started

    monkeypatch.setattr("fedkd.engines.run.run", stop)
    with pytest.raises(Started):
        main(["run", *SMALL, *flags.split()])
    assert re.search(rf"^loss +{re.escape(loss)}$", capsys.readouterr().out, re.MULTILINE)


def test_run_as_json_is_the_result_and_nothing_else(cli: Cli) -> None:
    result = cli.json("run", *SMALL, "--num-clients", "2")
    done = Run.load(result.pop("path"))
    found = findings(done)
    assert found[0].kind == "too-few-rounds"
    assert result.pop("findings") == [each.as_json() for each in found]
    assert result == done.result
    assert len(result["client_accuracy"]) == 2


def test_quiet_prints_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    main(["run", *SMALL, "--quiet", "--name", "mine"])
    out, err = capsys.readouterr()
    assert err == ""
    assert out.count("\n") == 1
    assert out.startswith(f"{100 * Run.load('runs/mine').accuracy:.1f} % on average")
    assert out.endswith("runs/mine\n")


def test_flags_win_over_the_file_and_the_file_over_the_preset(cli: Cli, here: Path) -> None:
    (here / "my.toml").write_text('dataset = "mnist-5k"\nalpha = 0.25\ntau = 3\nseed = 7\n')
    preset = ["--preset", "mnist-mlp", "--config", "my.toml"]
    flags = ["--dataset", "digits", "--tau", "2.5", "--public-labels", "false"]
    result = cli.json("central", *preset, *flags, "--teacher", "mlp-64", "--smoke")
    keys = tomllib.loads(Path(result["path"], "experiment.toml").read_text())
    assert keys["dataset"] == "digits"  # flag, over file and preset
    assert keys["tau"] == 2.5  # flag, over file and preset
    assert keys["public-labels"] is False  # flag, over the default
    assert keys["alpha"] == 0.25  # file, over preset
    assert keys["seed"] == 7  # file, over the default
    assert keys["student"] == "mlp-20"  # preset
    assert keys["batch-size"] == 64  # default
    assert result["seeds"] == [7]


def test_a_run_folder_is_itself_a_config(cli: Cli) -> None:
    first = cli.json("run", *SMALL, "--name", "first", "--num-clients", "2")
    config = ["--config", "runs/first/experiment.toml", "--name", "second"]
    second = cli.json("run", *config)
    assert second["client_accuracy"] == first["client_accuracy"]


@pytest.mark.slow
def test_a_pipe_gets_no_control_codes_and_ctrl_c_is_one_line() -> None:
    flags = ["--dataset", "digits", "--num-server-rounds", "5000", "--name", "long"]
    flags += [
        "--train-size",
        "200",
        "--num-clients",
        "3",
        "--student",
        "mlp-5",
        "--plan",
        "stacked",
    ]
    process = subprocess.Popen(
        [*COMMAND, "run", *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    assert process.stderr.readline().startswith("round 1 of 5000: ")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert re.fullmatch(
        r"fedkd: interrupted after round \d+ of 5000; to continue: fedkd run --resume runs/long",
        err.splitlines()[-1],
    )
    assert "Traceback" not in err
    assert out.startswith("data ")
    assert "\x1b" not in out + err
    assert Path("runs/long/rounds.jsonl").read_text().startswith('{"round": 1')


@pytest.mark.slow
def test_an_interrupt_in_exec_ends_a_module_with_130_too(here: Path) -> None:
    """Where dataclasses make their methods: Python then marks the process as ended by the signal."""
    (here / "interrupted.py").write_text('exec("raise KeyboardInterrupt")\n')
    flags = ["run", "--dataset", "interrupted:data"]
    ended = subprocess.run(
        [sys.executable, "-m", "fedkd", *flags], capture_output=True, text=True, timeout=120
    )
    assert (ended.returncode, ended.stderr) == (130, "fedkd: interrupted\n")


# --- central, compare -----------------------------------------------------------------------------


def test_central_prints_mean_and_spread_over_the_seeds(
    capsys: pytest.CaptureFixture[str],
) -> None:
    epochs = ["--local-epochs", "8", "--distill-epochs", "8"]  # with one a student learns nothing
    main(["central", *SMALL, *epochs, "--teacher", "mlp-64", "--seeds", "3,5,8", "--name", "mine"])
    out, err = capsys.readouterr()
    result = json.loads(Path("runs/mine/result.json").read_text())
    assert result["seeds"] == [3, 5, 8]
    assert "student distilled 0.7·5² = 17.5 × KL + 0.3 × CE" in out
    assert "digits, 600 training and 200 test images" in out
    for label, name, parameters in (
        ("teacher", "teacher", "8,970"),
        ("student alone", "student_alone", "1,930"),
        ("student distilled", "student", "1,930"),
    ):
        values = 100 * np.array(result[f"{name}_accuracies"])
        errors = 200 - 2 * values
        assert re.search(
            rf"^{label} +{values.mean():.1f} ± {values.std(ddof=1):.1f} % "
            rf"+{errors.mean():.1f} ± {errors.std(ddof=1):.1f} +{parameters}$",
            out,
            re.MULTILINE,
        ), label
    agreements = 100 * np.array(result["agreements"])
    assert f"agreement   {agreements.mean():.1f} ± {agreements.std(ddof=1):.1f} %" in out
    teacher, alone, distilled = (
        np.mean(result[f"{name}_accuracies"]) for name in ("teacher", "student_alone", "student")
    )
    assert teacher > alone
    assert f"gap closed  {100 * (distilled - alone) / (teacher - alone):.1f} %" in out
    assert err.splitlines() == ["teacher", "students"]


def test_central_says_when_there_is_no_gap(cli: Cli) -> None:
    out = cli("central", *SMALL, "--teacher", "mlp-1", "--student", "mlp-64", "--quiet")
    assert "gap closed n/a (learnt nothing, or diverged: teacher); " in out
    assert out.count("\n") == 1


def test_compare_gives_what_run_gives(cli: Cli) -> None:
    both = cli.json("compare", *SMALL, "--methods", "local,FedAvg", "--num-seeds", "2")
    assert both["seeds"] == [0, 1]
    alone = cli.json("run", *SMALL, "--strategy", "fedavg", "--seed", "1")
    by_method = {row["method"]: row for row in both["methods"]}
    assert list(by_method) == ["LocalOnly", "FedAvg"]
    assert by_method["FedAvg"]["accuracies"][1] == alone["accuracy"]
    assert both["seeds"] == [0, 1]


def test_compare_prints_its_table_or_a_line_a_method(cli: Cli) -> None:
    out = cli("compare", *SMALL, "--methods", "LocalOnly")
    assert "local only" in out
    assert "clients   3 (dirichlet)" in out
    line = cli("compare", *SMALL, "--methods", "LocalOnly", "--quiet")
    assert re.fullmatch(r"local only: \d+\.\d %\n", line)


# --- strategies, data -----------------------------------------------------------------------------


def test_strategies_lists_the_declarations(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {row["name"]: row for row in cli.json("strategies")}
    assert rows["FedMD"]["paper"] == "1910.03581"
    assert rows["FedMD"]["up"] == "P*C*4"
    assert rows["FedMD"]["mixed_models"] is True
    assert rows["FedAvg"]["mixed_models"] is False
    assert rows["DSFL"]["settings"] == {
        "sharpening": "era",
        "era_temperature": 0.1,
        "combine": "mean",
    }
    assert rows["DSFL"]["server_model"] == "optional"
    assert cli("strategies", "--quiet").split() == list(rows)
    table = cli("strategies")
    assert re.search(r"^FedAvg +1602.05629 +weights +S +S .* no +server", table, re.MULTILINE)
    assert "era-temperature=0.1" in table


def test_data_lists_sizes_and_what_is_there(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "mnist.safetensors").touch()
    folder = ["--data-dir", str(tmp_path)]
    rows = {row["name"]: row for row in cli.json("data", *folder)}
    assert list(rows) == list(DATASETS)
    assert rows["cifar10"]["train"] == 50_000
    assert rows["cifar10"]["cached"] is None
    assert rows["mnist"]["cached"] == str(tmp_path / "mnist.safetensors")
    assert rows["digits"]["needs_download"] is False
    table = cli("data", *folder)
    assert re.search(r"^digits .* installed ", table, re.MULTILINE)
    assert re.search(r"^mnist .* in the folder ", table, re.MULTILINE)
    assert re.search(r"^cifar100 +50,000 +10,000 +100 .* to be downloaded ", table, re.MULTILINE)


def test_data_loads_one(cli: Cli) -> None:
    facts = cli.json("data", "digits")
    assert facts["train"] + facts["test"] == len(load_digits().target)
    assert facts["input_shape"] == [1, 8, 8]
    assert cli("data", "digits", "--quiet") == "digits: 1438 training and 359 test images\n"
    assert re.search(r"^train +1,438$", cli("data", "digits"), re.MULTILINE)

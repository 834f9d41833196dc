"""Exported files against float64 written out by hand, ONNX's reference, and a loader without fedkd."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from int8_sums import needs_exact_sums, saturate
from markdown_it import MarkdownIt
from numpy.typing import NDArray
from paths import DOCS
from safetensors.numpy import load_file
from safetensors.torch import save_file
from sampling import one_in
from torch import Tensor, nn

import fedkd
from fedkd.data import load
from fedkd.records import Run
from fedkd.reports.export import export as exporting
from fedkd.reports.export import latency
from fedkd.reports.export.card import as_markdown, wilson
from fedkd.reports.export.export import Export, export
from fedkd.reports.export.forms import FORMS, FromPixels
from fedkd.reports.export.trained import find
from fedkd.studies.central import MODELS
from fedkd.training.models import build

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
needs_onnx = pytest.mark.skipif(
    any(find_spec(name) is None for name in PACKAGES), reason="pip install 'fedkd[onnx]'"
)
EXACT = ["torch-export", pytest.param("onnx", marks=needs_onnx)]
ALL = [*EXACT, pytest.param("int8", marks=[needs_onnx, needs_exact_sums])]

TINY = fedkd.Experiment(
    dataset="digits",
    public_size=97,
    num_clients=3,
    student="mlp-7",
    teacher="mlp-11",
    strategy="DSFL",
    partition="iid",
    num_server_rounds=3,
    local_epochs=3,
    distill_epochs=17,
    batch_size=17,
    learning_rate=1e-2,
    device="cpu",
)

QUICK = TINY.replace(num_server_rounds=1, local_epochs=1, distill_epochs=1)
"""The same where nothing needs to be learnt."""

Floats = NDArray[np.float64]


@pytest.fixture(autouse=True)
def few_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "REPEATS", 3)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A federation that learnt something."""
    return fedkd.run(TINY.replace(run_dir=str(tmp_path_factory.mktemp("runs")), name="tiny"))


@pytest.fixture
def copied(finished: Run, tmp_path: Path) -> Path:
    """A copy of its folder, to spoil."""
    return Path(shutil.copytree(finished.path, tmp_path / "copy"))


# --- Own models, found as test_export:<function> ------------------------------------------------


class _Odd(nn.Module):
    """Tied weights, a buffer that no state_dict has, dropout, BatchNorm, and the batch's size in it."""

    scale: Tensor

    def __init__(self, input_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(input_shape[0], 5, 3, padding=1)
        self.inner = nn.Conv2d(5, 5, 3, padding=1)
        self.again = nn.Conv2d(5, 5, 3, padding=1)
        self.again.weight = self.inner.weight
        self.norm = nn.BatchNorm2d(5)
        self.drop = nn.Dropout(0.3)
        self.register_buffer("scale", torch.tensor(1.7), persistent=False)
        self.last = nn.Linear(5, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.norm(self.again(self.inner(self.first(images).relu()).relu()))
        logits: Tensor = self.last(self.drop(maps.reshape(maps.shape[0], 5, -1).mean(2)))
        return logits * self.scale


def odd(input_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    return _Odd(input_shape, num_classes)


class _Deciding(nn.Module):
    """Looks at numbers to decide what to do, which no graph can hold."""

    def __init__(self, input_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        self.inner = build("mlp-7", input_shape, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.inner(images if images.sum() > 0 else -images)
        return logits


def deciding(input_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    return _Deciding(input_shape, num_classes)


# --- By hand --------------------------------------------------------------------------------------


def last_state(folder: Path, client: int, role: str = "student") -> dict[str, Floats]:
    """Read a client's state after the closing exchange, without fedkd's reader."""
    stack = load_file(folder / "clients" / "0-0.safetensors")
    (slot,) = np.flatnonzero(stack["round"][:, client] == TINY.num_server_rounds + 1)
    return {
        name.removeprefix(f"{role}/"): tensor[slot, client].astype(np.float64)
        for name, tensor in stack.items()
        if name.startswith(f"{role}/")
    }


def mlp_by_hand(state: dict[str, Floats], pixels: NDArray[np.uint8], *, of: str) -> Floats:
    """Normalise, flatten, two hidden layers, logits: in float64."""
    dataset = load(of)
    mean, std = np.array(dataset.mean)[:, None, None], np.array(dataset.std)[:, None, None]
    x = ((pixels.astype(np.float64) / 255 - mean) / std).reshape(len(pixels), -1)
    for layer in ("body.1", "body.3"):
        x = np.maximum(x @ state[f"{layer}.weight"].T + state[f"{layer}.bias"], 0)
    logits: Floats = x @ state["head.weight"].T + state["head.bias"]
    return logits


LOADERS = {
    "torch-export": """
import torch
real, torch.load = torch.load, None  # nothing in it is pickled
module = torch.export.load(path).module()
logits = module(torch.from_numpy(pixels)).detach().numpy()
""",
    "onnx": """
import onnxruntime
session = onnxruntime.InferenceSession(path)
(given,), (taken,) = session.get_inputs(), session.get_outputs()
assert (given.name, given.type, given.shape[0]) == ("pixels", "tensor(uint8)", "batch")
assert (taken.name, taken.type, taken.shape[0]) == ("logits", "tensor(float)", "batch")
(logits,) = session.run(None, {"pixels": pixels})
""",
}


def in_a_fresh_process(path: Path, pixels: NDArray[np.uint8], folder: Path) -> Floats:
    """Run an exported file where fedkd was never imported."""
    np.save(folder / "pixels.npy", pixels)
    loader = LOADERS["torch-export" if path.suffix == ".pt2" else "onnx"]
    script = f"""
import sys
import numpy as np
path, pixels = {str(path)!r}, np.load({str(folder / "pixels.npy")!r})
{loader}
assert not [name for name in sys.modules if name.startswith(("fedkd", "strategies"))]
np.save({str(folder / "logits.npy")!r}, logits)
"""
    command = [sys.executable, "-W", "error", "-c", script]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    found: Floats = np.load(folder / "logits.npy").astype(np.float64)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("to", ALL)
def test_a_fresh_process_gets_from_raw_images_what_the_weights_say(
    finished: Run, tmp_path: Path, to: str
) -> None:
    output = tmp_path / f"student{FORMS[to].ending}"
    done = export(finished.path, to, client=1, output=output)
    pixels = load("digits").test_images.numpy()
    expected = mlp_by_hand(last_state(finished.path, 1), pixels, of="digits")
    logits = in_a_fresh_process(done.path, pixels, tmp_path)
    equal = float((logits.argmax(1) == expected.argmax(1)).mean())
    difference = float(np.abs(logits - expected).max())
    if to == "int8":
        assert 1e-3 < difference < 0.1 * np.abs(expected).max()
        assert equal > 0.97
    else:
        np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
        assert equal == 1
    right = logits.argmax(1) == load("digits").test_labels.numpy()
    assert done.accuracy == pytest.approx(right.mean(), abs=1e-12)
    assert done.accuracy > 0.6
    assert done.largest_difference == pytest.approx(difference, abs=1e-5)
    assert done.card["accuracy"]["equal_predictions"] == pytest.approx(equal, abs=1e-12)


@needs_onnx
@pytest.mark.slow
def test_mnist_from_its_cache(real_data: Path, tmp_path: Path) -> None:
    experiment = TINY.replace(
        dataset="mnist", train_size=1500, public_size=300, run_dir=str(tmp_path), name="mnist",
        teacher="none", data_dir=str(real_data), learning_rate=1e-3, batch_size=64,
    )  # fmt: skip
    finished = fedkd.run(experiment)
    cache = load_file(real_data / "mnist.safetensors")
    pixels, labels = cache["test_images"], cache["test_labels"]
    expected = mlp_by_hand(last_state(finished.path, 0), pixels, of="mnist")
    accuracy = (expected.argmax(1) == labels).mean()
    assert finished.client_accuracy[0] == pytest.approx(accuracy, abs=2e-4)
    tolerances = {"onnx": (1e-4, 2e-4), "int8": (0.1 * np.abs(expected).max(), 0.01)}
    if saturate():
        del tolerances["int8"]
    for to, (apart, points) in tolerances.items():
        done = export(finished.path, to)
        logits = in_a_fresh_process(done.path, pixels[:500], tmp_path)
        assert np.abs(logits - expected[:500]).max() < apart
        assert done.card["accuracy"]["images"] == 10_000
        assert done.accuracy == pytest.approx(accuracy, abs=points)


def test_the_normalisation_inside_is_that_of_training() -> None:
    """Bit by bit: the same two roundings."""
    data = find_data()
    program = FromPixels(nn.Identity(), data.test.mean, data.test.std)
    assert torch.equal(program(data.test.pixels), data.test.whole())


def find_data() -> Any:
    from fedkd.data.federated import federated_data

    return federated_data(TINY)


# --- Every model ----------------------------------------------------------------------------------

COLOUR = (3, 17, 19)


def seasoned(name: str) -> nn.Module:
    """Return a model whose norms have seen something, in evaluation mode."""
    torch.manual_seed(5)
    model = build(name, COLOUR, 7)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
        if isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
            nn.init.normal_(module.weight, 1, 0.3)
            nn.init.normal_(module.bias, 0, 0.3)
    return model.eval()


@pytest.mark.parametrize("to", EXACT)
@pytest.mark.parametrize(
    "name", one_in(3, ["cnn", "mlp-1200", "lenet", "test_export:odd", "resnet-8", "resnet-8-gn"])
)
def test_every_kind_of_model_is_what_it_was_for_any_number_of_images(
    name: str, to: str, tmp_path: Path
) -> None:
    mean, std = (0.3, 0.5, 0.7), (0.2, 0.25, 0.3)
    model, path = seasoned(name), tmp_path / f"model{FORMS[to].ending}"
    FORMS[to].write(FromPixels(model, mean, std), COLOUR, path, torch.empty(0))
    predict = FORMS[to].load(path)
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randint(0, 256, (71, *COLOUR), dtype=torch.uint8, generator=generator)
    shift, scale = (torch.tensor(x, dtype=torch.float64)[:, None, None] for x in (mean, std))
    expected = model.double()((pixels.double() / 255 - shift) / scale).detach()
    assert float(expected.abs().max()) > 0.1
    for first, last in ((0, 1), (1, 4), (0, 71)):
        difference = (predict(pixels[first:last]).double() - expected[first:last]).abs().max()
        assert float(difference) < 2e-5 * max(1.0, float(expected.abs().max()))


@needs_onnx
@needs_exact_sums
@pytest.mark.parametrize("name", ["mlp-20", "resnet-8", "test_export:odd"])
def test_int8_is_integers_and_what_onnx_defines(name: str, tmp_path: Path) -> None:
    """The runtime's fused kernels against the operators' definition in numpy."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    path = tmp_path / "model.int8.onnx"
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randint(0, 256, (71, *COLOUR), dtype=torch.uint8, generator=generator)
    program = FromPixels(seasoned(name), (0.3, 0.5, 0.7), (0.2, 0.25, 0.3))
    FORMS["int8"].write(program, COLOUR, path, pixels)
    found = FORMS["int8"].load(path)(pixels[:11]).numpy()
    (defined,) = ReferenceEvaluator(str(path)).run(None, {"pixels": pixels[:11].numpy()})
    exact = program(pixels[:11]).numpy()
    # A value on the edge of a step may fall to either side, which changes some of the images.
    apart, rounding = np.abs(found - defined).max(1), np.abs(defined - exact).max(1)
    assert np.median(apart) < 0.1 * np.median(rounding)
    assert 0 < np.abs(found - exact).max() < 0.1 * np.abs(exact).max()
    proto = onnx.load(path)
    makers = {output: node for node in proto.graph.node for output in node.output}
    dtypes = {tensor.name: tensor.data_type for tensor in proto.graph.initializer}
    weighted = [n for n in proto.graph.node if n.op_type in ("Conv", "Gemm", "MatMul")]
    kinds = nn.Linear, nn.Conv2d
    assert len(weighted) == sum(isinstance(m, kinds) for m in seasoned(name).modules())
    for node in weighted:
        weight, image = makers[node.input[1]], makers[node.input[0]]
        assert weight.op_type == image.op_type == "DequantizeLinear"
        assert dtypes[weight.input[0]] == onnx.TensorProto.INT8
        assert dtypes[image.input[2]] == onnx.TensorProto.UINT8


# --- What is in a file ----------------------------------------------------------------------------


def test_a_torch_export_holds_no_pickle_and_no_path_of_this_machine(
    finished: Run, tmp_path: Path
) -> None:
    done = export(finished.path, output=tmp_path / "student.pt2")
    with zipfile.ZipFile(done.path) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    assert any(name.endswith("weight_0") for name in contents)
    assert not [name for name, content in contents.items() if content[:1] == b"\x80"]
    assert not [name for name in contents if name.endswith(".pkl")]
    assert all(not content for name, content in contents.items() if "sample_inputs" in name)
    here = str(Path(fedkd.__file__).parent).encode(), b"site-packages"
    assert not [n for n, content in contents.items() if any(path in content for path in here)]


@needs_onnx
@pytest.mark.parametrize("to", one_in(2, ["int8", "onnx"]))  # integers are made of an ONNX file
def test_an_onnx_file_is_whole_and_says_nothing_of_this_machine(
    finished: Run, tmp_path: Path, to: str, capfd: pytest.CaptureFixture[str]
) -> None:
    done = export(finished.path, to, output=tmp_path / f"student{FORMS[to].ending}")
    assert capfd.readouterr() == ("", "")
    content = done.path.read_bytes()
    assert b"site-packages" not in content
    assert str(Path(fedkd.__file__).parent).encode() not in content
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [done.path.name, f"{done.path.name}.json", f"{done.path.name}.md"]


@needs_onnx
@pytest.mark.slow
def test_int8_takes_a_quarter_of_the_weights(tmp_path: Path) -> None:
    sizes = {}
    pixels = torch.zeros((3, *COLOUR), dtype=torch.uint8)
    for to in ("onnx", "int8"):
        path = tmp_path / f"wide{FORMS[to].ending}"
        FORMS[to].write(
            FromPixels(seasoned("mlp-300"), (0.5,) * 3, (0.5,) * 3), COLOUR, path, pixels
        )
        sizes[to] = path.stat().st_size
    parameters = sum(p.numel() for p in seasoned("mlp-300").parameters())
    assert sizes["onnx"] == pytest.approx(4 * parameters, rel=0.01)
    assert sizes["int8"] == pytest.approx(parameters, rel=0.05)


# --- Which model ----------------------------------------------------------------------------------


def test_the_default_is_the_first_client_that_took_part_in_the_end(copied: Path) -> None:
    result = json.loads((copied / "result.json").read_text())
    result["client_accuracy"][0], result["dropped"] = None, {"0": "no reply in time"}
    (copied / "result.json").write_text(json.dumps(result))
    done = export(copied)
    assert done.path == copied / "exports" / "student-client1.pt2"
    assert done.card["accuracy"]["original"] == result["client_accuracy"][1]
    with pytest.raises(fedkd.FedkdError, match=r"client = 0: .*\(no reply in time\)"):
        export(copied, client=0)


def test_each_client_and_its_teacher_are_told_apart(finished: Run) -> None:
    for client in range(3):
        for role in ("student", "teacher"):
            found = find(finished.path, role, client)
            by_hand = last_state(finished.path, client, role)
            assert set(found.state) == set(by_hand)
            for name, tensor in found.state.items():
                assert np.array_equal(tensor.numpy(), by_hand[name].astype(np.float32))
    teacher = export(finished.path, model="teacher", client=2)
    assert teacher.card["model"]["architecture"] == "mlp-11"
    assert teacher.path.name == "teacher-client2.pt2"
    assert teacher.card["latency"]["reference"] == "original"


def test_where_weights_are_shared_all_clients_are_one(tmp_path: Path) -> None:
    run = fedkd.run(QUICK.replace(strategy="FedAvg", teacher="none", run_dir=str(tmp_path)))
    first, last = find(run.path, client=0).state, find(run.path, client=2).state
    assert all(torch.equal(first[name], last[name]) for name in first)
    done = export(run.path)
    assert done.accuracy == run.server_accuracy
    assert done.card["model"]["architecture"] == "mlp-7"
    assert "teacher" not in done.card["model"]


def test_mixed_and_own_models(tmp_path: Path) -> None:
    names = "mlp-7,test_export:odd"
    run = fedkd.run(QUICK.replace(student=names, teacher="none", run_dir=str(tmp_path)))
    done = export(run.path, client=1)
    assert done.card["model"]["architecture"] == "test_export:odd"
    assert done.accuracy == run.client_accuracy[1]


def test_a_fold_is_not_called_a_test_set(tmp_path: Path) -> None:
    run = fedkd.run(QUICK.varied(fold="2/3", run_dir=str(tmp_path)))
    done = export(run.path)
    assert done.accuracy == run.client_accuracy[0]
    assert done.card["accuracy"]["images"] == run.result["test_size"]
    assert "images held out (fold 2/3)" in done.facts["accuracy"]


def test_calibration_sees_training_and_public_images_alone(finished: Run) -> None:
    trained = find(finished.path, client=2)
    pixels, of = exporting.calibration_images(trained)
    data = trained.data
    held = {image.numpy().tobytes() for image in data.train.pixels[data.shards[2]]}
    public = {image.numpy().tobytes() for image in data.public.pixels}
    drawn = [image.numpy().tobytes() for image in pixels]
    assert set(drawn) <= held | public
    assert set(drawn) & held
    assert set(drawn) & public
    assert len(drawn) == exporting.CALIBRATION < len(data.shards[2]) + len(data.public)
    assert of == "training images of client 2 and public images"
    foreign = replace(trained, experiment=trained.experiment.replace(
        public="mnist-5k", public_labels=False
    ))  # fmt: skip
    assert len(exporting.calibration_images(foreign)[0]) == len(data.shards[2])


# --- Central runs ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def central(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """A central run of two seeds, and the models that were put into its folder."""
    run = fedkd.central(QUICK.replace(run_dir=str(tmp_path_factory.mktemp("central"))), [3, 5])
    assert run.path is not None
    tensors = {}
    torch.manual_seed(2)
    for model in ("teacher", "student-alone", "student-distilled"):
        for seed in (3, 5):
            module = build("mlp-11" if model == "teacher" else "mlp-7", (1, 8, 8), 10)
            for name, tensor in module.state_dict().items():
                tensors[f"{model}/{seed}/{name}"] = tensor
    save_file(tensors, run.path / MODELS)
    return run.path, tensors


@pytest.mark.parametrize("model", ["teacher", "student-alone", "student-distilled"])
def test_a_central_runs_models_are_told_apart(
    central: tuple[Path, dict[str, Tensor]], model: str
) -> None:
    folder, tensors = central
    done = export(folder, model=None if model == "student-distilled" else model, seed=5)
    assert done.path.name == f"{model}-seed5.pt2"
    prefix = f"{model}/5/"
    state = {
        name.removeprefix(prefix): tensor.double().numpy()
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
    pixels = load("digits").test_images
    found = FORMS["torch-export"].load(done.path)(pixels).numpy()
    np.testing.assert_allclose(found, mlp_by_hand(state, pixels.numpy(), of="digits"), atol=1e-5)
    assert done.card["training"]["command"].startswith("fedkd central ")
    assert done.card["training"]["command"].endswith(" --seeds 3,5")
    assert find(folder).owner == "seed 3"


def test_a_central_run_keeps_the_models_of_its_record(tmp_path: Path) -> None:
    quick = TINY.replace(distill_epochs=3, batch_size=61, run_dir=str(tmp_path))
    run = fedkd.central(quick, [3, 5])
    assert run.path is not None
    for model, recorded in (
        ("teacher", run.teacher_accuracies),
        ("student-alone", run.student_alone_accuracies),
        ("student-distilled", run.student_accuracies),
    ):
        for seed, accuracy in zip((3, 5), recorded, strict=True):
            trained = find(run.path, model, seed=seed)
            assert trained.recorded == accuracy
            predicted = trained.cohort().classify(trained.data.test)[0]
            assert trained.data.test.labels is not None
            right = predicted.eq(trained.data.test.labels)
            assert float(right.double().mean()) == pytest.approx(accuracy, abs=1e-9)
    done = export(run.path)
    assert done.accuracy == run.student_accuracies[0]
    assert done.card["latency"]["reference"] == "teacher"


# --- What is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"to": "onx"}, r"to = 'onx' \(did you mean 'onnx'\?\): must be torch-export, onnx, int8"),
        (
            {"model": "studnt"},
            r"model = 'studnt' \(did you mean 'student'\?\): .* student, teacher",
        ),
        ({"model": "server"}, "model = 'server': this run keeps student, teacher"),
        ({"client": 3}, "client = 3: this run has clients 0 to 2"),
        ({"client": -1}, "client = -1: this run has clients 0 to 2"),
        ({"seed": 0}, "seed = 0: a federated run has one seed"),
        ({"output": "student.onnx"}, r"output = 'student.onnx': .* end in .pt2"),
        ({"output": "folder.pt2"}, "output = 'folder.pt2': is a folder"),
    ],
)
def test_what_is_asked_for_must_be_there(
    finished: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: dict[str, Any],
    text: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.pt2").mkdir()
    with pytest.raises(fedkd.FedkdError, match=text):
        export(finished.path, **arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["folder.pt2"]


def test_a_client_without_a_teacher_has_none(copied: Path) -> None:
    (copied / "identity.json").unlink()  # as if it had been run so
    text = (copied / "experiment.toml").read_text()
    (copied / "experiment.toml").write_text(text.replace('teacher = "mlp-11"', 'teacher = "none"'))
    with pytest.raises(fedkd.FedkdError, match=r"model = 'teacher': this run keeps student$"):
        export(copied, model="teacher")


def test_central_runs_have_seeds(central: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(central[0], tmp_path / "copy"))
    for arguments, text in (
        ({"client": 0}, "client = 0: a central run has no clients"),
        ({"seed": 4}, "seed = 4: this run has seeds 3, 5"),
        ({"model": "student"}, "this run keeps teacher, student-alone, student-distilled"),
    ):
        with pytest.raises(fedkd.FedkdError, match=text):
            export(folder, **arguments)
    (folder / MODELS).write_bytes(b"no safetensors")
    with pytest.raises(fedkd.FedkdError, match=r"models.safetensors cannot be read: "):
        export(folder)
    (folder / MODELS).unlink()
    with pytest.raises(fedkd.FedkdError, match=r"holds no models.safetensors: .* `fedkd central`"):
        export(folder)


def test_only_finished_runs_are_exported(copied: Path, tmp_path: Path) -> None:
    with pytest.raises(fedkd.FedkdError, match="is not a run folder"):
        export(tmp_path)
    shutil.rmtree(copied / "clients")
    with pytest.raises(
        fedkd.FedkdError, match=r"client = 0: .*clients holds no state of this client"
    ):
        export(copied)
    (copied / "result.json").write_text("{}")
    with pytest.raises(fedkd.FedkdError, match="neither a federated nor a central run"):
        export(copied)
    (copied / "result.json").write_text("{")
    with pytest.raises(fedkd.FedkdError, match=r"result.json is not valid JSON"):
        export(copied)
    (copied / "result.json").unlink()
    with pytest.raises(fedkd.FedkdError, match=r"result.json is missing"):
        export(copied)


def test_changed_code_is_noticed(copied: Path) -> None:
    (copied / "identity.json").unlink()  # as if it had been run so
    text = (copied / "experiment.toml").read_text()
    (copied / "experiment.toml").write_text(text.replace('student = "mlp-7"', 'student = "mlp-8"'))
    with pytest.raises(fedkd.FedkdError, match="other parameters than 'mlp-8' has now"):
        export(copied)


def test_a_model_that_no_graph_can_hold_is_named(tmp_path: Path) -> None:
    own = "test_export:deciding"
    run = fedkd.run(QUICK.replace(student=own, teacher="none", plan="loop", run_dir=str(tmp_path)))
    with pytest.raises(
        fedkd.FedkdError, match=rf"to = 'torch-export': the student '{own}': .*any "
    ):
        export(run.path)
    assert list((run.path / "exports").iterdir()) == []


@pytest.mark.parametrize(
    ("to", "fault"),
    [("torch-export", float("nan")), pytest.param("onnx", 1e-2, marks=needs_onnx)],
)
def test_a_file_that_computes_something_else_is_removed(
    finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str, fault: float
) -> None:
    """And what was there before stays."""
    path = tmp_path / f"student{FORMS[to].ending}"
    before = export(finished.path, to, output=path).path.read_bytes()
    form = FORMS[to]

    def spoilt(model: FromPixels, shape: Sequence[int], path: Path, calibration: Tensor) -> None:
        model.model.head.bias += fault  # type: ignore[union-attr, operator]
        form.write(model, shape, path, calibration)

    monkeypatch.setitem(FORMS, to, replace(form, write=spoilt))
    with pytest.raises(fedkd.FedkdError, match=r"differ from the original's .* is removed"):
        export(finished.path, to, output=path)
    assert path.read_bytes() == before
    names = {f"{path.name}{ending}" for ending in ("", ".json", ".md")}
    assert {left.name for left in tmp_path.iterdir()} == names


def test_a_student_that_diverged_is_not_exported(
    finished: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = find(finished.path)
    bias = {"head.bias": torch.full((10,), float("nan"))}
    diverged = replace(trained, state={**trained.state, **bias})
    monkeypatch.setattr(exporting, "find", lambda *_: diverged)
    with pytest.raises(fedkd.FedkdError, match="not all finite"):
        export(finished.path)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_missing_extra_is_named_before_any_work(
    monkeypatch: pytest.MonkeyPatch, package: str, tmp_path: Path
) -> None:
    for other in PACKAGES:
        monkeypatch.setitem(sys.modules, other, None if other == package else json)
    with pytest.raises(fedkd.FedkdError, match=rf"need {package} .*pip install 'fedkd\[onnx\]'"):
        export(tmp_path, "int8")


def test_a_folder_that_cannot_be_made_is_named(finished: Run, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(fedkd.FedkdError, match=r"student.pt2 cannot be written: "):
        export(finished.path, output=tmp_path / "file" / "deep" / "student.pt2")


# --- The card -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(finished: Run, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Export]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporting, "REPEATS", 3)
        yield export(finished.path, output=tmp_path_factory.mktemp("out") / "student.pt2")


@pytest.mark.parametrize(("correct", "images"), [(0, 7), (7, 7), (3, 11), (8417, 10_000)])
def test_the_interval_is_wilsons(correct: int, images: int) -> None:
    """Its ends are the shares p for which (p̂ − p)² = z² p (1 − p) / n."""
    share, factor = correct / images, 1.959963984540054**2 / images
    ends = np.roots([1 + factor, -(2 * share + factor), share**2])
    assert wilson(correct, images) == pytest.approx(sorted(ends), abs=1e-9)


def test_the_card_holds_what_was_measured_and_recorded(finished: Run, exported: Export) -> None:
    card = json.loads(Path(f"{exported.path}.json").read_text())
    assert card == exported.card
    content = exported.path.read_bytes()
    assert card["file"] == {
        "name": "student.pt2",
        "form": "torch-export",
        "bytes": len(content),
        "sha256": sha256(content).hexdigest(),
    }
    assert exported.bytes == len(content)
    assert card["model"]["parameters"] == 64 * 7 + 7 + 7 * 7 + 7 + 7 * 10 + 10
    assert card["model"]["teacher_parameters"] == 64 * 11 + 11 + 11 * 11 + 11 + 11 * 10 + 10
    images = len(load("digits").test_labels)
    right = round(card["accuracy"]["file"] * images)
    assert card["accuracy"]["images"] == images
    assert tuple(card["accuracy"]["interval"]) == wilson(right, images)
    assert card["accuracy"]["recorded"] == finished.client_accuracy[0]
    assert card["accuracy"]["original"] == finished.client_accuracy[0]
    assert card["input"]["shape"] == ["batch", 1, 8, 8]
    assert card["data"]["classes"] == list("0123456789")
    assert card["training"]["experiment"] == finished.experiment.flat()
    assert card["calibration"] is None
    trained = find(finished.path)
    assert card["data"]["labelled_images"] == len(trained.data.shards[0])
    counts = trained.data.private_label_counts[0]
    assert card["data"]["labelled_classes"] == int((counts > 0).sum())


def test_ratios_are_to_the_teacher(exported: Export) -> None:
    timed = exported.card["latency"]
    assert timed["reference"] == "teacher"
    assert timed["repeats"] == 3
    for size in ("1", "64"):
        seconds, ratio = timed["seconds"][size], timed["ratio"][size]
        assert set(seconds) == {"file", "original", "teacher"}
        assert ratio["teacher"] == 1
        for name in seconds:
            assert ratio[name] == pytest.approx(seconds[name] / seconds["teacher"])


def test_markdown_says_what_the_json_says(exported: Export) -> None:
    text = exported.card_path.read_text()
    assert text == as_markdown(exported.card)
    accuracy = exported.card["accuracy"]
    assert f"{100 * accuracy['file']:.1f} % (95 % interval" in text
    assert f"{exported.bytes:,} bytes" in text
    assert exported.card["file"]["sha256"] in text
    assert exported.card["latency"]["machine"].split(",")[0].replace("(", "\\(")[:5] in text
    assert "fedkd run --config " in text


EVIL = "a|b *c* _d_ `e` <script>alert(1)</script> [x](http://y) ![z](w) &amp; \\| \n# head\n"


def test_names_are_text_in_the_card(exported: Export) -> None:
    """Rendered by another implementation, they are there as they were, in their own cells."""
    card = json.loads(json.dumps(exported.card))
    card["data"]["name"] = card["model"]["architecture"] = card["model"]["teacher"] = EVIL
    card["data"]["classes"] = [EVIL, "plain"]
    card["training"]["experiment"]["strategy-config"] = EVIL
    tokens = MarkdownIt("commonmark").enable("table").parse(as_markdown(card))
    inlines = [token for token in tokens if token.type == "inline"]
    shown = " ".join(EVIL.split())
    texts = ["".join(child.content for child in token.children or []) for token in inlines]
    assert f"{shown} on {shown}" in texts
    assert f"{shown}, plain" in texts
    assert shown in texts
    kinds = {child.type for token in inlines for child in token.children or []}
    assert kinds <= {"text", "text_special", "code_inline", "softbreak"}
    assert [t.tag for t in tokens if t.type == "heading_open"] == ["h1", "h2", "h2", "h2"]
    rows = as_markdown(exported.card).count("\n|")
    assert as_markdown(card).count("\n|") == rows


def test_a_record_that_says_otherwise_is_pointed_out(tmp_path: Path, exported: Export) -> None:
    """FedProto classifies by class means, the file by its logits."""
    assert "The run recorded" not in exported.card_path.read_text()
    run = fedkd.run(TINY.replace(strategy="FedProto", teacher="none", run_dir=str(tmp_path)))
    done = export(run.path)
    recorded = run.client_accuracy[0]
    assert recorded is not None
    assert abs(recorded - done.accuracy) > 0.01
    assert f"The run recorded {100 * recorded:.1f} %" in done.card_path.read_text()


def test_latency_is_the_median_of_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    now, calls = 0.0, []
    times = {"quick": iter([9.0] * 3 + [1.0, 8.0, 2.0]), "slow": iter([9.0] * 3 + [5.0, 7.0, 11.0])}

    def contender(name: str) -> Any:
        def call(batch: Tensor) -> None:
            nonlocal now
            calls.append((name, len(batch)))
            now += next(times[name])

        return call

    monkeypatch.setattr(latency, "perf_counter", lambda: now)
    contenders = {name: contender(name) for name in times}
    found = latency.latencies(contenders, torch.zeros(5, 1), repeats=3)
    assert found == {"quick": 2.0, "slow": 7.0}
    assert calls == [("quick", 5), ("slow", 5)] * 6


def test_facts_fit_a_terminal(exported: Export) -> None:
    assert list(exported.facts) == [
        "file", "card", "model", "size", "accuracy", "the original", "latency",
    ]  # fmt: skip
    assert exported.facts["file"] == str(exported.path)
    assert exported.facts["latency"].endswith("of the teacher's in PyTorch")


# --- The documentation ----------------------------------------------------------------------------

PAGE = DOCS / "export.md"


@pytest.mark.slow
@needs_onnx
def test_the_snippets_of_the_docs_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = fedkd.run(QUICK.replace(dataset="mnist-5k", train_size=500, run_dir=str(tmp_path)))
    outputs = {"torch-export": "student.pt2", "onnx": "student.onnx", "int8": "student.int8.onnx"}
    exports = [export(run.path, to, output=tmp_path / name) for to, name in outputs.items()]
    monkeypatch.chdir(tmp_path)
    sources = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(sources) == 2
    sources.append(sources[1].replace("student.onnx", "student.int8.onnx"))
    for source, done in zip(sources, exports, strict=True):
        exec(compile(source, "docs/export.md", "exec"), {})
        black = torch.zeros(5, 1, 28, 28, dtype=torch.uint8)
        form = FORMS[done.card["file"]["form"]]
        expected = form.load(done.path)(black).argmax(1).tolist()
        assert json.loads(capsys.readouterr().out) == expected

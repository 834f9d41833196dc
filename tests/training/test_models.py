"""Models against closed-form sizes, functional references and one another under vmap."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import pytest
import torch
from sampling import one_in
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional as F

from fedkd.errors import FedkdError
from fedkd.experiment import Experiment
from fedkd.training import models
from fedkd.training.models import NAMES, Classifier, build, num_parameters

K, B, C = 3, 5, 7
DIGITS, MNIST, CIFAR = (1, 8, 8), (1, 28, 28), (3, 32, 32)
SHAPES = (DIGITS, MNIST, CIFAR)
WITH_DROPOUT = {
    "mlp-1200": [0.8, 0.8],
    "hinton-1200": [0.2, 0.5, 0.5],
    "cnn-large": [0.5],
}


def make(name: str, shape: models.InputShape, num_classes: int = C, seed: int = 11) -> Classifier:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build(name, shape, num_classes)
    assert isinstance(model, Classifier)
    return model


def images(shape: models.InputShape, *leading: int, seed: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*leading, *shape, generator=generator, dtype=torch.float64)


# --- sizes ---------------------------------------------------------------------------------------


def dense(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def conv(inputs: int, outputs: int, side: int = 3) -> int:
    return side * side * inputs * outputs


def mlp(width: int) -> Callable[[int, int, int], int]:
    return lambda c, side, classes: (
        dense(c * side * side, width) + dense(width, width) + dense(width, classes)
    )


def lenet(c: int, side: int, classes: int) -> int:
    tail = dense(16 * 5 * 5, 120) + dense(120, 84) + dense(84, classes)
    return conv(c, 6, 5) + 6 + conv(6, 16, 5) + 16 + tail


def cnn(c: int, side: int, classes: int) -> int:
    body = conv(c, 16) + 16 + conv(16, 32) + 32 + conv(32, 64) + 64
    return body + dense(64 * (side // 8) ** 2, classes)


def cnn_large(c: int, side: int, classes: int) -> int:
    pairs = ((c, 32), (32, 64), (64, 64), (64, 128), (128, 128))
    body = sum(conv(i, o) + 2 * o for i, o in pairs)
    return body + dense(128 * (side // 8) ** 2, 256) + dense(256, classes)


def resnet(depth: int) -> Callable[[int, int, int], int]:
    """6n + 2 layers: a stem, then n blocks of two convolutions at each of 16, 32, 64 channels."""

    def count(c: int, side: int, classes: int) -> int:
        n = (depth - 2) // 6
        stages = sum(
            (2 * n - 1) * conv(o, o) + conv(i, o) for i, o in ((16, 16), (16, 32), (32, 64))
        )
        norms = 2 * 16 + 2 * n * 2 * (16 + 32 + 64)
        return conv(c, 16) + stages + norms + dense(64, classes)

    return count


SIZES: dict[str, Callable[[int, int, int], int]] = {
    "mlp-20": mlp(20),
    "mlp-64": mlp(64),
    "mlp-800": mlp(800),
    "mlp-1200": mlp(1200),
    "hinton-1200": mlp(1200),
    "lenet": lenet,
    "cnn": cnn,
    "cnn-large": cnn_large,
    "resnet-8": resnet(8),
    "resnet-20": resnet(20),
    "resnet-8-gn": resnet(8),
    "resnet-20-gn": resnet(20),
}


def test_every_name_has_a_closed_form() -> None:
    assert set(SIZES) == set(NAMES)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_number_of_parameters(name: str, shape: models.InputShape) -> None:
    channels, side, _ = shape
    for classes in (C, 10):
        model = make(name, shape, classes)
        assert num_parameters(model) == SIZES[name](channels, side, classes)


def test_published_and_promised_sizes() -> None:
    assert (
        round(num_parameters(make("resnet-20", CIFAR, 10)) / 1e6, 2) == 0.27
    )  # He et al., table 6
    assert num_parameters(make("lenet", MNIST, 10)) == 61_706
    text = " ".join((build.__doc__ or "").split())
    for name, shape in (("mlp-20", MNIST), ("mlp-1200", MNIST), ("lenet", MNIST), ("cnn", CIFAR)):
        assert re.search(rf"{name}`` (has |\(){num_parameters(make(name, shape, 10)):,}", text)
    for name in ("cnn-large", "resnet-8", "resnet-20"):
        assert f"``{name}`` ({num_parameters(make(name, CIFAR, 10)):,})" in text


def test_num_parameters_counts_shared_ones_once_and_no_buffers() -> None:
    layer = nn.Linear(3, 3)
    assert num_parameters(nn.Sequential(layer, nn.BatchNorm1d(3), layer)) == 12 + 6


# --- shapes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_logits_are_the_head_of_flat_features(name: str, shape: models.InputShape) -> None:
    model = make(name, shape).double().eval()
    x = images(shape, B)
    with torch.no_grad():
        features, logits = model.body(x), model(x)
        assert features.shape == (B, model.head.in_features)
        assert logits.shape == (B, C)
        assert torch.equal(logits, F.linear(features, model.head.weight, model.head.bias))
    assert model.head.out_features == C
    assert torch.unique(logits, dim=0).shape == (B, C), "the logits ignore the images"


@pytest.mark.parametrize("name", NAMES)
def test_other_sizes_and_oblong_images(name: str) -> None:
    for shape in ((2, 11, 17), (1, 64, 40)):
        assert make(name, shape).eval()(images(shape, 2).float()).shape == (2, C)


@pytest.mark.parametrize("name", ["cnn", "cnn-large"])
def test_too_small_an_image_is_refused(name: str) -> None:
    with pytest.raises(FedkdError, match=rf"'{name}'.*at least 8x8.*got input shape \(3, 32, 7\)"):
        build(name, (3, 32, 7), C)


# --- what each model computes --------------------------------------------------------------------


def weights(model: nn.Module) -> list[Tensor]:
    return [parameter.detach() for parameter in model.parameters()]


@pytest.mark.parametrize("name", ["mlp-20", "mlp-64", "mlp-800", "mlp-1200", "hinton-1200"])
def test_mlp_is_two_hidden_layers_with_relu(name: str) -> None:
    model = make(name, DIGITS).double().eval()
    x = images(DIGITS, B)
    w1, b1, w2, b2, w3, b3 = weights(model)
    hidden = (x.reshape(B, -1) @ w1.T + b1).clamp(min=0)
    hidden = (hidden @ w2.T + b2).clamp(min=0)
    torch.testing.assert_close(model(x).detach(), hidden @ w3.T + b3, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [MNIST, CIFAR], ids=str)
def test_lenet_is_lenet_5(shape: models.InputShape) -> None:
    """On 28x28 the margin of zeros is what a first convolution with padding 2 does."""
    model = make("lenet", shape).double().eval()
    x = images(shape, B)
    c1, d1, c2, d2, w3, b3, w4, b4, w5, b5 = weights(model)
    maps = F.conv2d(x, c1, d1, padding=(32 - shape[1]) // 2)
    maps = F.max_pool2d(F.relu(maps), 2)
    maps = F.max_pool2d(F.relu(F.conv2d(maps, c2, d2)), 2)
    hidden = F.relu(F.linear(maps.flatten(1), w3, b3))
    hidden = F.relu(F.linear(hidden, w4, b4))
    torch.testing.assert_close(model(x).detach(), F.linear(hidden, w5, b5), rtol=0, atol=1e-12)


def test_lenet_centres_small_images() -> None:
    model = make("lenet", DIGITS).double().eval()
    field = torch.zeros(B, 1, 32, 32, dtype=torch.float64)
    field[:, :, 12:20, 12:20] = images(DIGITS, B)
    wide = make("lenet", (1, 32, 32)).double().eval()
    assert torch.equal(model(images(DIGITS, B)), wide(field))


def test_cnn_is_three_convolutions_each_pooled() -> None:
    model = make("cnn", MNIST).double().eval()
    x = images(MNIST, B)
    c1, d1, c2, d2, c3, d3, w, b = weights(model)
    maps = x
    for kernel, bias in ((c1, d1), (c2, d2), (c3, d3)):
        maps = F.max_pool2d(F.relu(F.conv2d(maps, kernel, bias, padding=1)), 2)
    expected = F.linear(maps.flatten(1), w, b)
    torch.testing.assert_close(model(x).detach(), expected, rtol=0, atol=1e-12)


def test_cnn_large_normalises_every_convolution() -> None:
    model = make("cnn-large", DIGITS).double().eval()
    maps = images(DIGITS, B)
    layers = weights(model)
    for index in range(5):
        kernel, scale, shift = layers[3 * index : 3 * index + 3]
        maps = F.conv2d(maps, kernel, padding=1) / (1 + 1e-5) ** 0.5  # statistics still 0 and 1
        maps = F.relu(maps * scale[:, None, None] + shift[:, None, None])
        maps = F.max_pool2d(maps, 2) if index in (0, 2, 4) else maps
    w, b, head, bias = layers[15:]
    expected = F.linear(F.relu(F.linear(maps.flatten(1), w, b)), head, bias)
    torch.testing.assert_close(model(images(DIGITS, B)).detach(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_dropout_stands_where_it_is_promised_only(name: str) -> None:
    model = make(name, MNIST)
    rates = [layer.p for layer in model.modules() if isinstance(layer, nn.Dropout)]
    assert rates == WITH_DROPOUT.get(name, [])
    if name in ("mlp-1200", "hinton-1200"):
        kinds = [type(layer) for layer in model.body.children()]
        on_input = [nn.Dropout] if name == "hinton-1200" else []
        assert kinds == [nn.Flatten, *on_input, *[nn.Linear, nn.ReLU, nn.Dropout] * 2]


@pytest.mark.parametrize("name", ["resnet-8", "resnet-20", "resnet-8-gn", "resnet-20-gn"])
def test_silent_residual_branches_leave_the_shortcuts_of_option_a(name: str) -> None:
    """With the last scale of each block at 0, only subsampled, zero-padded identities remain."""
    model = make(name, CIFAR).double().eval()
    kind = nn.GroupNorm if name.endswith("-gn") else nn.BatchNorm2d
    norms = [layer for layer in model.modules() if isinstance(layer, kind)]
    depth = int(name.split("-")[1])
    assert len(norms) == depth - 1  # every layer but the last, dense one
    for norm in norms[2::2]:
        nn.init.zeros_(norm.weight)
    x = images(CIFAR, B)
    stem = F.conv2d(x, weights(model)[0], padding=1)
    maps = F.relu(norms[0](stem))[:, :, ::4, ::4]
    features = model.body(x)
    torch.testing.assert_close(features[:, :16], maps.mean((2, 3)), rtol=0, atol=1e-12)
    assert torch.count_nonzero(features[:, 16:]) == 0


def test_group_norm_has_eight_groups() -> None:
    model = make("resnet-20-gn", CIFAR)
    norms = [layer for layer in model.modules() if isinstance(layer, nn.GroupNorm)]
    assert {norm.num_groups for norm in norms} == {8}
    assert not list(model.buffers())


# --- initial weights -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_initial_weights_are_named_by_the_seed(name: str) -> None:
    first, again, other = (make(name, DIGITS, seed=seed) for seed in (11, 11, 12))
    assert all(map(torch.equal, weights(first), weights(again)))
    assert not torch.equal(first.head.weight, other.head.weight)
    assert first.training


def test_initial_weights_are_those_of_a_plain_pytorch_model() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(11)
        plain = nn.Sequential(nn.Linear(784, 20), nn.Linear(20, 20), nn.Linear(20, 10))
    assert all(map(torch.equal, weights(make("mlp-20", MNIST, 10)), weights(plain)))


# --- stacked -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "training"),
    [(name, False) for name in NAMES]
    + [(name, True) for name in NAMES if name not in WITH_DROPOUT],  # masks: the trainer's business
)
def test_stacked_equals_one_by_one(name: str, training: bool) -> None:
    shape = CIFAR if name in ("cnn", "cnn-large") else MNIST
    shape = DIGITS if "resnet" in name else shape
    nets = [make(name, shape, seed=seed).double().train(training) for seed in range(K)]
    parameters, buffers = stack_module_state(nets)
    x = images(shape, K, B)

    def forward(p: dict[str, Tensor], b: dict[str, Tensor], batch: Tensor) -> Tensor:
        logits: Tensor = functional_call(nets[0], (p, b), (batch,), strict=True)
        return logits

    stacked = vmap(forward)(parameters, buffers, x)
    for k in range(K):
        p = {name: value[k].detach().clone() for name, value in parameters.items()}
        own = {name: value.detach().clone() for name, value in nets[k].named_buffers()}
        torch.testing.assert_close(stacked[k], forward(p, own, x[k]), rtol=0, atol=1e-9)
        for buffer, value in own.items():
            torch.testing.assert_close(buffers[buffer][k], value, rtol=0, atol=1e-9)


# --- own models ----------------------------------------------------------------------------------

OWN = """
    from torch import nn

    def linear(input_shape, num_classes):
        return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))

    class Zoo:
        linear = staticmethod(linear)

    def too_wide(input_shape, num_classes):
        return linear(input_shape, num_classes + 1)

    def needs_more(input_shape):
        return None

    def returns_text(input_shape, num_classes):
        return "a model"

    def one_norm(input_shape, num_classes):
        return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, num_classes))

    class Pair(nn.Module):
        def __init__(self, input_shape, num_classes):
            super().__init__()

        def forward(self, images):
            return images, images

    class Picky(Pair):
        def forward(self, images):
            raise RuntimeError("first line\\nsecond line")

    number = 3
"""


@pytest.fixture
def own_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_models_of_a_user.py").write_text(dedent(OWN))
    (tmp_path / "broken_module_of_a_user.py").write_text("def linear(:\n")
    monkeypatch.setattr(sys, "path", [*sys.path])  # `build` adds the working directory
    monkeypatch.chdir(tmp_path)
    for name in ("own_models_of_a_user", "broken_module_of_a_user"):
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.mark.usefixtures("own_models")
def test_own_model() -> None:
    model = build("own_models_of_a_user:linear", DIGITS, C)
    assert num_parameters(model) == dense(64, C)
    assert all(module.training for module in model.modules())


@pytest.mark.usefixtures("own_models")
def test_trying_an_own_model_leaves_its_state_alone() -> None:
    model = build("own_models_of_a_user:one_norm", DIGITS, C)
    state = model.state_dict()
    assert torch.equal(state["1.running_var"], torch.ones(64))
    assert state["1.num_batches_tracked"] == 0


def one_line(excinfo: pytest.ExceptionInfo[FedkdError]) -> str:
    assert "\n" not in str(excinfo.value)
    return str(excinfo.value)


@pytest.mark.usefixtures("own_models")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mlp20", r"unknown model 'mlp20' \(did you mean 'mlp-20'\?\).*resnet-8.*module:function"),
        ("mlp-0", r"unknown model 'mlp-0'.*width of 1 to 8192"),
        ("mlp-8193", r"unknown model 'mlp-8193'"),
        ("mlp-020", r"unknown model 'mlp-020'"),
        ("resnet-20-bn", r"did you mean 'resnet-20-gn'"),
        ("", r"unknown model ''"),
        ("no_such_module:f", r"'no_such_module:f': cannot import.*No module named"),
        ("broken_module_of_a_user:linear", r"cannot import.*SyntaxError.*line 1"),
        (":linear", r"':linear': cannot import ''"),
        ("own_models_of_a_user:", r"'' is not a plain name"),
        ("own_models_of_a_user:Zoo.linear", r"'Zoo\.linear' is not a plain name"),
        ("own_models_of_a_user:liner", r"has no function 'liner' \(did you mean 'linear'\?\)"),
        ("own_models_of_a_user:number", r"has no function 'number'"),
    ],
)
def test_unknown_names(name: str, message: str) -> None:
    with pytest.raises(FedkdError, match=message) as excinfo:
        build(name, DIGITS, C)
    one_line(excinfo)


@pytest.mark.usefixtures("own_models")
@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("needs_more", r"called with \(1, 8, 8\), 7 failed: TypeError: needs_more\(\) takes 1"),
        ("returns_text", r"returned a str, not a torch.nn.Module"),
        ("too_wide", r"gives logits of shape \(2, 8\) for two images, expected \(2, 7\)"),
        ("Pair", r"gives logits of shape a tuple for two images, expected \(2, 7\)"),
        ("Picky", r"fails on two zero images: RuntimeError: first line second line"),
    ],
)
def test_own_models_that_cannot_be_used(function: str, message: str) -> None:
    name = f"own_models_of_a_user:{function}"
    with pytest.raises(FedkdError, match=message) as excinfo:
        build(name, DIGITS, C)
    assert name in one_line(excinfo)


def test_a_family_member_that_is_not_listed() -> None:
    assert num_parameters(build("mlp-31", DIGITS, C)) == mlp(31)(1, 8, C)


# --- learning ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", one_in(3, NAMES))
def test_learns_real_digits(name: str) -> None:
    data = load_digits()
    pixels = torch.tensor(data.images, dtype=torch.float32)[:256, None]
    x, labels = (pixels - pixels.mean()) / pixels.std(), torch.tensor(data.target)[:256]
    model = make(name, DIGITS, 10, seed=0)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    with torch.random.fork_rng():
        torch.manual_seed(0)  # dropout
        for batch in [rows for _ in range(5) for rows in torch.arange(256).split(32)]:
            loss = F.cross_entropy(model(x[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        loss = F.cross_entropy(model.eval()(x), labels)
    assert loss < 1.0  # log(10) = 2.3 at the start


def test_a_model_in_a_file_is_found_from_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what it imports from beside it, and again when the file has changed."""
    folder = tmp_path / "my nets"
    folder.mkdir()
    (folder / "width_of_a_user.py").write_text("width = 13\n")
    file = folder / "nets_of_a_user.py"
    file.write_text(
        "from torch import nn\nfrom width_of_a_user import width\n"
        "def net(shape, classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(6, width), nn.Linear(width, classes))\n"
    )
    monkeypatch.chdir(folder)
    experiment = Experiment(
        student="nets_of_a_user.py:net,mlp-7", plan="nets_of_a_user.py:net=loop,mlp-7=stacked"
    )
    assert experiment.student == f"{file}:net,mlp-7"
    assert experiment.plan == f"{file}:net=loop, mlp-7=stacked"
    assert Experiment.load(("again", experiment.flat())) == experiment
    monkeypatch.chdir(tmp_path)
    assert num_parameters(build(experiment.student_of(0), (1, 2, 3), 5)) == 7 * 13 + 14 * 5
    file.write_text(
        file.read_text()
        .replace("width), nn", "2 * width), nn.ReLU(), nn")
        .replace("nn.Linear(width,", "nn.Linear(2 * width,")
    )
    os.utime(file, ns=(1, 1))
    assert num_parameters(build(experiment.student_of(0), (1, 2, 3), 5)) == 7 * 26 + 27 * 5
    for name, reason in (
        (f"{file}:nett", "has no function 'nett' .*did you mean 'net'"),
        (f"{folder / 'nothing.py'}:net", "there is no such file"),
        ("nets.py", "name a function of the file, as in nets.py:my_model"),
    ):
        with pytest.raises(FedkdError, match=reason):
            build(name, (1, 2, 3), 5)

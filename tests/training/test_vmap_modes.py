"""Keyed dropout against splitmix64 in Python integers, masked batch norm against PyTorch's."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F

from fedkd.errors import FedkdError
from fedkd.randomness import at_steps, draws, key, mix
from fedkd.training.vmap_modes import KeyedMode, no_other_draws

K, B, UNITS = 3, 5, 7
WORD = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
CPU = torch.device("cpu")


def splitmix(z: int) -> int:
    """Finish splitmix64 (Steele, Lea, Flood 2014) in Python's unbounded integers."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & WORD
    return z ^ (z >> 31)


def reference_draws(stream: int, count: int, call: int) -> npt.NDArray[np.int64]:
    """Take four 16-bit draws, the low one first, from each hashed word of a counter."""
    words = [
        splitmix((stream + ((call + 1) * 2**40 + i) * GOLDEN) & WORD) for i in range(-(-count // 4))
    ]
    little_endian = np.array(words, dtype="<u8").view("<u2")
    return little_endian[:count].astype(np.int64)


def reference_keep(stream: int, shape: tuple[int, ...], p: float, call: int = 0) -> Tensor:
    drawn = reference_draws(stream, int(np.prod(shape)), call)
    return torch.from_numpy(drawn >= round(p * 65536)).reshape(shape)


def unsigned(tensor: Tensor) -> list[int]:
    return [int(v) & WORD for v in tensor.flatten()]


def keyed(
    function: Callable[[Tensor], Tensor],
    stream: int | Tensor,
    x: Tensor,
    real: Tensor | None = None,
) -> Tensor:
    """Call `function` as one client's forward pass."""
    with no_other_draws(watch=True), KeyedMode(torch.as_tensor(stream), real):
        return function(x)


# --- The hash ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seed", "published"),
    [
        (0, [16294208416658607535, 7960286522194355700, 487617019471545679]),
        (1234567, [6457827717110365317, 3203168211198807973, 9817491932198370423]),
    ],
)
def test_steps_are_the_published_outputs_of_splitmix64(seed: int, published: list[int]) -> None:
    """The generator adds the golden gamma once before each output."""
    given = unsigned(at_steps(torch.tensor([seed]), 4))
    assert given[1:] == published
    assert [splitmix((seed + n * GOLDEN) & WORD) for n in (1, 2, 3)] == published


def test_mix_equals_python_integers() -> None:
    values = [0, 1, -1, 2**62, 2**63 - 1, -(2**63), *(key("mix", i) for i in range(50))]
    assert unsigned(mix(torch.tensor(values))) == [splitmix(v & WORD) for v in values]


def test_the_keys_of_steps_equal_python_integers() -> None:
    keys = [key("step", k) for k in range(K)]
    given = at_steps(torch.tensor(keys), 1009)
    assert given.shape == (K, 1009)
    for step in (0, 1, 2, 1000, 1008):
        assert unsigned(given[:, step]) == [splitmix((k + step * GOLDEN) & WORD) for k in keys]


@pytest.mark.parametrize("call", [0, 1, 5])
@pytest.mark.parametrize("count", [1, 3, 4, 61])
def test_draws_equal_numpy(count: int, call: int) -> None:
    for stream in (0, key("draws"), -key("negative")):
        given = draws(torch.tensor(stream), count, call)
        assert given.dtype == torch.int64
        assert np.array_equal(given.numpy(), reference_draws(stream, count, call))


def test_draws_of_a_longer_request_begin_with_the_shorter_one() -> None:
    stream = torch.tensor(key("prefix"))
    assert torch.equal(draws(stream, 100)[:13], draws(stream, 13))


def test_draws_are_uniform() -> None:
    """Chi-squared over 256 bins within five deviations of its mean, also for the keys 0 and 1."""
    for stream in (0, 1, key("uniform")):
        counts = torch.bincount(draws(torch.tensor(stream), 2**17) >> 8, minlength=256)
        assert len(counts) == 256
        statistic = float(((counts - 512.0) ** 2 / 512).sum())
        assert abs(statistic - 255) < 5 * (2 * 255) ** 0.5


def test_neighbouring_keys_steps_and_calls_are_uncorrelated() -> None:
    """Also shifted against each other: a counted stream would be its neighbour's moved by one."""
    n = 2**15
    start = torch.tensor(12345)
    streams = [
        *(draws(start + k, n) for k in range(3)),
        *(draws(each, n) for each in at_steps(start.unsqueeze(0), 3)[0]),
        *(draws(start, n, call) for call in (1, 2)),
    ]
    centred = [(s.double() - 32767.5) / (65536 / 12**0.5) for s in streams]
    for i, a in enumerate(centred):
        for b in centred[i + 1 :]:
            for lag in range(-8, 9):
                size = n - abs(lag)
                left, right = a[max(lag, 0) :][:size], b[max(-lag, 0) :][:size]
                assert abs(float((left * right).mean())) < 6 / size**0.5


# --- Dropout -------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
def test_dropout_masks_equal_numpy(p: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(B, UNITS, 3, generator=generator, dtype=torch.float64)
    stream = key("dropout")
    given = keyed(lambda t: F.dropout(t, p, training=True), stream, x)
    expected = torch.where(reference_keep(stream, (B, UNITS, 3), p), x / (1 - p), 0.0)
    torch.testing.assert_close(given, expected, rtol=1e-15, atol=0)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
def test_dropout_drops_at_its_rate_and_keeps_the_mean(p: float) -> None:
    n = 10**5
    given = keyed(nn.Dropout(p), key("rate"), torch.ones(n))
    assert sorted(set(given.tolist())) == pytest.approx([0.0, 1 / (1 - p)])
    deviation = (p * (1 - p) / n) ** 0.5
    assert abs(float((given == 0).double().mean()) - p) < 5 * deviation
    assert abs(float(given.double().mean()) - 1) < 5 * deviation / (1 - p)


def test_dropout_of_everything_nothing_and_in_evaluation() -> None:
    x = torch.randn(B, UNITS, generator=torch.Generator().manual_seed(0)).requires_grad_()
    everything = keyed(lambda t: F.dropout(t, 1.0, training=True), 1, x)
    assert torch.equal(everything, torch.zeros(B, UNITS))
    (gradient,) = torch.autograd.grad(everything.sum(), x)
    assert torch.equal(gradient, torch.zeros(B, UNITS))
    assert torch.equal(keyed(lambda t: F.dropout(t, 0.0, training=True), 1, x), x)
    assert torch.equal(keyed(nn.Dropout(0.5).eval(), 1, x), x)


def test_dropout_in_place_changes_its_input() -> None:
    x = torch.ones(B, UNITS)
    y = keyed(lambda t: F.dropout(t, 0.5, training=True, inplace=True), 5, x)
    assert torch.equal(x, y)
    assert 0 < int((x == 0).sum()) < B * UNITS


def test_the_gradient_passes_where_the_mask_does() -> None:
    x = torch.randn(B, UNITS, generator=torch.Generator().manual_seed(0)).requires_grad_()
    out = keyed(nn.Dropout(0.5), key("gradient"), x)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(gradient, 2.0 * reference_keep(key("gradient"), (B, UNITS), 0.5))


def test_masks_do_not_depend_on_padding_neighbours_or_position() -> None:
    keys = torch.tensor([key("client", k) for k in range(K)])

    def masks(keys: Tensor, rows: int) -> Tensor:
        def one(stream: Tensor) -> Tensor:
            return keyed(nn.Dropout(0.5), stream, torch.ones(rows, UNITS))

        return vmap(one)(keys)

    together = masks(keys, B)
    for k in range(K):
        assert torch.equal(together[k], 2.0 * reference_keep(int(keys[k]), (B, UNITS), 0.5))
        assert torch.equal(masks(keys[k : k + 1], B)[0], together[k])
        assert torch.equal(keyed(nn.Dropout(0.5), keys[k], torch.ones(B, UNITS)), together[k])
    assert torch.equal(masks(keys.flip(0), B).flip(0), together)
    assert torch.equal(masks(keys, B + 8)[:, :B], together)
    assert not torch.equal(together[0], together[1])


class TwoDropouts(nn.Module):
    """One as a layer, one as a call in the forward pass of a user's own model."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.layer(x), F.dropout(x, 0.5, self.training)])


def test_two_dropouts_of_one_pass_use_different_masks_and_two_passes_the_same() -> None:
    stream = key("two")
    first, second = keyed(TwoDropouts(), stream, torch.ones(B, UNITS))
    assert torch.equal(first, 2.0 * reference_keep(stream, (B, UNITS), 0.5, call=0))
    assert torch.equal(second, 2.0 * reference_keep(stream, (B, UNITS), 0.5, call=1))
    assert not torch.equal(first, second)
    again = keyed(TwoDropouts(), stream, torch.ones(B, UNITS))
    assert torch.equal(again, torch.stack([first, second]))


def test_the_global_generator_is_neither_read_nor_moved() -> None:
    results = []
    for seed in (1, 2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            before = torch.get_rng_state()
            results.append(keyed(TwoDropouts(), 99, torch.ones(B, UNITS)))
            assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(results[0], results[1])


# --- Batch normalisation -------------------------------------------------------------------------

WIDTH = 8
REAL = [5, 2, 8]
"""Rows of each client that are no padding, of 8."""

NORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "2d": (lambda: nn.BatchNorm2d(UNITS), (UNITS, 3, 2)),
    "2d with one image": (lambda: nn.BatchNorm2d(UNITS), (UNITS, 2, 1)),
    "1d": (lambda: nn.BatchNorm1d(UNITS), (UNITS,)),
    "1d of sequences": (lambda: nn.BatchNorm1d(UNITS, momentum=0.3, eps=0.1), (UNITS, 3)),
    "3d, no affine": (lambda: nn.BatchNorm3d(UNITS, affine=False), (UNITS, 2, 2, 2)),
    "2d, no statistics": (
        lambda: nn.BatchNorm2d(UNITS, track_running_stats=False),
        (UNITS, 3, 2),
    ),
}


@pytest.mark.parametrize("name", list(NORMS))
def test_masked_batch_norm_equals_the_module_on_unpadded_rows(name: str) -> None:
    """Outputs, gradients and running statistics after two batches of every client."""
    build, shape = NORMS[name]
    real = [1, *REAL[1:]] if name == "2d with one image" else REAL
    generator = torch.Generator().manual_seed(3)
    batches = torch.randn(2, K, WIDTH, *shape, generator=generator, dtype=torch.float64) * 3 + 1
    cotangents = torch.randn(batches.shape, generator=generator, dtype=torch.float64)
    modules = [build().double() for _ in range(K)]
    for module in modules:
        for parameter in module.parameters():
            parameter.data.normal_(generator=generator)
    params = {
        n: torch.stack([m.get_parameter(n).data for m in modules])
        for n, _ in modules[0].named_parameters()
    }
    buffers = {
        n: torch.stack([m.get_buffer(n) for m in modules]) for n, _ in modules[0].named_buffers()
    }
    rows = torch.arange(WIDTH) < torch.tensor(real)[:, None]

    def one(p: dict[str, Tensor], b: dict[str, Tensor], x: Tensor, real: Tensor) -> Tensor:
        with KeyedMode(torch.tensor(0), real):
            out: Tensor = functional_call(modules[0], (p, b), (x,), strict=True)
        return out

    for x, cotangent in zip(batches, cotangents, strict=True):
        leaves = {n: p.clone().requires_grad_() for n, p in params.items()}
        x = x.clone().requires_grad_()
        out = vmap(one)(leaves, buffers, x, rows)
        mask = rows.reshape(K, WIDTH, *[1] * len(shape))
        of_x, *of_params = torch.autograd.grad(
            (out * cotangent * mask).sum(), [x, *leaves.values()]
        )
        for k, module in enumerate(modules):
            n = real[k]
            alone = x.detach()[k, :n].clone().requires_grad_()
            expected = module(alone)
            wanted = [alone, *module.parameters()]
            grads = torch.autograd.grad((expected * cotangent[k, :n]).sum(), wanted)
            close(out[k, :n], expected)
            close(of_x[k, :n], grads[0])
            assert not of_x[k, n:].any()
            for mine, grad in zip(of_params, grads[1:], strict=True):
                close(mine[k], grad)
            for buffer, value in module.named_buffers():
                close(buffers[buffer][k], value)
    if "num_batches_tracked" in buffers:
        assert buffers["num_batches_tracked"].tolist() == [2] * K


def close(given: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(given, expected, rtol=1e-10, atol=1e-12)


def test_batch_norm_in_evaluation_uses_running_statistics() -> None:
    module = nn.BatchNorm1d(UNITS).double().eval()
    module.running_mean = torch.arange(float(UNITS), dtype=torch.float64)
    x = torch.randn(WIDTH, UNITS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    given = keyed(module, 0, x, real=torch.arange(WIDTH) < 2)
    assert torch.equal(given, module(x))
    assert module.num_batches_tracked is not None
    assert int(module.num_batches_tracked) == 0


def test_batch_norm_of_a_single_value_a_channel_stays_finite() -> None:
    """A last batch of one sample, which PyTorch refuses: its variance is 0/0."""
    module = nn.BatchNorm1d(UNITS)
    out = keyed(module, 0, torch.ones(WIDTH, UNITS), real=torch.arange(WIDTH) < 1)
    assert module.running_var is not None
    assert bool(module.running_var.isfinite().all())
    assert bool(out.isfinite().all())


# --- What cannot be keyed ------------------------------------------------------------------------


RANDOM: dict[str, Callable[[Tensor], Tensor]] = {
    "gumbel_softmax": F.gumbel_softmax,
    "rand": lambda x: x + torch.rand(UNITS),
    "randn_like": torch.randn_like,
    "normal": lambda x: torch.normal(x, 1.0),
}


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("name", list(RANDOM))
def test_other_random_functions_are_refused(name: str, stacked: bool) -> None:
    x = torch.randn(K, B, UNITS, generator=torch.Generator().manual_seed(0))
    keys = torch.arange(K)

    def run() -> Tensor:
        if stacked:
            return vmap(lambda k, x: keyed(RANDOM[name], k, x))(keys, x)
        return keyed(RANDOM[name], keys[0], x[0])

    with pytest.raises(FedkdError, match="cannot be keyed"):
        run()

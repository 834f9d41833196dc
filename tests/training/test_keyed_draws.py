"""Dropouts with keyed masks: their formulas written out, and PyTorch where nothing is dropped."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn import functional as F

from fedkd.randomness import draws, key
from fedkd.training.vmap_modes import KeyedMode, no_other_draws

B, UNITS, K, P = 5, 7, 3, 0.3
STREAM = key("dropouts")
NEVER = 1e-9
"""A probability at which nothing is dropped, but everything is computed as if."""


def keyed(function: Callable[[Tensor], Tensor], stream: int | Tensor, x: Tensor) -> Tensor:
    with no_other_draws(watch=True), KeyedMode(torch.as_tensor(stream), None):
        return function(x)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kept(*shape: int, call: int = 0) -> Tensor:
    count = int(torch.tensor(shape).prod())
    return draws(torch.tensor(STREAM), count, call).reshape(shape) >= round(P * 65536)


CHANNELS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "dropout1d": (partial(F.dropout1d, p=P), (B, UNITS, 4)),
    "dropout2d": (partial(F.dropout2d, p=P), (B, UNITS, 4, 2)),
    "dropout3d": (partial(F.dropout3d, p=P), (B, UNITS, 4, 2, 3)),
    "nn.Dropout2d": (nn.Dropout2d(P), (B, UNITS, 4, 2)),
    "nn.Dropout2d in place": (nn.Dropout2d(P, inplace=True), (B, UNITS, 4, 2)),
}


@pytest.mark.parametrize("name", CHANNELS)
def test_dropouts_of_channels_drop_whole_channels(name: str) -> None:
    function, shape = CHANNELS[name]
    x = normal(*shape)
    expected = x * kept(B, UNITS).reshape(B, UNITS, *[1] * (len(shape) - 2)) / (1 - P)
    torch.testing.assert_close(keyed(function, STREAM, x.clone()), expected)


@pytest.mark.parametrize("whole_channels", [False, True])
def test_alpha_dropout_keeps_mean_and_variance_as_its_paper_says(whole_channels: bool) -> None:
    """Klambauer et al. 2017, section 3: a(x·d + α'(1 − d)) + b with α' = −λα, of SELU's constants."""
    function = nn.FeatureAlphaDropout(P) if whole_channels else nn.AlphaDropout(P)
    x = normal(B, UNITS, 2)
    low = -1.0507009873554805 * 1.6732632423543772
    q = 1 - P
    a = (q + low**2 * q * (1 - q)) ** -0.5
    b = -a * low * (1 - q)
    keep = kept(B, UNITS).unsqueeze(-1) if whole_channels else kept(B, UNITS, 2)
    expected = a * torch.where(keep, x, torch.tensor(low, dtype=torch.float64)) + b
    torch.testing.assert_close(keyed(function, STREAM, x), expected)


def test_torch_dropout_and_bernoulli() -> None:
    x = normal(B, UNITS)
    expected = x * kept(B, UNITS) / (1 - P)
    torch.testing.assert_close(keyed(lambda t: torch.dropout(t, P, True), STREAM, x), expected)
    likely = x.sigmoid()
    drawn = draws(torch.tensor(STREAM), B * UNITS).reshape(B, UNITS)
    ones = (drawn < likely * 65536).double()
    assert torch.equal(keyed(torch.bernoulli, STREAM, likely), ones)
    # As torchvision's stochastic depth draws.
    noise = keyed(lambda t: t.new_empty(B, 1).bernoulli_(P), STREAM, x)
    assert torch.equal(noise, (drawn.flatten()[:B, None] < P * 65536).double())


def test_no_function_drops_in_evaluation_or_with_probability_0() -> None:
    x = normal(B, UNITS, 2, 2)
    for build in (nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout, nn.Dropout):
        assert torch.equal(keyed(build(0.0), STREAM, x), x)
        assert torch.equal(keyed(build(P).eval(), STREAM, x), x)


def test_attention_drops_weights_between_queries_and_keys() -> None:
    q, k, v = normal(2, B, UNITS), normal(2, 3, UNITS, seed=1), normal(2, 3, 4, seed=2)
    weights = (q @ k.transpose(1, 2) / UNITS**0.5).softmax(-1)
    expected = (weights * kept(2, B, 3) / (1 - P)) @ v
    given = keyed(lambda t: F.scaled_dot_product_attention(t, k, v, dropout_p=P), STREAM, q)
    torch.testing.assert_close(given, expected)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"scale": 0.7},
        {"attn_mask": normal(B, B)},
        {"attn_mask": torch.eye(B).bool() | (normal(B, B) > 0)},
        {"enable_gqa": True},
    ],
    ids=str,
)
def test_attention_that_drops_nothing_is_that_of_pytorch(options: dict[str, Any]) -> None:
    q, k = normal(2, 4, B, UNITS), normal(2, 2 if "enable_gqa" in options else 4, B, UNITS, seed=1)
    attention: Any = partial(F.scaled_dot_product_attention, **options)
    given = keyed(lambda t: attention(t, k, k, dropout_p=NEVER), STREAM, q)
    torch.testing.assert_close(given, attention(q, k, k), rtol=1e-8, atol=1e-8)


RECURRENT: dict[str, Callable[..., nn.RNNBase]] = {
    "lstm": partial(nn.LSTM, bidirectional=True),
    "lstm with projections": partial(nn.LSTM, proj_size=2),
    "gru": partial(nn.GRU, batch_first=True),
    "gru without bias": partial(nn.GRU, bias=False, bidirectional=True),
    "tanh": nn.RNN,
    "relu": partial(nn.RNN, nonlinearity="relu"),
}


@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_layers_that_drop_nothing_are_those_of_pytorch(name: str) -> None:
    torch.manual_seed(0)
    layer = RECURRENT[name](UNITS, 4, num_layers=3, dropout=NEVER).double()
    x = normal(B, 2, UNITS)
    with KeyedMode(torch.tensor(STREAM), None):
        given, end = layer(x)
    layer.dropout = 0.0
    expected, expected_end = layer(x)
    torch.testing.assert_close(given, expected, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(end, expected_end, rtol=1e-8, atol=1e-8)


def test_a_recurrent_layer_drops_between_its_layers() -> None:
    torch.manual_seed(0)
    both, first, second = nn.RNN(UNITS, 4, 2, dropout=P), nn.RNN(UNITS, 4), nn.RNN(4, 4)
    for name, parameter in both.named_parameters():
        of = first if name.endswith("l0") else second
        of.get_parameter(name[:-1] + "0").data = parameter.data
    x = normal(B, 2, UNITS).float()
    between = first(x)[0] * kept(B, 2, 4) / (1 - P)
    torch.testing.assert_close(keyed(lambda t: both(t)[0], STREAM, x), second(between)[0])


class Encoder(nn.Module):
    """An encoder layer of PyTorch with its defaults: dropout in attention and between layers."""

    def __init__(self, p: float = 0.1) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(UNITS, 1, 11, p, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)  # type: ignore[no-any-return]


def test_an_encoder_layer_that_drops_nothing_is_that_of_pytorch() -> None:
    torch.manual_seed(0)
    encoder, x = Encoder(NEVER).double(), normal(2, B, UNITS)
    given = keyed(encoder, STREAM, x)
    for module in encoder.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    encoder.layer.self_attn.dropout = 0.0
    torch.testing.assert_close(given, encoder(x), rtol=1e-8, atol=1e-8)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize(
    "module",
    [
        *(nn.Dropout(P), nn.Dropout1d(P), nn.AlphaDropout(P), nn.FeatureAlphaDropout(P)),
        *(Encoder().double(), nn.Sequential(nn.Dropout(P), Encoder().double(), nn.Dropout1d(P))),
    ],
    ids=lambda m: type(m).__name__,
)
def test_a_client_draws_the_same_stacked_and_alone(module: nn.Module) -> None:
    x, keys = normal(K, 2, B, UNITS), torch.tensor([key("client", k) for k in range(K)])
    stacked = vmap(lambda stream, x: keyed(module, stream, x))(keys, x)
    for k in range(K):
        torch.testing.assert_close(stacked[k], keyed(module, keys[k], x[k]))
    assert not torch.allclose(stacked[0], keyed(module, keys[1], x[0]))

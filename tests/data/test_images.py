"""Images: normalisation in numpy, and every augmented image among all shifts written as loops."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from fedkd.data.images import Augment, Images
from fedkd.randomness import key

N, CHANNELS, HEIGHT, WIDTH = 11, 3, 7, 5
MEAN, STD = (0.1307, 0.5, 0.25), (0.3081, 0.2, 1.0)

Bytes = npt.NDArray[np.uint8]


def some_images(dtype: torch.dtype = torch.float64) -> Images:
    generator = torch.Generator().manual_seed(0)
    # From 1, so that black can only come from outside the image.
    pixels = torch.randint(1, 256, (N, CHANNELS, HEIGHT, WIDTH), generator=generator)
    labels = torch.randint(0, 10, (N,), generator=generator)
    return Images(pixels.to(torch.uint8), labels, MEAN, STD, dtype)


def normalised(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    mean = np.array(MEAN)[:, None, None]
    std = np.array(STD)[:, None, None]
    result: npt.NDArray[np.float64] = (pixels.astype(np.float64) / 255 - mean) / std
    return result


def shifted(image: Bytes, down: int, right: int, flip: bool) -> Bytes:
    """Look at `image` through a window moved by (down, right); black outside, mirrored at last."""
    result = np.zeros_like(image)
    for c, y, x in product(range(CHANNELS), range(HEIGHT), range(WIDTH)):
        if 0 <= y + down < HEIGHT and 0 <= x + right < WIDTH:
            result[c, y, x] = image[c, y + down, x + right]
    return result[:, :, ::-1] if flip else result


def keys(count: int, first: int = 0) -> Tensor:
    return torch.tensor([key("images", k) for k in range(first, first + count)])


def bytes_of(images: Images, batch: Tensor) -> Bytes:
    """Undo the normalisation."""
    mean = torch.tensor(MEAN, dtype=batch.dtype)[:, None, None]
    std = torch.tensor(STD, dtype=batch.dtype)[:, None, None]
    exact = (batch * std + mean) * 255
    assert float((exact - exact.round()).abs().max()) < 1e-3
    result: Bytes = exact.round().to(torch.uint8).numpy()
    return result


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
def test_batches_are_normalised(dtype: torch.dtype, tolerance: float) -> None:
    images = some_images(dtype)
    rows = torch.tensor([3, 0, 10, 3, 7])
    before = images.pixels.clone()

    batch = images.batch(rows)

    assert batch.dtype == dtype
    assert batch.shape == (5, CHANNELS, HEIGHT, WIDTH)
    expected = normalised(images.pixels.numpy()[rows.numpy()])
    np.testing.assert_allclose(batch.numpy(), expected, rtol=0, atol=10 * tolerance)
    assert torch.equal(images.pixels, before)


@pytest.mark.parametrize("channels", [1, CHANNELS])
@pytest.mark.parametrize("augment", ["none", "crop-flip"])
def test_the_layout_in_memory_changes_no_value(channels: int, augment: Augment) -> None:
    images = some_images()
    images = replace(
        images, pixels=images.pixels[:, :channels].contiguous(), mean=(0.4,), std=(0.2,)
    )
    rows = torch.tensor([[3, 0, 10], [3, 7, 1]])
    plain = images.batches(rows, augment, keys(2))
    last = images.batches(rows, augment, keys(2), channels_last=True)
    assert torch.equal(last, plain)
    assert torch.equal(images.batch(rows[0], channels_last=True), images.batch(rows[0]))
    assert last[0].stride()[1:] == (1, WIDTH * channels, channels)


def test_one_channel_of_mnist_ends_where_everyone_s_does() -> None:
    """Black and white of MNIST under the mean and deviation that every tutorial uses."""
    pixels = torch.tensor([0, 255], dtype=torch.uint8).reshape(2, 1, 1, 1)
    batch = Images(pixels, None, (0.1307,), (0.3081,)).batch(torch.arange(2))
    assert batch.dtype == torch.float32
    assert batch.flatten().tolist() == pytest.approx([-0.42421296, 2.82148653], abs=1e-6)


def test_keep_takes_rows_and_may_drop_labels() -> None:
    images, rows = some_images(), torch.tensor([4, 4, 9])
    assert images.labels is not None
    kept, unlabelled = images.keep(rows), images.keep(rows, labelled=False)
    assert len(images) == N
    assert len(kept) == 3
    assert kept.labels is not None
    assert torch.equal(kept.labels, images.labels[rows])
    assert unlabelled.labels is None
    assert torch.equal(unlabelled.pixels, images.pixels[rows])
    assert torch.equal(kept.batch(torch.arange(3)), images.batch(rows))
    assert unlabelled.keep(torch.tensor([0])).labels is None


def test_no_augmentation_is_the_plain_batch() -> None:
    images, rows = some_images(), torch.tensor([[3, 0], [5, 5]])
    plain = images.batches(rows, "none", keys(2))
    assert torch.equal(plain.flatten(0, 1), images.batch(rows.flatten()))


@pytest.mark.parametrize(
    ("augment", "reach", "flips"), [("jitter-2", 2, (False,)), ("crop-flip", 4, (False, True))]
)
def test_every_image_is_one_of_the_shifts_and_all_of_them_occur(
    augment: Augment, reach: int, flips: tuple[bool, ...]
) -> None:
    images = some_images()
    clients, width = 13, 499
    rows = torch.arange(clients * width).reshape(clients, width) % 2  # two images, many draws
    drawn = bytes_of(images, images.batches(rows, augment, keys(clients)))
    drawn = drawn.reshape(-1, CHANNELS, HEIGHT, WIDTH)

    offsets = range(-reach, reach + 1)
    outcomes = list(product(offsets, offsets, flips))
    for row in (0, 1):
        names = {shifted(images.pixels[row].numpy(), *o).tobytes(): o for o in outcomes}
        assert len(names) == len(outcomes)  # no two shifts look alike
        mine = [names[image.tobytes()] for image in drawn[rows.flatten().numpy() == row]]
        assert set(mine) == set(outcomes)
        # Fair: a chi-squared statistic within five deviations of its mean.
        counts = np.array([mine.count(o) for o in outcomes])
        freedom = len(outcomes) - 1
        statistic = float(((counts - counts.mean()) ** 2 / counts.mean()).sum())
        assert abs(statistic - freedom) < 5 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("augment", ["jitter-2", "crop-flip"])
def test_a_client_s_images_do_not_depend_on_neighbours_or_padding(augment: Augment) -> None:
    images = some_images()
    rows = torch.tensor([[3, 0, 10, 2, 2], [3, 0, 10, 2, 2], [1, 1, 1, 5, 6]])
    all_keys = keys(3)
    together = images.batches(rows, augment, all_keys)

    assert not torch.equal(together[0], together[1])  # same images, other streams
    for k in range(3):
        alone = images.batches(rows[k : k + 1], augment, all_keys[k : k + 1])
        assert torch.equal(alone[0], together[k])
        short = images.batches(rows[k : k + 1, :2], augment, all_keys[k : k + 1])
        assert torch.equal(short[0], together[k, :2])
    reordered = images.batches(rows.flip(0), augment, all_keys.flip(0))
    assert torch.equal(reordered.flip(0), together)
    again = images.batches(rows, augment, all_keys)
    assert torch.equal(again, together)


def test_outside_of_the_image_is_black_before_normalisation() -> None:
    pixels = torch.full((1, CHANNELS, HEIGHT, WIDTH), 200, dtype=torch.uint8)
    images = Images(pixels, None, MEAN, STD, torch.float64)
    batch = images.batches(torch.zeros(1, 97, dtype=torch.int64), "jitter-2", keys(1))
    assert set(np.unique(bytes_of(images, batch)).tolist()) == {0, 200}

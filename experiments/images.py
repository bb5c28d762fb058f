"""Image sets for experiments.vision: read from local files, split, and augmented in batches. No file is downloaded.

torchvision is not used: its random crop moves all images of a batch alike, its reader of idx files cannot read .gz
files, and each version of it needs one exact build of torch.
"""

import gzip
import hashlib
import io
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from runtime.errors import UserError

Split = tuple[Tensor, Tensor]  # images (N, channels, H, W) of uint8, labels (N) of int64


@dataclass(frozen=True)
class Dataset:
    """How an image set is read and augmented."""

    read: Callable[[Path], tuple[Split, Split]]  # a folder to the training and the test images
    mean: tuple[float, ...]  # per channel, for images in [0, 1]
    std: tuple[float, ...]
    validation: int  # training images that are held out
    padding: int = 0  # black pixels on each side before the random crop
    flip: bool = False  # horizontally, at random
    classes: int = 10


@dataclass(frozen=True)
class Images:
    """The three splits of an image set, in memory."""

    kind: Dataset
    train: Split
    validation: Split
    test: Split

    @property
    def channels(self) -> int:
        return self.train[0].shape[1]

    def limited(self, count: int) -> "Images":
        """With at most `count` images in each split; 0: all."""
        return self._mapped(lambda t: t[: count or None])

    def to(self, device: str) -> "Images":
        """All splits on a device."""
        return self._mapped(lambda t: t.to(device))

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> "Images":
        splits = [(change(x), change(y)) for x, y in (self.train, self.validation, self.test)]
        return Images(self.kind, *splits)

    def normalized(self, images: Tensor) -> Tensor:
        """Images of uint8 as float32 with about zero mean and unit variance."""
        mean, std = (torch.tensor(v, device=images.device)[:, None, None] for v in (self.kind.mean, self.kind.std))
        return (images.float() / 255 - mean) / std

    def augmented(self, images: Tensor, random: torch.Generator) -> Tensor:
        """Images of uint8, each cropped and flipped at random as the kind says, and normalized."""
        n, channels, height, width = images.shape
        pad, device = self.kind.padding, images.device
        if pad:
            top, left = torch.randint(2 * pad + 1, (2, n, 1), generator=random).to(device)
            rows = (top + torch.arange(height, device=device))[:, None, :, None]
            columns = (left + torch.arange(width, device=device))[:, None, None, :]
            of_image = torch.arange(n, device=device)[:, None, None, None]
            channel = torch.arange(channels, device=device)[None, :, None, None]
            images = torch.nn.functional.pad(images, (pad,) * 4)[of_image, channel, rows, columns]
        if self.kind.flip:
            flips = (torch.rand(n, generator=random) < 0.5).to(device)
            images = torch.where(flips[:, None, None, None], images.flip(-1), images)
        return self.normalized(images)


def read_digits(folder: Path) -> tuple[Split, Split]:
    """scikit-learn's 1,797 digits of 8x8 pixels; 360 of them are the test images."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError("digits needs scikit-learn: pip install scikit-learn") from error
    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    images = torch.from_numpy((found.images * (255 / 16)).astype(np.uint8)[order])[:, None]
    labels = torch.from_numpy(found.target.astype(np.int64)[order])
    return (images[360:], labels[360:]), (images[:360], labels[:360])


def read_idx(path: Path) -> Tensor:
    """An array of bytes in the idx format of MNIST, packed with gzip or not. Raises UserError for another format."""
    packed = path.with_name(path.name + ".gz")
    if not path.exists() and not packed.exists():
        raise UserError(f"{path}: no such file, nor {packed.name}; --data names the folder of the idx files")
    data = path.read_bytes() if path.exists() else gzip.decompress(packed.read_bytes())
    dimensions = data[3] if len(data) > 3 else 0
    shape = [int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(dimensions)]
    start = 4 + 4 * dimensions
    if data[:3] != b"\0\0\x08" or len(data) - start != np.prod(shape):
        raise UserError(f"{path}: is not a complete idx file of bytes")
    return torch.from_numpy(np.frombuffer(data, np.uint8, offset=start).reshape(shape).copy())


def read_fashion(folder: Path) -> tuple[Split, Split]:
    """Fashion-MNIST (Xiao et al. 2017) from its four idx files."""

    def split(name: str) -> Split:
        images, labels = (read_idx(folder / f"{name}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1"))
        return images[:, None], labels.long()

    return split("train"), split("t10k")


@dataclass(frozen=True)
class CIFAR:
    """The binary archive of an image set of Krizhevsky (2009): records of labels and 3 x 32 x 32 bytes.

    The other archive of the same page holds pickled rows. Unpickling can run code, so it is not read.
    """

    name: str
    md5: str
    train: tuple[str, ...]
    test: str
    labels: int  # in each record; the last one counts, the finest

    def __call__(self, folder: Path) -> tuple[Split, Split]:
        path = folder / self.name
        if not path.exists():
            raise UserError(f"{path}: no such file; get it from https://www.cs.toronto.edu/~kriz/cifar.html")
        data = path.read_bytes()
        if (found := hashlib.md5(data).hexdigest()) != self.md5:
            raise UserError(f"{path}: has MD5 {found} instead of {self.md5}; it is damaged or another file")
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            train = [self._split(archive, member) for member in self.train]
            images, labels = (torch.cat(parts) for parts in zip(*train, strict=True))
            return (images, labels), self._split(archive, self.test)

    def _split(self, archive: tarfile.TarFile, member: str) -> Split:
        file = archive.extractfile(member)
        assert file is not None, f"{member}: not a file"
        records = np.frombuffer(file.read(), np.uint8).reshape(-1, self.labels + 3072)
        images = records[:, self.labels :].reshape(-1, 3, 32, 32)
        return torch.from_numpy(images.copy()), torch.from_numpy(records[:, self.labels - 1].astype(np.int64))


CIFAR10 = CIFAR(
    "cifar-10-binary.tar.gz",
    "c32a1d4ab5d03f1284b67883e8d87530",
    tuple(f"cifar-10-batches-bin/data_batch_{i}.bin" for i in range(1, 6)),
    "cifar-10-batches-bin/test_batch.bin",
    labels=1,
)
CIFAR100 = CIFAR(
    "cifar-100-binary.tar.gz",
    "03b5dce01913d631647c71ecec9e9cb8",
    ("cifar-100-binary/train.bin",),
    "cifar-100-binary/test.bin",
    labels=2,
)
DATASETS = {
    "digits": Dataset(read_digits, (0.305,), (0.376,), 237),
    "fashion": Dataset(read_fashion, (0.286,), (0.353,), 5000, 2, True),
    "cifar10": Dataset(CIFAR10, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010), 5000, 4, True),
    "cifar100": Dataset(CIFAR100, (0.507, 0.487, 0.441), (0.267, 0.256, 0.276), 5000, 4, True, classes=100),
}


def load_images(name: str, folder: str = "") -> Images:
    """An image set of DATASETS from a folder; a fixed random part of the training images is held out.

    Raises UserError, naming the file or the missing package.
    """
    kind = DATASETS[name]
    (images, labels), test = kind.read(Path(folder))
    order = torch.from_numpy(np.random.default_rng(1).permutation(len(labels)))
    held = min(kind.validation, len(labels) // 5)
    validation, train = order[:held], order[held:]
    return Images(kind, (images[train], labels[train]), (images[validation], labels[validation]), test)

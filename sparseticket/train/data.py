"""Data sets and loaders whose every order, split and augmentation is a Philox draw.

``load_dataset`` reads files in place and never the network unless asked to; ``loaders`` gives
(train, val, test) iterables of ``(x, y)`` batches that depend on (seed, epoch) alone, so a run that
is resumed with ``set_epoch`` continues bit for bit.
"""

from __future__ import annotations

import dataclasses
import gzip
import importlib
import io
import lzma
import math
import os
import pickle
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from .. import prng
from ..formats import kept_count

__all__ = [
    "DATASETS",
    "Dataset",
    "ImageFolder",
    "ImageLoader",
    "Split",
    "TensorLoader",
    "load_dataset",
    "loaders",
]

Batches = Iterator[tuple[Tensor, Tensor]]
_IMAGE_SIZE = 224
_EVAL_SHARE = 224 / 256  # resize the short side to 256, take the central 224
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CROP_TRIES = 10
_CROP_WORDS = 2 * _CROP_TRIES + 3
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


@dataclass(frozen=True)
class Split:
    """Images ``x`` float32 [N, C, H, W], normalised, and labels ``y`` int64 [N]."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True)
class ImageFolder:
    """Images decoded when asked for: ``images[i]`` is (float32 [3, 224, 224] normalised, label).

    ``crops`` = (seed, name, epoch) takes RandomResizedCrop(224) + flip drawn for that epoch; None
    takes the central 224 of the image resized to 256. It serves as a torch map-style dataset.
    """

    paths: tuple[Path, ...]
    y: Tensor
    crops: tuple[int, str, int] | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        image_module = _require("PIL.Image", "Pillow", "demo")
        with image_module.open(self.paths[i]) as file:
            image = file.convert("RGB")
        box, flip = _central_box(*image.size), False
        if self.crops is not None:
            seed, name, epoch = self.crops
            layer = prng.layer_id(f"{name}.{i}")
            words = prng.words32(seed, layer, 1, _CROP_WORDS, "augmentation", epoch)[0]
            box, flip = _random_box(*image.size, words)
        size = (_IMAGE_SIZE, _IMAGE_SIZE)
        image = image.resize(size, image_module.Resampling.BILINEAR, box=box)
        if flip:
            image = image.transpose(image_module.Transpose.FLIP_LEFT_RIGHT)
        x = _normalised(np.asarray(image)[None], 255, _IMAGENET_MEAN, _IMAGENET_STD)
        return x[0], int(self.y[i])


@dataclass(frozen=True)
class Dataset:
    """Three splits and what a model and a report need to know of them.

    ``name`` is the one to report: the JPEG copy of CIFAR-10 is ``cifar10-jpeg75``. ``augment`` is
    what training batches get: "none", "crop_flip" (pad 4, crop, flip) or "resized_crop_flip" (image
    folders). x = (pixel/max - mean)/std per channel. ``val`` comes out of the training files.
    """

    name: str
    train: Split | ImageFolder
    val: Split | ImageFolder
    test: Split | ImageFolder
    in_shape: tuple[int, int, int]
    num_classes: int
    augment: str
    mean: tuple[float, ...]
    std: tuple[float, ...]


class _Pixels(NamedTuple):
    """What a reader returns: pixels [N, H, W, C] in 0..maximum and labels [N], train and test."""

    name: str
    train: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]
    maximum: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: str


def load_dataset(
    name: str,
    data_dir: str | os.PathLike[str] | None = None,
    *,
    download: bool = False,
    val_fraction: float = 0.1,
    seed: int = 0,
) -> Dataset:
    """The data set ``name``: digits, mnist, cifar10 or ``imagefolder:PATH``.

    Files are looked for under ``data_dir``, else the environment variable SPARSETICKET_DATA;
    ``download`` lets torchvision fetch mnist or cifar10 into that folder where they are missing.
    ``val`` is the last ``val_fraction`` of a permutation of the training files by ``seed``, and
    ``train`` is the rest in file order; the test split never depends on either argument.
    """
    if not 0 <= val_fraction < 1:
        raise ValueError(f"load_dataset: val_fraction: got {val_fraction}, need a number in [0, 1)")
    root = data_dir if data_dir is not None else os.environ.get("SPARSETICKET_DATA")
    kind, _, path = name.partition(":")
    if kind == "imagefolder" and path:
        return _load_image_folder(name, Path(path), val_fraction, seed)
    if name not in DATASETS:
        known = ", ".join(DATASETS)
        raise ValueError(f"load_dataset: name: got {name!r}, known: {known}, imagefolder:PATH")
    pixels = DATASETS[name](Path(root) if root else None, download)
    images, labels = pixels.train
    train, val = _validation_split(len(labels), val_fraction, seed)

    def split(images: np.ndarray, labels: np.ndarray) -> Split:
        x = _normalised(images, pixels.maximum, pixels.mean, pixels.std)
        return Split(x, torch.from_numpy(labels.astype(np.int64)))

    height, width, channels = images.shape[1:]
    return Dataset(
        name=pixels.name,
        train=split(images[train], labels[train]),
        val=split(images[val], labels[val]),
        test=split(*pixels.test),
        in_shape=(channels, height, width),
        num_classes=10,  # of digits, mnist and cifar10 alike
        augment=pixels.augment,
        mean=pixels.mean,
        std=pixels.std,
    )


def loaders(
    dataset: Dataset, batch_size: int, seed: int, workers: int = 0
) -> tuple[TensorLoader | ImageLoader, TensorLoader | ImageLoader, TensorLoader | ImageLoader]:
    """(train, val, test): train shuffled and augmented by (seed, epoch), the others in order.

    ``workers`` processes decode image folders; sets that lie in memory need none.
    """
    result = []
    for name in ("train", "val", "test"):
        split = getattr(dataset, name)
        train = name == "train"
        if isinstance(split, ImageFolder):
            result.append(ImageLoader(split, batch_size, train, seed, train, name, workers))
            continue
        augment = dataset.augment if train else "none"
        black = torch.tensor([-m / s for m, s in zip(dataset.mean, dataset.std, strict=True)])
        loader = TensorLoader(split.x, split.y, batch_size, train, seed, augment, name, black)
        result.append(loader)
    return tuple(result)


class TensorLoader:
    """Batches of tensors ``x`` [N, C, H, W] and ``y`` [N]; the last one may be smaller.

    ``shuffle`` and ``augment`` ("none" or "crop_flip") are functions of (seed, name, epoch): call
    ``set_epoch`` before each epoch. ``black`` [C] fills what crop_flip pads, as a black pixel does
    before normalisation; 0 if None. Batches are made on the device of ``x``.
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        batch_size: int,
        shuffle: bool,
        seed: int,
        augment: str = "none",
        name: str = "train",
        black: Tensor | None = None,
    ) -> None:
        if len(x) != len(y):
            raise ValueError(f"TensorLoader: got {len(x)} images and {len(y)} labels")
        if augment not in ("none", "crop_flip"):
            raise ValueError(f"TensorLoader: augment: got {augment!r}, known: none, crop_flip")
        self.x, self.y, self.augment = x, y, augment
        self.batch_size, self.shuffle = _check_batch_size(batch_size), shuffle
        self.seed, self.name, self.epoch = prng.check_seed(seed), name, 0
        self.black = (torch.zeros(x.shape[1]) if black is None else black).to(x)

    def __len__(self) -> int:
        return math.ceil(len(self.x) / self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order and the crops that the next ``iter`` draws."""
        self.epoch = epoch

    def __iter__(self) -> Batches:
        n, device = len(self.x), self.x.device
        order = torch.from_numpy(_order(n, self.shuffle, self.seed, self.name, self.epoch))
        order = order.to(device)
        if self.augment == "crop_flip":
            layer = prng.layer_id(self.name)
            words = prng.words32(self.seed, layer, 3, n, "augmentation", self.epoch)
            draws = torch.from_numpy(words.astype(np.int64)).to(device)
        for index in order.split(self.batch_size) if n else ():
            x = self.x[index]
            if self.augment == "crop_flip":
                x = _crop_flip(x, draws[:, index], self.black)
            yield x, self.y[index]


class ImageLoader:
    """Batches of an ``ImageFolder``, contract of ``TensorLoader``; a DataLoader reads them."""

    def __init__(
        self,
        images: ImageFolder,
        batch_size: int,
        shuffle: bool,
        seed: int,
        augment: bool,
        name: str = "train",
        workers: int = 0,
    ) -> None:
        self.images, self.augment, self.workers = images, augment, workers
        self.batch_size, self.shuffle = _check_batch_size(batch_size), shuffle
        self.seed, self.name, self.epoch = prng.check_seed(seed), name, 0

    def __len__(self) -> int:
        return math.ceil(len(self.images) / self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order and the crops that the next ``iter`` draws."""
        self.epoch = epoch

    def __iter__(self) -> Batches:
        crops = (self.seed, self.name, self.epoch) if self.augment else None
        order = _order(len(self.images), self.shuffle, self.seed, self.name, self.epoch)
        batches = DataLoader(
            dataclasses.replace(self.images, crops=crops),
            self.batch_size,
            sampler=order.tolist(),
            num_workers=self.workers,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # else every iter advances torch's global generator
        )
        yield from map(tuple, batches)


def _check_batch_size(batch_size: int) -> int:
    if batch_size < 1:
        raise ValueError(f"batch_size: got {batch_size}, need at least 1")
    return batch_size


def _order(n: int, shuffle: bool, seed: int, name: str, epoch: int) -> np.ndarray:
    return prng.permutation(seed, name, n, draw=epoch) if shuffle else np.arange(n)


def _crop_flip(x: Tensor, draws: Tensor, black: Tensor, pad: int = 4) -> Tensor:
    """``x`` [B, C, H, W] padded, cropped back to H, W and mirrored by 32-bit words [3, B]."""
    batch, channels, height, width = x.shape
    padded = black.view(1, -1, 1, 1).repeat(batch, 1, height + 2 * pad, width + 2 * pad)
    padded[:, :, pad:-pad, pad:-pad] = x
    shift = (draws[:2] * (2 * pad + 1)) >> 32  # [2, B], 0 .. 2*pad
    rows = shift[0, :, None] + torch.arange(height, device=x.device)
    columns = shift[1, :, None] + torch.arange(width, device=x.device)
    columns = torch.where(draws[2, :, None] >= 2**31, columns.flip(1), columns)
    samples = torch.arange(batch, device=x.device).view(-1, 1, 1, 1)
    planes = torch.arange(channels, device=x.device).view(1, -1, 1, 1)
    return padded[samples, planes, rows[:, None, :, None], columns[:, None, None, :]]


def _random_box(width: int, height: int, words: np.ndarray) -> tuple[tuple[int, ...], bool]:
    """RandomResizedCrop's box (left, top, right, bottom) and a coin, from uint32 [23].

    Area 8-100 % of the image, aspect ratio log-uniform in 3/4-4/3, first of ten tries that fits, as
    in torchvision; where none fits, the central square, without torchvision's 3/4-4/3 clamp.
    """
    u = words * 2.0**-32
    area = width * height * (0.08 + 0.92 * u[:_CROP_TRIES])
    ratio = np.exp(math.log(3 / 4) + u[_CROP_TRIES : 2 * _CROP_TRIES] * 2 * math.log(4 / 3))
    w, h = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = np.flatnonzero((w >= 1) & (h >= 1) & (w <= width) & (h <= height))
    right, down, coin = u[2 * _CROP_TRIES :]
    if len(fits) == 0:
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        return (left, top, left + side, top + side), bool(coin < 0.5)
    w, h = int(w[fits[0]]), int(h[fits[0]])
    left, top = int(right * (width - w + 1)), int(down * (height - h + 1))
    return (left, top, left + w, top + h), bool(coin < 0.5)


def _central_box(width: int, height: int) -> tuple[float, ...]:
    """The box that resize(256) + center crop(224) shows, up to their rounding to whole pixels."""
    half = min(width, height) * _EVAL_SHARE / 2
    return (width / 2 - half, height / 2 - half, width / 2 + half, height / 2 + half)


def _normalised(
    pixels: np.ndarray, maximum: int, mean: tuple[float, ...], std: tuple[float, ...]
) -> Tensor:
    """[N, H, W, C] pixels to contiguous float32 [N, C, H, W]: (pixel/maximum - mean)/std."""
    # float32 first, so that the pixels are copied once and changed in place
    planes = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2), dtype=np.float32)
    x = torch.from_numpy(planes).div_(maximum)
    return x.sub_(torch.tensor(mean).view(-1, 1, 1)).div_(torch.tensor(std).view(-1, 1, 1))


def _validation_split(n: int, val_fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sorted indices of (train, val)."""
    order = prng.permutation(seed, "validation", n)
    train = n - kept_count(val_fraction, n)
    return np.sort(order[:train]), np.sort(order[train:])


def _require(module: str, package: str, extra: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"this data set needs {package}: pip install 'sparseticket[{extra}]'"
        ) from error


def _find(
    name: str, root: Path | None, download: bool, candidates: dict[str, Callable[[Path], Any]]
) -> Any:
    """Result of the first reader that accepts its path below ``root``; a reader refuses by None."""

    def look() -> Any:
        for path, reader in candidates.items() if root else ():
            if (root / path).exists() and (found := reader(root / path)) is not None:
                return found
        return None

    found = look()
    if found is None and root and download:
        datasets = _require("torchvision.datasets", "torchvision", "vision")
        fetch = {"mnist": datasets.MNIST, "cifar10": datasets.CIFAR10}[name]
        fetch(root, download=True)
        found = look()
    if found is not None:
        return found
    looked = ", ".join(str(root / path) for path in candidates) if root else "no folder was named"
    raise FileNotFoundError(
        f"{name}: no data found. Accepted: {_ACCEPTED[name]}. Looked in: {looked}. Give the folder "
        "with --data DIR (data_dir=) or SPARSETICKET_DATA; with --download (download=True) "
        "torchvision fetches the files into it"
    )


_ACCEPTED = {
    "mnist": "the four idx files (train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-...), "
    "plain or .gz, in one folder",
    "cifar10": "cifar-10-batches-py/ (pickled), cifar-10-batches-bin/ or cifar10-jpg.tar.xz",
}


def _digits(root: Path | None, download: bool) -> _Pixels:
    """scikit-learn's 1,797 8x8 digits, in its wheel; 1,437 train / 360 test by numpy's seed 0."""
    bunch = _require("sklearn.datasets", "scikit-learn", "demo").load_digits()
    order = np.random.RandomState(0).permutation(len(bunch.target))
    images, labels = bunch.images[order, :, :, None], bunch.target[order]
    train, test = (images[:1437], labels[:1437]), (images[1437:], labels[1437:])
    return _Pixels("digits", train, test, 16, (0.3,), (0.38,), "none")


def _mnist(root: Path | None, download: bool) -> _Pixels:
    """LeCun's idx files; mean and std of specs/strong_tickets.md 1.4."""
    folders = dict.fromkeys((".", "mnist", "MNIST/raw"), _read_mnist)
    train, test = _find("mnist", root, download, folders)
    return _Pixels("mnist", train, test, 255, (0.1307,), (0.3081,), "none")


def _read_mnist(folder: Path) -> list[tuple[np.ndarray, np.ndarray]] | None:
    found = []
    for part in ("train", "t10k"):
        for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"):
            plain = folder / f"{part}-{kind}"
            path = plain if plain.exists() else plain.with_name(plain.name + ".gz")
            if not path.exists():
                return None
            found.append(path)
    arrays = [_read_idx(path) for path in found]
    return [(arrays[0][..., None], arrays[1]), (arrays[2][..., None], arrays[3])]


def _read_idx(path: Path) -> np.ndarray:
    """One idx file of uint8: big-endian magic 0x0000_08_ndim, ndim int32 sizes, then the bytes."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: damaged or cut gzip file ({error}); fetch it again") from error
    ndim = data[3] if len(data) >= 4 and data[:3] == b"\0\0\x08" else 0
    start = 4 + 4 * ndim
    if ndim == 0 or len(data) < start:
        raise ValueError(f"{path}: not an idx file of uint8 (it starts with {data[:4]!r})")
    shape = np.frombuffer(data, ">i4", ndim, offset=4).astype(np.int64)
    if len(data) - start != shape.prod():
        raise ValueError(
            f"{path}: its header promises {shape.prod():,} bytes of shape {shape.tolist()}, the "
            f"file holds {len(data) - start:,}; fetch it again"
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def _cifar10(root: Path | None, download: bool) -> _Pixels:
    """Krizhevsky's batches, pickled or binary, or the JPEG copy; specs/strong_tickets.md 1.4."""
    readers = {
        "cifar-10-batches-py": _read_cifar_pickles,
        "cifar-10-batches-bin": _read_cifar_binary,
        "cifar10-jpg.tar.xz": _read_cifar_jpegs,
    }
    candidates = {
        folder + file: reader for file, reader in readers.items() for folder in ("", "cifar10/")
    }
    name, train, test = _find("cifar10", root, download, candidates)
    mean, std = (0.491, 0.482, 0.447), (0.247, 0.243, 0.262)
    return _Pixels(name, train, test, 255, mean, std, "crop_flip")


_Named = tuple[str, tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


def _read_cifar_batches(
    folder: Path, suffix: str, read: Callable[[Path], tuple[np.ndarray, np.ndarray]]
) -> _Named | None:
    """Five training files and a test file; ``read`` gives ([n, 3072] planar RGB, [n] labels)."""
    names = [f"data_batch_{i}{suffix}" for i in range(1, 6)] + [f"test_batch{suffix}"]
    if not all((folder / name).exists() for name in names):
        return None
    parts = [read(folder / name) for name in names]
    images = [rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1) for rows, _ in parts]
    labels = [labels for _, labels in parts]
    train = np.concatenate(images[:5]), np.concatenate(labels[:5])
    return "cifar10", train, (images[5], labels[5])


def _read_cifar_binary(folder: Path) -> _Named | None:
    def read(path: Path) -> tuple[np.ndarray, np.ndarray]:
        data = np.fromfile(path, np.uint8)
        if data.size % 3073:
            raise ValueError(
                f"{path}: {data.size:,} bytes are no multiple of 3,073; fetch it again"
            )
        records = data.reshape(-1, 3073)
        return records[:, 1:], records[:, 0]

    return _read_cifar_batches(folder, ".bin", read)


def _read_cifar_pickles(folder: Path) -> _Named | None:
    def read(path: Path) -> tuple[np.ndarray, np.ndarray]:
        try:
            with path.open("rb") as file:
                batch = _ArrayUnpickler(file, encoding="latin1").load()  # Python 2 wrote them
            rows, labels = np.asarray(batch["data"]), np.asarray(batch["labels"])
        except (EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
            raise ValueError(f"{path}: not a CIFAR-10 batch ({error!r}); fetch it again") from error
        if rows.dtype != np.uint8 or rows.shape != (len(labels), 3072):
            raise ValueError(f"{path}: got {rows.dtype} {rows.shape}, need uint8 [n, 3072]")
        return rows, labels

    return _read_cifar_batches(folder, "", read)


class _ArrayUnpickler(pickle.Unpickler):
    """Reads plain containers and numpy arrays; any other global, builtins too, is refused."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = {
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
            ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
            ("numpy._core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        }
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a data file")
        return allowed[module, name]


def _read_cifar_jpegs(archive: Path) -> _Named:
    """{train,test}/CLASS/NNNN.jpg, quality 75, class names in label order; read in place, 7 s."""
    image_module = _require("PIL.Image", "Pillow", "demo")
    found: dict[str, list[tuple[str, str, np.ndarray]]] = {"train": [], "test": []}
    try:
        with tarfile.open(archive, "r:xz") as tar:
            for member in tar:
                if member.isfile() and member.name.endswith(".jpg"):
                    part, label, file = member.name.split("/")[-3:]
                    image = image_module.open(io.BytesIO(tar.extractfile(member).read()))
                    found[part].append((label, file, np.asarray(image.convert("RGB"))))
    except (EOFError, KeyError, OSError, lzma.LZMAError, tarfile.TarError) as error:
        raise ValueError(
            f"{archive}: damaged or cut archive ({error!r}); fetch it again"
        ) from error
    classes = sorted({label for label, _, _ in found["train"]})
    splits = []
    for rows in found.values():
        rows.sort(key=lambda row: row[:2])
        labels = np.array([classes.index(label) for label, _, _ in rows])
        splits.append((np.stack([image for _, _, image in rows]), labels))
    return "cifar10-jpeg75", splits[0], splits[1]


DATASETS: dict[str, Callable[[Path | None, bool], _Pixels]] = {
    "digits": _digits,
    "mnist": _mnist,
    "cifar10": _cifar10,
}


def _load_image_folder(name: str, root: Path, val_fraction: float, seed: int) -> Dataset:
    """ROOT/train/CLASS/*.jpg; ROOT/val, else ROOT/test, is the test split, as ImageNet has it."""
    test_folder = root / "val" if (root / "val").is_dir() else root / "test"
    if not (root / "train").is_dir() or not test_folder.is_dir():
        raise FileNotFoundError(
            f"{name}: need {root / 'train'} and {root / 'val'} (or {root / 'test'}), each with one "
            f"folder of images per class ({', '.join(_IMAGE_SUFFIXES)})"
        )
    classes = sorted(path.name for path in (root / "train").iterdir() if path.is_dir())
    train_paths, train_labels = _list_images(root / "train", classes)
    train, val = _validation_split(len(train_paths), val_fraction, seed)
    test_paths, test_labels = _list_images(test_folder, classes)

    def images(paths: list[Path], labels: list[int], index: np.ndarray) -> ImageFolder:
        y = torch.tensor(labels, dtype=torch.int64)[torch.from_numpy(index)]
        return ImageFolder(tuple(paths[i] for i in index), y)

    return Dataset(
        name=f"imagefolder-{root.name}",
        train=images(train_paths, train_labels, train),
        val=images(train_paths, train_labels, val),
        test=images(test_paths, test_labels, np.arange(len(test_paths))),
        in_shape=(3, _IMAGE_SIZE, _IMAGE_SIZE),
        num_classes=len(classes),
        augment="resized_crop_flip",
        mean=_IMAGENET_MEAN,
        std=_IMAGENET_STD,
    )


def _list_images(folder: Path, classes: list[str]) -> tuple[list[Path], list[int]]:
    """Sorted image paths below ``folder``/CLASS and the class numbers of each."""
    extra = {path.name for path in folder.iterdir() if path.is_dir()} - set(classes)
    if extra:
        raise ValueError(f"{folder}: classes {sorted(extra)} are not in the training folder")
    paths, labels = [], []
    for label, name in enumerate(classes):
        files = sorted((folder / name).rglob("*"))
        kept = [path for path in files if path.suffix.lower() in _IMAGE_SUFFIXES]
        paths += kept
        labels += [label] * len(kept)
    if not paths:
        raise FileNotFoundError(f"{folder}: no images ({', '.join(_IMAGE_SUFFIXES)}) below it")
    return paths, labels

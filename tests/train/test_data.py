"""Data sets and loaders: splits, determinism, resume, files that are missing, cut or hostile."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sparseticket.train import data
from sparseticket.train.data import ImageLoader, TensorLoader, load_dataset, loaders

PIL_Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed ([demo])")


@pytest.fixture
def holding(data_dir, require) -> Callable[[str], Path]:
    """The folder of real data, if it holds ``file``."""

    def folder(file: str) -> Path:
        if not (data_dir / file).exists():
            require("data", f"no {data_dir / file}; set SPARSETICKET_DATA")
        return data_dir

    return folder


def _batches(loader, epoch: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    loader.set_epoch(epoch)
    return list(loader)


def _same(first, second) -> bool:
    pairs = zip(first, second, strict=True)
    return all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in pairs)


def _numbered(n: int, augment: str = "none", **kwargs) -> TensorLoader:
    x = torch.arange(n, dtype=torch.float32).view(n, 1, 1, 1).expand(n, 2, 6, 5).contiguous()
    return TensorLoader(x, torch.arange(n), 16, True, 7, augment, **kwargs)


def test_digits_follow_the_recipe():
    sklearn_datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn is missing")
    digits = load_dataset("digits", val_fraction=0)
    assert (len(digits.train), len(digits.val), len(digits.test)) == (1437, 0, 360)
    assert (digits.name, digits.in_shape, digits.num_classes) == ("digits", (1, 8, 8), 10)
    assert (digits.augment, digits.mean, digits.std) == ("none", (0.3,), (0.38,))
    assert digits.train.x.shape == (1437, 1, 8, 8)
    assert digits.val.x.shape == (0, 1, 8, 8)
    assert (digits.train.x.dtype, digits.train.y.dtype) == (torch.float32, torch.int64)
    raw = sklearn_datasets.load_digits()
    order = np.random.RandomState(0).permutation(1797)
    expected = torch.from_numpy((raw.data[order] / 16 - 0.3) / 0.38).float()
    torch.testing.assert_close(digits.train.x.flatten(1), expected[:1437])
    torch.testing.assert_close(digits.test.x.flatten(1), expected[1437:])
    assert torch.equal(digits.test.y, torch.from_numpy(raw.target[order][1437:]))


def test_validation_is_taken_from_train_and_depends_on_the_seed_alone():
    whole, first = load_dataset("digits", val_fraction=0), load_dataset("digits")
    again, other = load_dataset("digits"), load_dataset("digits", seed=1)
    assert (len(first.train), len(first.val), len(first.test)) == (1293, 144, 360)
    assert torch.equal(first.val.x, again.val.x)
    assert not torch.equal(first.val.x, other.val.x)
    assert torch.equal(first.test.x, other.test.x)
    rows = sorted(map(tuple, torch.cat([first.train.x, first.val.x]).flatten(1).tolist()))
    assert rows == sorted(map(tuple, whole.train.x.flatten(1).tolist()))


def test_every_sample_once_an_epoch():
    loader = _numbered(100)
    batches = _batches(loader)
    assert [len(y) for _, y in batches] == [16] * 6 + [4]
    assert len(loader) == 7
    assert torch.cat([y for _, y in batches]).sort().values.equal(torch.arange(100))
    assert all(torch.equal(x[:, 0, 0, 0], y.float()) for x, y in batches)


@pytest.mark.parametrize("augment", ["none", "crop_flip"])
def test_batches_are_a_function_of_seed_and_epoch(augment):
    loader, resumed = _numbered(40, augment), _numbered(40, augment)
    epochs = [_batches(loader, epoch) for epoch in range(3)]
    torch.rand(5)  # torch's generator plays no part
    assert _same(_batches(resumed, 2), epochs[2])
    assert _same(_batches(loader, 0), epochs[0])
    assert not _same(epochs[0], epochs[1])
    other = TensorLoader(loader.x, loader.y, 16, True, 8, augment)
    assert not _same(_batches(other), epochs[0])


def test_unshuffled_loader_keeps_the_order_and_an_empty_one_yields_nothing():
    x = torch.randn(5, 1, 2, 2)
    loader = TensorLoader(x, torch.arange(5), 2, False, 0)
    assert torch.equal(torch.cat([x for x, _ in loader]), x)
    assert _same(_batches(loader, 0), _batches(loader, 1))
    empty = TensorLoader(x[:0], torch.arange(0), 2, True, 0, "crop_flip")
    assert (len(empty), list(empty)) == (0, [])


def test_crop_flip_shows_a_window_of_the_padded_image_or_its_mirror():
    x = torch.arange(1.0, 1 + 300 * 2 * 5 * 6).view(300, 2, 5, 6)
    loader = TensorLoader(x, torch.arange(300), 300, False, 0, "crop_flip", black=torch.zeros(2))
    ((crops, _),) = list(loader)
    padded = torch.nn.functional.pad(x, (4, 4, 4, 4))
    seen = set()
    for crop, image in zip(crops, padded, strict=True):
        windows = {
            (top, left, flip): window.flip(2) if flip else window
            for top in range(9)
            for left in range(9)
            for flip in (False, True)
            for window in [image[:, top : top + 5, left : left + 6]]
        }
        matches = [key for key, window in windows.items() if torch.equal(window, crop)]
        assert matches
        seen.add(matches[0])
    assert {top for top, _, _ in seen} == {left for _, left, _ in seen} == set(range(9))
    assert {flip for _, _, flip in seen} == {False, True}


def test_crop_flip_pads_with_black():
    black = torch.tensor([-1.5, -2.5])
    x = torch.zeros(64, 2, 4, 4)
    ((crops, _),) = list(TensorLoader(x, torch.arange(64), 64, False, 0, "crop_flip", black=black))
    for channel in range(2):
        assert set(crops[:, channel].unique().tolist()) == {black[channel].item(), 0.0}


def test_loaders_shuffle_train_only():
    digits = load_dataset("digits")
    train, val, test = loaders(digits, 64, seed=3)
    assert (len(train), len(val), len(test)) == (21, 3, 6)
    assert torch.equal(torch.cat([y for _, y in val]), digits.val.y)
    assert torch.equal(torch.cat([x for x, _ in test]), digits.test.x)
    assert not torch.equal(torch.cat([y for _, y in train]), digits.train.y)


def test_bad_arguments():
    with pytest.raises(
        ValueError, match=r"'svhn', known: digits, mnist, cifar10, imagefolder:PATH"
    ):
        load_dataset("svhn")
    with pytest.raises(ValueError, match=r"val_fraction: got 1\.5"):
        load_dataset("digits", val_fraction=1.5)
    with pytest.raises(ValueError, match="batch_size: got 0"):
        TensorLoader(torch.zeros(1, 1, 1, 1), torch.zeros(1), 0, False, 0)
    with pytest.raises(ValueError, match="augment: got 'mixup'"):
        TensorLoader(torch.zeros(1, 1, 1, 1), torch.zeros(1), 1, False, 0, "mixup")
    with pytest.raises(ValueError, match="1 images and 2 labels"):
        TensorLoader(torch.zeros(1, 1, 1, 1), torch.zeros(2), 1, False, 0)


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_missing_files_say_where_and_what(name, tmp_path, monkeypatch):
    monkeypatch.delenv("SPARSETICKET_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match=r"no folder was named.*--data DIR.*--download"):
        load_dataset(name)
    accepted = {"mnist": "train-images-idx3-ubyte", "cifar10": "cifar10-jpg.tar.xz"}[name]
    with pytest.raises(FileNotFoundError, match="SPARSETICKET_DATA") as error:
        load_dataset(name, tmp_path)
    assert accepted in str(error.value)
    assert str(tmp_path / name) in str(error.value)
    monkeypatch.setenv("SPARSETICKET_DATA", str(tmp_path / "elsewhere"))
    with pytest.raises(FileNotFoundError, match="elsewhere"):
        load_dataset(name)


def test_missing_packages_name_the_extra(tmp_path, monkeypatch):
    def refuse(module: str):
        raise ImportError(module)

    monkeypatch.setattr(data.importlib, "import_module", refuse)
    with pytest.raises(ImportError, match=r"scikit-learn.*sparseticket\[demo\]"):
        load_dataset("digits")
    with pytest.raises(ImportError, match=r"torchvision.*sparseticket\[vision\]"):
        load_dataset("mnist", tmp_path, download=True)


def _idx(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
    return header + array.astype(np.uint8).tobytes()


def _write_mnist(folder: Path, zipped: bool) -> None:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part, n in (("train", 30), ("t10k", 10)):
        arrays = {
            "images-idx3-ubyte": rng.integers(0, 256, (n, 28, 28)),
            "labels-idx1-ubyte": np.arange(n) % 10,
        }
        for kind, array in arrays.items():
            raw = _idx(array)
            path = folder / f"{part}-{kind}{'.gz' if zipped else ''}"
            path.write_bytes(gzip.compress(raw) if zipped else raw)


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("folder", ["", "mnist", "MNIST/raw"])
def test_mnist_layouts(folder, zipped, tmp_path):
    _write_mnist(tmp_path / "root" / folder, zipped)
    mnist = load_dataset("mnist", tmp_path / "root", val_fraction=0.2)
    assert (len(mnist.train), len(mnist.val), len(mnist.test)) == (24, 6, 10)
    assert mnist.in_shape == (1, 28, 28)
    assert mnist.test.y.tolist() == list(range(10))


def test_download_fetches_what_is_missing_and_nothing_else(tmp_path, monkeypatch):
    calls = []

    def fetch(root: Path, download: bool) -> None:
        calls.append((root, download))
        _write_mnist(root / "MNIST/raw", zipped=True)

    torchvision = SimpleNamespace(MNIST=fetch, CIFAR10=None)
    monkeypatch.setattr(data, "_require", lambda *_: torchvision)
    for _ in range(2):
        assert len(load_dataset("mnist", tmp_path, download=True).test) == 10
    assert calls == [(tmp_path, True)]


def test_cut_idx_files_are_refused(tmp_path):
    root = tmp_path / "root"
    _write_mnist(root, zipped=False)
    path = root / "t10k-images-idx3-ubyte"
    whole = path.read_bytes()
    for cut, message in ((-5, "promises 7,840 bytes .* holds 7,835"), (9, "not an idx file")):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=message):
            load_dataset("mnist", root)
    path.write_bytes(b"<html>")
    with pytest.raises(ValueError, match="not an idx file"):
        load_dataset("mnist", root)
    path.unlink()
    path.with_name(path.name + ".gz").write_bytes(gzip.compress(whole)[:-50])
    with pytest.raises(ValueError, match="damaged or cut gzip"):
        load_dataset("mnist", root)


def _python2_batch(rows: np.ndarray, labels: list[int]) -> bytes:
    """A protocol-2 pickle as Python 2 wrote CIFAR-10's: its str are byte strings (opcodes U, T)."""
    n = len(rows)
    reconstruct = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01bt\x52"
    dtype = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xff"
    dtype += b"J\xff\xff\xff\xffK\x00tb"
    shape = b"K" + bytes([n]) + b"M\x00\x0c\x86"
    pixels = b"T" + rows.nbytes.to_bytes(4, "little") + rows.tobytes()
    array = reconstruct + b"(K\x01" + shape + dtype + b"\x89" + pixels + b"tb"
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(U\x04data" + array + b"U\x06labels" + numbers + b"u."


def _cifar_rows() -> tuple[list[str], np.ndarray, np.ndarray]:
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    rng = np.random.default_rng(1)
    rows = rng.integers(0, 256, (6, 4, 3072), dtype=np.uint8)
    return names, rows, rng.integers(0, 10, (6, 4))


def test_cifar10_pickled_and_binary_agree(tmp_path):
    names, rows, labels = _cifar_rows()
    pickled, binary = (
        tmp_path / "a/cifar-10-batches-py",
        tmp_path / "b/cifar10/cifar-10-batches-bin",
    )
    pickled.mkdir(parents=True)
    binary.mkdir(parents=True)
    for name, batch, numbers in zip(names, rows, labels, strict=True):
        (pickled / name).write_bytes(_python2_batch(batch, numbers.tolist()))
        records = np.concatenate([numbers[:, None].astype(np.uint8), batch], axis=1)
        (binary / f"{name}.bin").write_bytes(records.tobytes())
    first, second = load_dataset("cifar10", tmp_path / "a"), load_dataset("cifar10", tmp_path / "b")
    assert (first.name, first.augment, first.in_shape) == ("cifar10", "crop_flip", (3, 32, 32))
    assert (len(first.train), len(first.val), len(first.test)) == (18, 2, 4)
    for part in ("train", "val", "test"):
        assert torch.equal(getattr(first, part).x, getattr(second, part).x)
        assert torch.equal(getattr(first, part).y, getattr(second, part).y)
    green = rows[5, 2].reshape(3, 32, 32)[1, 7, 30]
    assert first.test.x[2, 1, 7, 30].item() == pytest.approx((green / 255 - 0.482) / 0.243)
    train = loaders(first, 8, seed=0)[0]
    assert train.black.tolist() == pytest.approx([-0.491 / 0.247, -0.482 / 0.243, -0.447 / 0.262])
    (binary / "test_batch.bin").write_bytes(b"123")
    with pytest.raises(ValueError, match="no multiple of 3,073"):
        load_dataset("cifar10", tmp_path / "b")


def test_cifar10_modern_pickles_are_read_too(tmp_path):
    names, rows, labels = _cifar_rows()
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name, batch, numbers in zip(names, rows, labels, strict=True):
        content = {"data": batch, "labels": numbers.tolist()}
        (folder / name).write_bytes(pickle.dumps(content, protocol=4))
    assert len(load_dataset("cifar10", tmp_path).test) == 4
    (folder / "test_batch").write_bytes((folder / "test_batch").read_bytes()[:1000])
    with pytest.raises(ValueError, match="not a CIFAR-10 batch"):
        load_dataset("cifar10", tmp_path)


class _Hostile:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def test_hostile_pickle_runs_nothing(tmp_path):
    target = tmp_path / "touched"
    for payload in (_Hostile(os.mkdir, str(target)), _Hostile(eval, "1"), _Hostile(getattr, 1, "")):
        raw = pickle.dumps({"data": payload, "labels": []})
        with pytest.raises(pickle.UnpicklingError, match="no place in a data file"):
            data._ArrayUnpickler(io.BytesIO(raw)).load()
    assert not target.exists()


def test_cifar10_jpeg_copy_in_small(tmp_path):
    classes = [f"class{i}" for i in range(10)]
    archive = tmp_path / "cifar10-jpg.tar.xz"
    with tarfile.open(archive, "w:xz") as tar:
        for part, copies in (("test", 1), ("train", 2)):
            for label in reversed(range(10)):
                for i in range(copies):
                    buffer = io.BytesIO()
                    PIL_Image.new("RGB", (32, 32), (20 * label, 0, 255)).save(buffer, "JPEG")
                    info = tarfile.TarInfo(f"{part}/{classes[label]}/{i:04}.jpg")
                    info.size = len(buffer.getvalue())
                    tar.addfile(info, io.BytesIO(buffer.getvalue()))
    cifar = load_dataset("cifar10", tmp_path, val_fraction=0)
    assert cifar.name == "cifar10-jpeg75"
    assert cifar.train.y.tolist() == [i for i in range(10) for _ in range(2)]
    red = (cifar.test.x[:, 0, 16, 16] * 0.247 + 0.491) * 255
    torch.testing.assert_close(red, 20.0 * torch.arange(10), atol=3, rtol=0)
    archive.write_bytes(archive.read_bytes()[:-200])
    with pytest.raises(ValueError, match="damaged or cut archive"):
        load_dataset("cifar10", tmp_path)


def test_real_mnist(holding):
    mnist = load_dataset("mnist", holding("mnist/train-images-idx3-ubyte.gz"), val_fraction=0)
    assert (len(mnist.train), len(mnist.test)) == (60_000, 10_000)
    assert mnist.train.y[:8].tolist() == [5, 0, 4, 1, 9, 2, 1, 3]
    assert mnist.train.x.mean().item() == pytest.approx(0, abs=1e-3)
    assert mnist.train.x.std().item() == pytest.approx(1, abs=1e-3)


def test_real_cifar10_jpeg_copy(holding):
    cifar = load_dataset("cifar10", holding("cifar10/cifar10-jpg.tar.xz"))
    assert cifar.name == "cifar10-jpeg75"
    assert (len(cifar.train), len(cifar.val), len(cifar.test)) == (45_000, 5_000, 10_000)
    assert cifar.test.y.bincount().tolist() == [1000] * 10
    assert cifar.train.x.mean().item() == pytest.approx(0, abs=0.01)
    train = loaders(cifar, 128, seed=0)[0]
    x, y = next(iter(train))
    assert (x.shape, y.shape, len(train)) == ((128, 3, 32, 32), (128,), 352)


def _write_folder(root: Path, test_name: str = "val") -> Path:
    rng = np.random.default_rng(2)
    for part, copies in (("train", 5), (test_name, 2)):
        for name in ("cat", "ant"):
            (root / part / name).mkdir(parents=True)
            for i in range(copies):
                pixels = rng.integers(0, 256, (40 + i, 60, 3), dtype=np.uint8)
                image = PIL_Image.fromarray(pixels).convert("L" if i == 0 else "RGB")
                image.save(root / part / name / f"{i}.{'JPEG' if i else 'png'}")
    (root / "train" / "cat" / "notes.txt").write_text("no image")
    return root


@pytest.mark.parametrize("test_name", ["val", "test"])
def test_image_folder(test_name, tmp_path):
    folder = load_dataset(f"imagefolder:{_write_folder(tmp_path / 'pets', test_name)}")
    assert (folder.name, folder.num_classes) == ("imagefolder-pets", 2)
    assert (folder.in_shape, folder.augment) == ((3, 224, 224), "resized_crop_flip")
    assert (len(folder.train), len(folder.val), len(folder.test)) == (9, 1, 4)
    assert folder.test.y.tolist() == [0, 0, 1, 1]
    assert not set(folder.train.paths) & set(folder.val.paths)
    train, val, test = loaders(folder, 4, seed=0)
    assert isinstance(train, ImageLoader)
    assert (len(train), len(val), len(test)) == (3, 1, 1)
    ((x, y),) = list(test)
    assert (x.shape, x.dtype, y.tolist()) == ((4, 3, 224, 224), torch.float32, [0, 0, 1, 1])
    assert _same(_batches(test, 0), _batches(test, 1))


def test_image_folder_is_a_function_of_seed_and_epoch(tmp_path):
    folder = load_dataset(f"imagefolder:{_write_folder(tmp_path)}", val_fraction=0)
    train, val, _ = loaders(folder, 4, seed=0)
    assert (len(val), list(val)) == (0, [])
    state = torch.get_rng_state()
    epochs = [_batches(train, epoch) for epoch in range(2)]
    assert torch.equal(torch.get_rng_state(), state)
    assert sum(len(y) for _, y in epochs[0]) == 10
    assert not _same(epochs[0], epochs[1])
    with_workers = loaders(folder, 4, seed=0, workers=1)[0]
    assert _same(_batches(with_workers, 1), epochs[1])
    assert not _same(_batches(loaders(folder, 4, seed=1)[0]), epochs[0])


def test_central_crop_equals_resize_then_crop(tmp_path):
    gradient = np.broadcast_to(np.arange(240, dtype=np.uint8)[:, None, None], (240, 300, 3))
    for part in ("train", "val"):
        (tmp_path / part / "a").mkdir(parents=True)
        PIL_Image.fromarray(np.ascontiguousarray(gradient)).save(tmp_path / part / "a" / "0.png")
    x, label = load_dataset(f"imagefolder:{tmp_path}", val_fraction=0).test[0]
    resized = PIL_Image.fromarray(np.ascontiguousarray(gradient)).resize((320, 256), 2)
    expected = np.asarray(resized.crop((48, 16, 272, 240)))[..., 0]
    red = (x[0] * 0.229 + 0.485) * 255
    torch.testing.assert_close(red, torch.from_numpy(expected.copy()).float(), atol=1.1, rtol=0)
    assert label == 0


def test_random_boxes_fit_and_cover_8_to_100_percent():
    rng = np.random.default_rng(3)
    areas, flips = [], []
    for width, height in ((60, 40), (224, 224), (5, 300), (1, 1)):
        for _ in range(200):
            words = rng.integers(0, 2**32, 23, dtype=np.uint32)
            (left, top, right, bottom), flip = data._random_box(width, height, words)
            assert 0 <= left < right <= width
            assert 0 <= top < bottom <= height
            if width == 224:
                areas.append((right - left) * (bottom - top) / (width * height))
                flips.append(flip)
    assert 0.07 < min(areas) < 0.15
    assert 0.85 < max(areas) <= 1
    assert 0.4 < np.mean(flips) < 0.6


def test_bad_image_folders(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"train.*val.*test.*one folder of images per class"
    ):
        load_dataset(f"imagefolder:{tmp_path}")
    root = _write_folder(tmp_path)
    (root / "val" / "dog").mkdir()
    with pytest.raises(ValueError, match=r"'dog'.*not in the training folder"):
        load_dataset(f"imagefolder:{root}")
    (root / "val" / "dog").rmdir()
    for path in (root / "val").rglob("*.*"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match="no images"):
        load_dataset(f"imagefolder:{root}")

"""What is built from a clean tree: the wheel, the sdist, and the wheel of the sdist."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("bench", "configs", "csrc", "docs", "kernels", "sparseticket", "tests")
NOT_SHIPPED = {".ci/run", ".clang-format", ".gitignore"}
SCRIPT = """
import sys
from pathlib import Path

import torch

import sparseticket as st
import sparseticket.cli
import sparseticket.kernels

installed = Path(sys.argv[1])
for module in (st, st._C, st.kernels):
    assert Path(module.__file__).resolve().is_relative_to(installed), module
mask = st.select_mask(torch.arange(9.0 * 70).view(9, 70), density=0.3)
assert mask.kept == 189 and bool(mask.to_dense().flatten()[-189:].all())
layer = st.SparseLinear(70, 9, bias=False, mask=mask, seed=7, layer="fc1", form="ticket")
assert not any(p.is_floating_point() for p in layer.state_dict().values() if p.ndim > 1)
weight = torch.where(mask.to_dense(), st.regenerate(7, "fc1", (9, 70), sigma=1.0), 0).double()
weight *= layer.weight.abs().max()
x = torch.randn(3, 70)
assert torch.equal(layer.weight.double(), weight)
assert torch.allclose(layer(x).double(), x.double() @ weight.t(), rtol=0, atol=1e-5)
print("works")
"""


def _run(*args: str | Path, cwd: Path, **env: str) -> str:
    given = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    run = subprocess.run(
        [sys.executable, "-P", *map(str, args)],
        cwd=cwd,
        env={**given, "SPARSETICKET_BUILD_JOBS": "2", "PIP_DISABLE_PIP_VERSION_CHECK": "1", **env},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert run.returncode == 0, f"{args}\n{run.stdout}\n{run.stderr}"
    return run.stdout


def _names(folder: Path) -> set[str]:
    """Relative paths of the tree's own files below ``folder``; a checkout says which they are."""
    git = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    if (folder / ".git").exists() and shutil.which("git"):
        listed = subprocess.run(git, cwd=folder, capture_output=True, text=True, check=True).stdout
        return {name for name in listed.split("\0") if name and (folder / name).is_file()}
    made = re.compile(r"__pycache__|\.so$|\.egg-info|^(PKG-INFO|setup\.cfg)$|^\.venv/")
    files = [p for p in folder.iterdir() if p.is_file()]
    files += [p for name in FOLDERS for p in (folder / name).rglob("*") if p.is_file()]
    names = {p.relative_to(folder).as_posix() for p in files}
    return {name for name in names if not made.search(name)}


def _wheel(tree: Path, out: Path) -> Path:
    options = ("--no-build-isolation", "--no-deps", "--no-index", "--no-cache-dir")
    _run("-m", "pip", "wheel", *options, "--wheel-dir", out, tree, cwd=out.parent)
    (wheel,) = out.iterdir()
    return wheel


@pytest.fixture(scope="session")
def clean_tree(tmp_path_factory) -> Path:
    """A copy of what git would commit, nothing built in it."""
    for module in ("build", "pip", "pybind11", "setuptools"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"needs build: {module} is not installed; pip install -e '.[dev]'")
    compiler = os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++"
    if shutil.which(compiler.split()[0]) is None:
        pytest.skip(f"needs build: there is no C++ compiler {compiler!r}")
    tree = tmp_path_factory.mktemp("clean") / "tree"
    for name in _names(ROOT):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, tree / name)
    return tree


@pytest.fixture(scope="session")
def tree_names(clean_tree) -> set[str]:
    return _names(clean_tree)


@pytest.fixture(scope="session")
def sdist(clean_tree, tree_names, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("sdist") / "dist"
    _run("-m", "build", "--no-isolation", "--sdist", "--outdir", out, clean_tree, cwd=out.parent)
    (archive,) = out.iterdir()
    return archive


@pytest.fixture(scope="session")
def wheel(clean_tree, tree_names, tmp_path_factory) -> Path:
    return _wheel(clean_tree, tmp_path_factory.mktemp("wheel") / "dist")


@pytest.fixture(scope="session")
def sdist_wheel(sdist, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    return _wheel(folder / sdist.name.removesuffix(".tar.gz"), folder / "dist")


def _contents(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def _expected_in_wheel(tree_names: set[str]) -> set[str]:
    python = {n for n in tree_names if n.startswith("sparseticket/") and n.endswith(".py")}
    kernels = {n for n in tree_names if n.startswith("kernels/") and n.endswith((".py", ".json"))}
    assert len(python) > 40
    assert "kernels/__init__.py" in kernels
    data = {"sparseticket/normal_quantiles.f32", "sparseticket/py.typed"}
    return python | data | {f"sparseticket/{name}" for name in kernels}


def _check_works(wheel: Path, folder: Path) -> None:
    target, outside = folder / "target", folder / "outside"
    outside.mkdir()
    options = ("--no-deps", "--no-index", "--no-cache-dir", "--target")
    _run("-m", "pip", "install", *options, target, wheel, cwd=outside)
    script = ("-c", SCRIPT, target.resolve())
    assert _run(*script, cwd=outside, PYTHONPATH=str(target)) == "works\n"
    version = wheel.name.split("-")[1]
    told = _run("-m", "sparseticket", "--help", cwd=outside, PYTHONPATH=str(target))
    assert "usage: " in told
    assert (target / f"sparseticket-{version}.dist-info").is_dir()


def test_wheel_holds_the_tree_and_nothing_else(wheel, tree_names):
    contents = _contents(wheel)
    assert len(contents) == len(set(contents))
    info = re.compile(rf"{'-'.join(wheel.name.split('-')[:2])}\.dist-info/")
    compiled = [n for n in contents if re.fullmatch(r"sparseticket/_C\.[\w-]+\.so", n)]
    assert len(compiled) == 1
    rest = {n for n in contents if not info.match(n)} - set(compiled)
    assert rest == _expected_in_wheel(tree_names)


def test_wheel_metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        info = "-".join(wheel.name.split("-")[:2]) + ".dist-info"
        assert archive.read(f"{info}/top_level.txt").split() == [b"sparseticket"]
        assert b"sparseticket = sparseticket.cli:main" in archive.read(f"{info}/entry_points.txt")
        assert b"Root-Is-Purelib: false" in archive.read(f"{info}/WHEEL")
        assert archive.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
        description = archive.read(f"{info}/METADATA").decode()
    assert re.search(r"^Requires-Dist: torch>=", description, re.MULTILINE)
    assert re.search(r"^Requires-Dist: pytest; extra == .dev.$", description, re.MULTILINE)


def test_wheel_works_outside_the_tree(wheel, tmp_path):
    _check_works(wheel, tmp_path)


def test_sdist_holds_the_tree(sdist, tree_names):
    prefix = sdist.name.removesuffix(".tar.gz") + "/"
    with tarfile.open(sdist) as archive:
        contents = {m.name.removeprefix(prefix) for m in archive.getmembers() if m.isfile()}
    assert tree_names - contents == NOT_SHIPPED & tree_names
    made = {"PKG-INFO", "setup.cfg"}
    assert {n for n in contents - tree_names if ".egg-info/" not in n} == made
    for needed in ("csrc/core/core.h", "kernels/__init__.py", "bench/cases.py", "constraints.txt"):
        assert needed in contents
    assert "tests/test_packaging.py" in contents


def test_wheel_of_the_sdist_is_the_same_and_works(sdist_wheel, wheel, tmp_path):
    assert set(_contents(sdist_wheel)) == set(_contents(wheel))
    with zipfile.ZipFile(sdist_wheel) as ours, zipfile.ZipFile(wheel) as other:
        for name in _contents(wheel):
            if not name.endswith((".so", "/RECORD", "/METADATA")):
                assert ours.read(name) == other.read(name), name
    _check_works(sdist_wheel, tmp_path)

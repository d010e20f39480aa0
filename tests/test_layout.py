"""The tree against its own rules: floors, one name per op, what an import does, what ships."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import sparseticket as st
from bench.cases import CASES
from sparseticket import _C, _build, ops

ROOT = Path(__file__).resolve().parents[1]

# A unit is a package or a top-level module; __main__ is the cli's other door.
FLOORS = {
    **dict.fromkeys(["reference", "kernels"], 0),
    **dict.fromkeys(["prng", "formats", "densities"], 1),
    **dict.fromkeys(["ops"], 2),
    **dict.fromkeys(["masks", "nn", "optim"], 3),
    **dict.fromkeys(["tickets", "io", "theory"], 4),
    **dict.fromkeys(["train"], 5),
    **dict.fromkeys(["cli", "__main__"], 6),
}
SAME_FLOOR = {
    ("nn", "masks"): "modules hold packed masks",
    ("optim", "nn"): "optimizers select the masks of modules",
    ("__main__", "cli"): "python -m sparseticket is the command",
}
EXEMPT_FILES = {
    "__init__.py": "re-exports, lazily where it reaches up",
    "_build.py": "the package itself imports it before anything else, to load _C",
}
DOORS = {"torch.library": {"ops"}, "sparseticket._C": {"ops"}, "sparseticket.kernels": {"ops"}}


# ---------------------------------------------- reading imports
def _sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def _imports(text: str, package: list[str]) -> Iterator[str]:
    """Dotted names that a module of ``package`` imports: ``module.name`` for every from-import."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and _called(node) in ("import_module", "__import__"):
            if isinstance(first := node.args[0], ast.Constant):
                yield str(first.value)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.library":
            yield "torch.library"


def _called(node: ast.Call) -> str:
    return ast.unparse(node.func).split(".")[-1]


def _package_of(path: Path) -> list[str]:
    parts = list(path.relative_to(ROOT).parent.parts)
    return ["sparseticket", *parts] if parts[0] == "kernels" else parts


def _unit_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0] if parts[0] == "kernels" else parts[1]


def _target(name: str) -> str | None:
    """The unit that ``sparseticket.<...>`` belongs to; None for what is not ours or is loose."""
    parts = name.split(".")
    if parts[0] != "sparseticket" or name in ("sparseticket._C", "sparseticket.__version__"):
        return None
    if len(parts) == 1:
        return "sparseticket"  # the whole package: every floor
    return st._HOME.get(parts[1], parts[1])


def _violations(unit: str, package: list[str], text: str) -> Iterator[str]:
    for name in _imports(text, package):
        target = _target(name)
        if target is None or target == unit or (unit, target) in SAME_FLOOR:
            continue
        if target not in FLOORS or FLOORS[target] >= FLOORS[unit]:
            yield f"floor {FLOORS[unit]} ({unit}) imports {name}"


def test_every_file_has_a_floor():
    files = [p for p in _sources("sparseticket") if p.name not in EXEMPT_FILES]
    assert {_unit_of(p) for p in files} <= set(FLOORS)
    names = {p.name for p in _sources("sparseticket")}
    assert names >= set(EXEMPT_FILES), "an exemption is no longer needed"


def test_files_import_only_from_lower_floors():
    used, found = set(), []
    for path in [*_sources("sparseticket"), *_sources("kernels")]:
        if path.name in EXEMPT_FILES:
            continue
        unit, text = _unit_of(path), path.read_text()
        found += [
            f"{path.relative_to(ROOT)}: {v}" for v in _violations(unit, _package_of(path), text)
        ]
        used |= {(unit, _target(name)) for name in _imports(text, _package_of(path))}
    assert not found
    assert used >= set(SAME_FLOOR), "an exemption is no longer needed"


@pytest.mark.parametrize(
    ("unit", "line", "allowed"),
    [
        ("nn", "from ..masks import PackedMask", True),
        ("nn", "from .linear import SparseLinear", True),
        ("nn", "from .. import ops, __version__", True),
        ("nn", "from ..tickets import EdgePopup", False),
        ("nn", "from sparseticket import EdgePopup", False),
        ("io", "from .. import search", False),
        ("io", "from sparseticket.tickets import METHODS", False),
        ("io", "def f():\n    from ..train import loop", False),
        ("ops", "import sparseticket.reference.philox", True),
        ("ops", "import sparseticket as st", False),
        ("ops", "import importlib\nimportlib.import_module('sparseticket.masks')", False),
        ("reference", "from ..prng import philox", False),
        ("kernels", "from sparseticket.reference import philox", False),
    ],
)
def test_the_reader_of_imports_sees_violations(unit, line, allowed):
    assert (not list(_violations(unit, ["sparseticket", unit], line))) == allowed


@pytest.mark.parametrize("door", DOORS)
def test_only_ops_opens(door):
    users = {
        _unit_of(path)
        for path in [*_sources("sparseticket"), *_sources("kernels")]
        if path.name not in EXEMPT_FILES
        and _unit_of(path) != door.split(".")[-1]
        and any(
            f"{name}.".startswith(f"{door}.")
            for name in _imports(path.read_text(), _package_of(path))
        )
    }
    assert users == DOORS[door]


def test_floor_zero_needs_little():
    third_party = {"reference": {"numpy", "torch"}, "kernels": {"torch", "triton"}}
    for folder, accepted in {"sparseticket/reference": "reference", "kernels": "kernels"}.items():
        paths = _sources(folder)
        assert paths
        for path in paths:
            tops = {name.split(".")[0] for name in _imports(path.read_text(), _package_of(path))}
            outside = tops - {"sparseticket"} - set(sys.stdlib_module_names)
            assert outside <= third_party[accepted], path


def test_core_includes_neither_python_nor_torch():
    files = [p for p in (ROOT / "csrc/core").iterdir() if p.suffix in (".h", ".cpp")]
    assert files
    for path in files:
        for name in re.findall(r'#\s*include\s*"([^"]+)"', path.read_text()):
            assert (ROOT / "csrc/core" / name).is_file() and "/" not in name, (path, name)
        for name in re.findall(r"#\s*include\s*<([^>]+)>", path.read_text()):
            # no <algorithm> or containers: the linker would keep one level's copy for all of them
            assert re.fullmatch(r"c[a-z]+|immintrin\.h|omp\.h", name), (path, name)


def test_nothing_imports_tests_or_bench():
    tests = {"tests", "conftest", *(p.stem for p in _sources("tests"))}
    for folder, forbidden in [
        ("sparseticket", {*tests, "bench"}),
        ("kernels", {*tests, "bench"}),
        ("bench", tests),
    ]:
        for path in _sources(folder):
            tops = {name.split(".")[0] for name in _imports(path.read_text(), _package_of(path))}
            assert not tops & forbidden, path


# ---------------------------------------------- one name per op in every column
COLUMNS = {
    "reference": "sparseticket/reference/{}.py",
    "csrc/core": "csrc/core/{}.cpp",
    "kernels": "kernels/{}.py",
    "ops": "sparseticket/ops/{}.py",
    "tests/ops": "tests/ops/test_{}.py",
}
_COMPOSED = "its forward is the masked_* and ticket_* kernels, its backward dense products"
_SHARED = "it is apply_mask with another backward, made of dense products"
NO_TRITON = {  # ops whose Triton kernel is missing and why; CUDA tensors get the reference
    **dict.fromkeys(
        [
            *("conv2d_flip", "gather_live", "scatter_live", "sparse_conv2d", "sparse_conv2d_dw"),
        ],
        "no GPU kernel of unstructured live values pays; CUDA tensors get the reference",
    ),
    **dict.fromkeys(["popup_conv2d", "popup_linear"], _COMPOSED),
    **dict.fromkeys(
        ["masked_linear", "masked_conv2d"],
        "torch's product on the optimizer's shadow or on what apply_mask makes",
    ),
    "popup_weight": _SHARED,
    **dict.fromkeys(["rice_decode", "rice_encode"], "of ticket files, on the CPU by nature"),
    **dict.fromkeys(["conv2d_taps", "sparse_pattern", "ticket_codes"], "for CPU kernels only"),
}
EXEMPT = {  # an empty place in a column and why; "*" is the whole column
    **{("kernels", op): reason for op, reason in NO_TRITON.items()},
    ("csrc/core", "popup_linear"): _COMPOSED,
    ("csrc/core", "popup_conv2d"): _COMPOSED,
    ("csrc/core", "popup_weight"): _SHARED,
    ("csrc/core", "regenerate_many"): "the regenerate kernel, layer after layer",
    ("csrc/core", "conv2d_flip"): "once a mask: its reference, on packed words",
    ("csrc/core", "sparse_linear_dx"): "the sparse_linear kernel on the transposed pattern",
}
HELPERS = {  # a file in a column that is no op and why
    ("reference", "philox"): "the generator that sign_words and regenerate share",
    ("reference", "layout"): "the canonical form that all of them share",
    ("kernels", "philox"): "the generator and the decode recipe that they share",
    ("kernels", "blocks"): "the lists of live blocks that the sparse_linear kernels read",
    ("kernels", "table"): "addresses and sizes for kernels that work on many tensors",
    ("kernels", "tuning"): "the block sizes that ship for each GPU",
    ("kernels", "updates"): "update rules and the walk over many tensors, of the fused optimizers",
    ("kernels", "variants"): "what a kernel file says of its configurations",
    ("csrc/core", "conv_code"): "machine code of sparse_conv2d on AVX-512",
    ("csrc/core", "table"): "the list of the kernels of one ISA level",
}


def _registered() -> set[str]:
    names = (name.split("::") for name in torch._C._dispatch_get_all_op_names())
    return {name.split(".")[0] for space, name in names if space == "sparseticket"}


def _present(column: str) -> set[str]:
    folder, pattern = (ROOT / COLUMNS[column]).parent, Path(COLUMNS[column]).name
    before, after = pattern.split("{}")
    stems = {p.name[len(before) : -len(after)] for p in folder.glob(f"{before}*{after}")}
    return {stem for stem in stems if not stem.startswith("_")}


def test_registered_ops_are_the_public_ones():
    overloads = {
        name for name in ops.__all__ if isinstance(getattr(ops, name), torch._ops.OpOverload)
    }
    assert _registered() == _present("ops") == overloads
    assert len(overloads) >= 15


@pytest.mark.parametrize("column", COLUMNS)
def test_one_op_one_name(column):
    present = _present(column)
    exempt = {name for where, name in EXEMPT if where == column}
    helpers = {name for where, name in HELPERS if where == column}
    if "*" in exempt:
        assert not present, f"{column} has files: drop its exemption"
        return
    assert _registered() - present == exempt, "missing files, or exemptions no longer needed"
    assert present - _registered() == helpers, "files of no op, or helpers that are gone"


def test_every_op_is_benchmarked():
    assert set(CASES) == _registered()
    for name, cases in CASES.items():
        assert cases, name


# ---------------------------------------------- what an import does
def _python(*args: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    given = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "SPARSETICKET_ISA")}
    return subprocess.run(
        [sys.executable, "-P", *args],
        cwd=cwd,
        env=given | env,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_no_top_level_kernels(tmp_path):
    run = _python("-c", "import kernels", cwd=tmp_path)
    assert "ModuleNotFoundError: No module named 'kernels'" in run.stderr
    tops = importlib.metadata.distribution("sparseticket").read_text("top_level.txt")
    assert (tops or "").split() == ["sparseticket"]
    assert importlib.import_module("sparseticket.kernels").__name__ == "sparseticket.kernels"


def test_kernels_refuse_another_name(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    with pytest.raises(ImportError, match=r"imported as 'kernels'; import sparseticket\.kernels"):
        importlib.import_module("kernels")


QUIET_IMPORT = """
import sys
import numpy, torch
torch.set_num_threads(2)
touched = []
torch.cuda._lazy_init = lambda: touched.append("torch.cuda")

def subnormals_alive():
    one = float(numpy.float32(1e-40) * numpy.float32(1)) != 0
    many = int(torch.full((1 << 18,), 1e-40).mul(1.0).view(torch.int32).count_nonzero())
    return one and many == 1 << 18

assert subnormals_alive(), "before the import"
import sparseticket as st
assert subnormals_alive(), "after the import"
mask = st.select_mask(torch.randn(512, 1024), density=0.1)
layer = st.SparseLinear(1024, 512, mask=mask, seed=0, form="ticket")
layer(torch.randn(3, 1024))
assert subnormals_alive(), "after kernels"
for name in st.__all__:
    getattr(st, name)
loaded = {"sklearn", "matplotlib", "torchvision", "PIL", "onnx", "onnxscript"} & set(sys.modules)
assert not loaded, loaded
assert not touched and not torch.cuda.is_initialized(), touched
print("quiet")
"""


def test_an_import_is_quiet(tmp_path):
    run = _python("-c", QUIET_IMPORT, cwd=tmp_path)
    assert (run.returncode, run.stdout) == (0, "quiet\n"), run.stderr


@pytest.mark.parametrize("level", ["", *_C.isas()])
def test_isa_from_the_environment(tmp_path, level):
    script = "import sparseticket as st; print(st._C.isa())"
    run = _python("-c", script, cwd=tmp_path, SPARSETICKET_ISA=level)
    assert run.stdout.strip() == (level or _C.isas()[-1]), run.stderr


def test_isa_that_no_machine_has(tmp_path):
    run = _python("-c", "import sparseticket", cwd=tmp_path, SPARSETICKET_ISA="nonsense")
    accepted = ", ".join(_C.isas())
    assert run.returncode == 1
    assert f"SPARSETICKET_ISA: got 'nonsense', this machine has: {accepted}" in run.stderr


# ---------------------------------------------- the compiled module
def test_a_missing_module_is_reported(monkeypatch):
    monkeypatch.setitem(sys.modules, "sparseticket._C", None)
    with pytest.raises(ImportError, match=r"_C cannot be loaded \(.*; build it with 'pip install"):
        _build.load_compiled(ROOT / "sparseticket")


def test_a_stale_module_is_reported(tmp_path):
    _build.load_compiled(tmp_path / "sparseticket")  # installed: no csrc beside it
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    _build.load_compiled(tmp_path / "sparseticket")  # csrc as compiled
    (tmp_path / "csrc/core/notes.txt").write_text("no source")
    _build.load_compiled(tmp_path / "sparseticket")
    source = tmp_path / "csrc/core/core.h"
    stale = "built from other sources than the csrc/ beside it; rebuild it with 'pip install -e"
    for change in (lambda: source.write_text(source.read_text() + "\n"), source.unlink):
        change()
        with pytest.raises(ImportError, match=stale):
            _build.load_compiled(tmp_path / "sparseticket")
    (tmp_path / "csrc/core/other.h").write_bytes((ROOT / "csrc/core/core.h").read_bytes())
    with pytest.raises(ImportError, match=stale):  # renamed
        _build.load_compiled(tmp_path / "sparseticket")


def test_no_flags_for_this_machine_only():
    tree = ast.parse((ROOT / "setup.py").read_text())
    tree.body = tree.body[1:]  # without the docstring, which says why
    texts = {"setup.py": ast.unparse(tree)}
    for path in [ROOT / "Makefile", ROOT / "pyproject.toml", *(ROOT / "csrc").rglob("*.*")]:
        texts[path.name] = path.read_text()
    assert "-O3" in texts["setup.py"]
    for name, text in texts.items():
        assert not re.search(r"march=|mtune=|fast-?math|-Ofast", text), name


# ---------------------------------------------- names and versions
def test_no_file_names_a_folder_of_one_machine(require):
    where = subprocess.run(
        ["git", "rev-parse", "--show-toplevel"], cwd=ROOT, capture_output=True, text=True
    )
    if where.returncode or Path(where.stdout.strip()) != ROOT:
        require("git", "the tree is not a git checkout")
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    paths = [ROOT / name for name in names.stdout.split("\0") if name]
    assert Path(__file__).resolve() in paths or len(paths) > 50
    place = re.compile(rb"(?<![\w./:*-])/(?:work|root|home|Users)/\w")
    assert place.search(b"cd /" + b"home/me") and not place.search(b"https://x.org/" + b"home/me")
    found = [p.relative_to(ROOT) for p in paths if p.is_file() and place.search(p.read_bytes())]
    assert not found


@pytest.mark.parametrize("name", st.__all__)
def test_public_names(name):
    value = getattr(st, name)
    assert name in dir(st)
    if name == "__version__":
        return
    assert value.__module__.startswith(f"sparseticket.{st._HOME[name]}")
    text = value.__doc__ or ""
    assert len(text) > 20 and not text.startswith(f"{name}("), "a dataclass's own text is none"


def test_unknown_public_names():
    with pytest.raises(AttributeError, match="module 'sparseticket' has no attribute 'prune'"):
        _ = st.prune


def test_version_is_the_packages():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert st.__version__ == project["version"] == importlib.metadata.version("sparseticket")

"""Builds sparseticket._C: the kernels of csrc/core once per ISA level, csrc/bind once.

No -march=native and no fast-math anywhere: the level is chosen at run time (SPARSETICKET_ISA
overrides it), and linking with fast-math would switch off subnormals for the whole process.
"""

import hashlib
import platform
import sys
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

CORE = sorted(str(path) for path in Path("csrc/core").glob("*.cpp"))
HEADERS = sorted(str(path) for path in Path("csrc").rglob("*.h"))
X86 = sys.platform == "linux" and platform.machine() in ("x86_64", "AMD64")
LEVELS = {"base": []}
if X86:
    LEVELS["avx2"] = ["-mavx2", "-mfma", "-mbmi", "-mbmi2", "-mpopcnt"]
    # GCC 12's own AVX-512 header trips its uninitialised-variable warnings.
    quiet = ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
    parts = [f"-mavx512{part}" for part in ("f", "bw", "dq", "vl")]
    LEVELS["avx512"] = [*LEVELS["avx2"], *parts, *quiet]
FLAGS = ["-O3", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-function"]
OPENMP = ["-fopenmp"] if sys.platform == "linux" else []


def csrc_hash() -> str:
    """SHA-256 over names and contents of csrc; sparseticket/_build.py computes the same."""
    digest = hashlib.sha256()
    for path in sorted(p for p in Path("csrc").rglob("*") if p.suffix in (".cpp", ".h")):
        digest.update(path.relative_to("csrc").as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


class BuildPerLevel(build_ext):
    def build_extension(self, ext):
        for level, flags in LEVELS.items():
            macros = [("ST_ISA", level), *([("ST_X86", None)] if X86 else [])]
            ext.extra_objects += self.compiler.compile(
                CORE,
                output_dir=str(Path(self.build_temp) / level),
                macros=macros,
                extra_postargs=[*FLAGS, *OPENMP, "-std=c++17", *flags],
                depends=HEADERS,
            )
        super().build_extension(ext)


ParallelCompile("SPARSETICKET_BUILD_JOBS").install()
setup(
    ext_modules=[
        Pybind11Extension(
            "sparseticket._C",
            sorted(str(path) for path in Path("csrc/bind").glob("*.cpp")),
            depends=[*CORE, *HEADERS],
            define_macros=[
                ("ST_CSRC_HASH", f'"{csrc_hash()}"'),
                *([("ST_X86", None)] if X86 else []),
            ],
            extra_compile_args=[*FLAGS, *OPENMP],
            extra_link_args=OPENMP,
            cxx_std=17,
        )
    ],
    cmdclass={"build_ext": BuildPerLevel},
)

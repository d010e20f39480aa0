"""The experiments of the theory papers, one file each: ``Config``, a frozen dataclass, and
``run(config, out)``, which writes NAME.csv, NAME.png and report.json into a folder and returns the
report, its tables under ``tables``."""

from . import attention, compare, er, log, lplus1, malach, pensia, plant, subset_sum, universal

EXPERIMENTS = {
    "subset-sum": subset_sum,
    "malach": malach,
    "log": log,
    "pensia": pensia,
    "lplus1": lplus1,
    "universal": universal,
    "er": er,
    "attention": attention,
    "plant": plant,
    "compare": compare,
}

__all__ = ["EXPERIMENTS"]

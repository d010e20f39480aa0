"""The experiments of the theory papers, one file each: ``Config``, a frozen dataclass, and
``run(config, out)``, which writes NAME.csv, NAME.png and report.json into a folder and returns the
report, its tables under ``tables``."""

from . import attention, er, pensia, plant, subset_sum

EXPERIMENTS = {
    "subset-sum": subset_sum,
    "pensia": pensia,
    "er": er,
    "attention": attention,
    "plant": plant,
}

__all__ = ["EXPERIMENTS"]

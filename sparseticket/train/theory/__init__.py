"""The experiments of the theory papers, one file each: ``Config``, a frozen dataclass, and
``run(config, out)``, which writes NAME.csv, NAME.png and report.json into a folder and returns the
report, its tables under ``tables``."""

from . import subset_sum

EXPERIMENTS = {"subset-sum": subset_sum}

__all__ = ["EXPERIMENTS"]

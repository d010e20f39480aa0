"""The files of an experiment: its tables as CSV, its figure, its report."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..experiments import settings_of
from ..plots import new_figure, save_figure
from ..report import versions, write_json, write_text

__all__ = ["write_results"]

Tables = Mapping[str, Sequence[Mapping[str, Any]]]


def write_results(
    name: str,
    out: Path,
    config: Any,
    tables: Tables,
    draw: Callable[[Tables, Any], None],
    **more: Any,
) -> dict[str, Any]:
    """Write NAME.csv (every table under its column names), report.json and, with matplotlib,
    NAME.png into ``out``; returns the report."""
    out.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for table, rows in tables.items():
        columns = list(dict.fromkeys(key for row in rows for key in row))
        writer.writerow(["table", *columns])
        writer.writerows([table, *(row.get(key, "") for key in columns)] for row in rows)
    write_text(out / f"{name}.csv", text.getvalue())
    report = {
        "experiment": name,
        "config": settings_of(config),
        "tables": tables,
        "versions": versions(),
        "missing": [],
        **more,
    }
    try:
        figure = new_figure(11, 3.8)
    except ImportError as error:
        report["missing"].append(str(error))
    else:
        draw(tables, figure)
        save_figure(figure, out / f"{name}.png")
    write_json(out / "report.json", report)
    return report

"""The command ``sparseticket``. Every flag is a field of a dataclass: its type, default and help.

Settings are taken from the command line, then from ``--config FILE.yaml``, then from the defaults.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import sys
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from . import __version__
from .io import Ticket, accounts
from .tickets import METHODS, get_method
from .train.experiments import (
    CheckOptions,
    DemoOptions,
    EvalOptions,
    ExportOptions,
    SearchOptions,
    check_ticket,
    evaluate_ticket,
    export_ticket,
    run_demo,
)
from .train.report import format_bytes, format_kept, format_percent, table
from .train.searches import EXPERIMENTS, get_experiment
from .train.theory import EXPERIMENTS as THEORY

__all__ = ["main"]

_ERRORS = (ArithmeticError, ImportError, NotImplementedError, OSError, RuntimeError)
_ERRORS += (TypeError, ValueError)
_DESCRIPTION = """\
Find, store and run strong lottery tickets: masks over random weights that are never trained and
never stored. A ticket file holds a seed and about one bit per weight."""
_SEARCH = """\
Search a ticket. DIR receives ticket.safetensors, report.json, log.csv, log.jsonl, config.yaml and,
with matplotlib, curve.png and masks.png. The same command after an interruption continues the run.
The same seed, settings and thread count give the same ticket, byte for byte.

  sparseticket search --out runs/a                                     digits, mlp, half the weights
  sparseticket search --density 0.1 --scale density --out runs/b       a tenth, rescaled
  sparseticket search --dataset cifar10 --model conv6 --data DATA --epochs 100 --out runs/c
  sparseticket search --config runs/b/config.yaml --seed 1 --out runs/d
  sparseticket search --config configs/generative_mnist.yaml --data DATA --out runs/e

--experiment chooses what a ticket is searched for; each experiment has flags of its own, listed by
--experiment NAME --help."""
_EVAL = """\
Test accuracy of a ticket file. The model is built anew, its weights come from the file's seeds."""
_CHECK = """\
The ticket beside its controls: the mask shuffled inside each layer, the weights redrawn from other
seeds, the mask inverted (as many of the weights that the ticket dropped); test accuracy, mean and
standard deviation over seeds. Exit status 0 whatever they show."""
_EXPORT = """\
The model of a ticket file with dense weights, bit for bit those that the seeds give, zeros
included: for torch (--out model.safetensors or .pt, a state_dict; .pt2, a program) or ONNX."""
_DEMO = """\
The whole story in about a minute: tickets at density 0.5 and 0.1 on scikit-learn's digits against a
dense-trained and a random-mask control, then both tickets again in new processes, from seed and
masks alone. Exit status 1 if those do not show exactly the same accuracy."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status: 0, 1 for a failed demonstration, 2 for an error."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        options = _parser(*_chosen(arguments)).parse_args(arguments)
        return options.run(options)
    except _ERRORS as error:
        if "--debug" in arguments:
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"sparseticket: error: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("sparseticket: interrupted; a search continues when it is run again", file=sys.stderr)
        return 130


class _Parser(argparse.ArgumentParser):
    """Raises what argparse would print, so that every error looks the same."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see {self.prog} --help")


def _parser(experiment: str, method: str) -> argparse.ArgumentParser:
    """The parser; ``search`` takes the flags of ``experiment`` and ``method`` and of no others."""
    parser = _Parser("sparseticket", description=_DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"sparseticket {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(
        name: str,
        positional: str,
        run: Callable[[argparse.Namespace], int],
        summary: str,
        text: str = "",
    ) -> argparse.ArgumentParser:
        usage = f"sparseticket {name} {positional} [options]".replace("  ", " ")
        sub = commands.add_parser(name, usage=usage, help=summary, description=text or summary)
        sub.set_defaults(run=run)
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        return sub

    sub = command("search", "--out DIR", _search, "search a ticket and report on it", _SEARCH)
    sub.add_argument("--config", type=Path, metavar="FILE", help="YAML file of settings")
    sub.set_defaults(of=(experiment, method))
    titles = (f"experiment {experiment}, one of {', '.join(EXPERIMENTS)}", "training")
    for title, part in zip(titles, get_experiment(experiment).parts, strict=False):
        _add_fields(sub.add_argument_group(title), part, defaults=get_method(method).recipe)
    group = sub.add_argument_group(f"method {method}", inspect.cleandoc(get_method(method).__doc__))
    _add_fields(group, get_method(method), without={"seed"})

    sub = command("eval", "TICKET", _eval, "test accuracy of a ticket file", _EVAL)
    sub.add_argument("ticket", type=Path, metavar="TICKET")
    _add_fields(sub, EvalOptions)
    sub.add_argument("--json", action="store_true", help="print JSON")

    sub = command("check", "TICKET", _check, "a ticket beside its controls", _CHECK)
    sub.add_argument("ticket", type=Path, metavar="TICKET")
    _add_fields(sub, CheckOptions)
    sub.add_argument("--json", action="store_true", help="print JSON")

    usage = "TICKET --to FORMAT --out FILE"
    sub = command("export", usage, _export, "a ticket as a plain dense model", _EXPORT)
    sub.add_argument("ticket", type=Path, metavar="TICKET")
    _add_fields(sub, ExportOptions)

    sub = command("info", "FILE", _info, "layers and sizes of a ticket file, which is checked")
    sub.add_argument("ticket", type=Path, metavar="FILE")
    sub.add_argument(
        "--accounting", action="store_true", help="the size as each paper counts it, beside ours"
    )
    sub.add_argument("--json", action="store_true", help="print JSON")

    command("methods", "", _methods, "list the search methods and their settings")
    sub = command("demo", "", _demo, "search, compare, reload: the whole story", _DEMO)
    _add_fields(sub, DemoOptions)

    text = "run the experiment of a theory paper"
    sub = commands.add_parser("theory", help=text, description=f"{text}: tables, CSV and picture")
    names = sub.add_subparsers(title="experiments", metavar="NAME", required=True)
    for name, module in THEORY.items():
        about = inspect.cleandoc(module.__doc__)
        one = names.add_parser(name, help=about.partition("\n")[0], description=about)
        one.set_defaults(run=_theory, of=name)
        one.add_argument("--debug", action="store_true", help="show the traceback of an error")
        folder = Path("theory_out") / name
        help_ = f"folder for the results (default {folder})"
        one.add_argument("--out", type=Path, metavar="DIR", default=folder, help=help_)
        _add_fields(one, module.Config)
    return parser


def _chosen(arguments: Sequence[str]) -> tuple[str, str]:
    """Experiment and method that ``search`` will run, needed before its flags can be known."""
    early = _Parser("sparseticket search", add_help=False)
    for name in ("experiment", "method"):
        early.add_argument(f"--{name}", default=argparse.SUPPRESS)
    early.add_argument("--config", type=Path)
    known, _ = early.parse_known_args(list(arguments))
    settings = _read_yaml(known.config) if known.config is not None else {}
    settings |= vars(known)
    experiment = settings.get("experiment", SearchOptions.experiment)
    method = settings.get("method", get_experiment(experiment).parts[0].method)
    get_method(method)  # an unknown name raises here, with the known ones
    return experiment, method


def _search(arguments: argparse.Namespace) -> int:
    experiment, method = get_experiment(arguments.of[0]), get_method(arguments.of[1])
    *parts, config = _settings(arguments, *experiment.parts, method, defaults=method.recipe)
    report = experiment.run(*parts, config)
    print(f"ticket         {parts[0].out / 'ticket.safetensors'}")
    for label, text in experiment.lines(report):
        print(f"{label:<14} {text}")
    _note(report["missing"])
    return 0


def _eval(arguments: argparse.Namespace) -> int:
    (options,) = _settings(arguments, EvalOptions)
    result = evaluate_ticket(arguments.ticket, options)
    if arguments.json:
        print(json.dumps(result))
        return 0
    correct = round(result["test_accuracy"] * result["examples"])
    print(
        f"test accuracy {format_percent(result['test_accuracy'])} ({correct:,} of "
        f"{result['examples']:,}), {result['model']} on {result['dataset']}"
    )
    if result["dataset"] != result["trained_on"]:
        _note([f"the ticket was found on {result['trained_on']}"])
    return 0


def _check(arguments: argparse.Namespace) -> int:
    (options,) = _settings(arguments, CheckOptions)
    result = check_ticket(arguments.ticket, options)
    if arguments.json:
        print(json.dumps(result))
        return 0
    print(f"{result['method']}, {result['model']} on {result['dataset']}\n")
    header = ("control", "test accuracy", "std", "lowest", "highest", "seeds")
    rows = [
        (
            *(row["control"], format_percent(row["mean"])),
            "" if row["std"] is None else format_percent(row["std"]),
            *(format_percent(f(row["scores"])) for f in (min, max)),
            len(row["scores"]),
        )
        for row in result["rows"]
    ]
    print(table(header, rows))
    return 0


def _export(arguments: argparse.Namespace) -> int:
    (options,) = _settings(arguments, ExportOptions)
    result = export_ticket(arguments.ticket, options)
    print(f"{result['out']}: {format_bytes(result['bytes'])}")
    return 0


def _info(arguments: argparse.Namespace) -> int:
    ticket = Ticket.load(arguments.ticket)
    info = ticket.info()
    if arguments.accounting:
        return _accounting(ticket, arguments.json)
    if arguments.json:
        print(json.dumps(info))
        return 0
    print(f"method {info['method']}, format {info['format_version']}, sha256 {info['sha256']}")
    print(f"config {json.dumps(info['config'])}\n")
    header = ("layer", "kind", "shape", "kept", "density", "weights", "sigma", "codec", "bytes")
    rows = [
        (
            *(layer["name"], layer["kind"], "x".join(map(str, layer["shape"]))),
            *(f"{layer['kept']:,}", f"{layer['kept'] / max(layer['weights'], 1):.4g}"),
            *(layer["dist"], f"{layer['sigma']:.4g}", layer["codec"], f"{layer['coded_bytes']:,}"),
        )
        for layer in info["layers"]
    ]
    print(table(header, rows))
    print(f"\nkept {format_kept(info)}")
    for part in ("raw", "coded", "normalisation", "not_weight_free"):
        bits = info[f"{part}_bits"]
        label = part.replace("_free", "-free").replace("_", " ")
        print(f"{label + ' bits':<21}{bits:>15,}  {format_bytes((bits + 7) // 8):>8}")
    print(f"{'file':<36}  {format_bytes(info['file_bytes']):>8}")
    print(f"{'dense float32':<36}  {format_bytes(info['dense_bytes']):>8}")
    if info["not_weight_free"]:
        print(f"not weight-free: {', '.join(info['not_weight_free'])}")
    return 0


def _accounting(ticket: Ticket, as_json: bool) -> int:
    rows = accounts(ticket)
    if as_json:
        print(json.dumps([dataclasses.asdict(row) for row in rows]))
        return 0
    header = ("counted by", "what", "bits", "bits a weight", "size")
    weights = max(ticket.info()["weights"], 1)
    cells = [
        (row.method, row.counted, f"{row.bits:,}", f"{row.bits / weights:.4f}", row.size)
        for row in rows
    ]
    print(table(header, cells))
    return 0


def _methods(arguments: argparse.Namespace) -> int:
    for name, config in METHODS.items():
        print(f"{name}: {_source(config)}")
        print(f"  frozen: {config.freezes}")
        if config.recipe:
            listed = ", ".join(f"{_flag(key)} {value}" for key, value in config.recipe.items())
            print(f"  trained with {listed} by default")
        for field in dataclasses.fields(config):
            text = field.metadata.get("help", "")
            print(f"  {_flag(field.name)} (default {field.default})  {text}".rstrip())
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    (options,) = _settings(arguments, DemoOptions)
    report = run_demo(options, say=lambda text: print(f"* {text}", file=sys.stderr))
    dense = report["rows"][0]["bytes"]
    header = ("what", "test accuracy", "reloaded", "kept weights", "bytes", "dense / this")
    rows = [
        (
            *(row["what"], format_percent(row["test_accuracy"])),
            format_percent(row["reloaded_accuracy"]) if "reloaded_accuracy" in row else "",
            *(format_kept(row), f"{row['bytes']:,}", f"{dense / row['bytes']:.1f}"),
        )
        for row in report["rows"]
    ]
    print(f"{report['model']} on {report['dataset']}, {report['epochs']} epochs\n")
    print(table(header, rows))
    print(f"\nreport, curves and masks: {options.out}")
    _note(report["missing"])
    if report["same"]:
        print("both tickets, loaded in new processes from seed and masks: the same accuracy")
        return 0
    print("sparseticket: a reloaded ticket shows another accuracy", file=sys.stderr)
    return 1


def _theory(arguments: argparse.Namespace) -> int:
    module = THEORY[arguments.of]
    (config,) = _settings(arguments, module.Config)
    report = module.run(config, arguments.out)
    for name, rows in report["tables"].items():
        columns = list(dict.fromkeys(key for row in rows for key in row))
        cells = [[_short(row.get(key, "")) for key in columns] for row in rows]
        print(f"{name}\n\n{table(columns, cells)}\n")
    print(f"tables, picture and report: {arguments.out}")
    _note(report["missing"])
    return 0


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _settings(
    arguments: argparse.Namespace, *classes: type, defaults: Mapping[str, Any] | None = None
) -> list[Any]:
    """One instance of each dataclass: flags over the YAML file over ``defaults`` over its own."""
    hints = {
        field.name: typing.get_type_hints(cls)[field.name]
        for cls in classes
        for field in dataclasses.fields(cls)
    }
    values = dict(defaults or {})
    path = getattr(arguments, "config", None)
    for name, value in ({} if path is None else _read_yaml(path)).items():
        if name not in hints:
            known = ", ".join(sorted(hints))
            raise ValueError(f"{path}: unknown setting {name!r}; known: {known}")
        values[name] = _from_yaml(f"{path}: {name}", value, hints[name])
    values |= {name: value for name, value in vars(arguments).items() if name in hints}
    return [
        cls(**{f.name: values[f.name] for f in dataclasses.fields(cls) if f.name in values})
        for cls in classes
    ]


def _add_fields(
    parser: Any,
    cls: type,
    without: Collection[str] = (),
    defaults: Mapping[str, Any] | None = None,
) -> None:
    """One flag for every field; only flags that are given appear among the parsed arguments.

    ``defaults``: what the help says in place of the fields' own.
    """
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if field.name in without:
            continue
        kind, choices, _ = _kind(hints[field.name])
        text = field.metadata.get("help", "")
        default = (defaults or {}).get(field.name, field.default)
        if default is not None and kind is not bool:
            text += f" (default {default})"
        common = {"dest": field.name, "default": argparse.SUPPRESS}
        common["help"] = text.strip().replace("%", "%%")
        if kind is bool:
            action = argparse.BooleanOptionalAction
            parser.add_argument(_flag(field.name), action=action, **common)
        else:
            metavar = None if choices else {Path: "PATH", str: "NAME"}.get(kind, "N")
            common |= {"choices": choices, "metavar": metavar, "type": kind}
            parser.add_argument(_flag(field.name), **common)


def _kind(hint: Any) -> tuple[type, tuple[str, ...] | None, bool]:
    """(type, choices, whether None is accepted) of a field's type hint."""
    optional = typing.get_origin(hint) in (types.UnionType, typing.Union)
    if optional:
        (hint,) = (part for part in typing.get_args(hint) if part is not types.NoneType)
    if typing.get_origin(hint) is typing.Literal:
        return str, typing.get_args(hint), optional
    return hint, None, optional


def _from_yaml(where: str, value: Any, hint: Any) -> Any:
    kind, choices, optional = _kind(hint)
    if value is None and optional:
        return None
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is float and type(value) in (int, str):  # YAML 1.1 reads 1e-4 as a string
        try:
            return float(value)
        except ValueError:
            pass
    if type(value) is not kind or (choices and value not in choices):
        need = ", ".join(choices) if choices else kind.__name__
        raise ValueError(f"{where}: got {value!r}, need {need}")
    return value


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeError) as error:
        raise ValueError(f"{path}: not a YAML file: {error}") from error
    if not isinstance(content, dict | None):
        raise ValueError(f"{path}: need a mapping of settings, got {type(content).__name__}")
    return {str(key).replace("-", "_"): value for key, value in (content or {}).items()}


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _source(config: type) -> str:
    """What a method is and where it comes from: the first paragraph of its file."""
    text = inspect.cleandoc(sys.modules[config.__module__].__doc__ or "")
    return " ".join(text.split("\n\n")[0].split())


def _note(sentences: Sequence[str]) -> None:
    for sentence in sentences:
        print(f"sparseticket: note: {sentence}", file=sys.stderr)


if __name__ == "__main__":
    raise SystemExit(main())

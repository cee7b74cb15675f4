"""The command line: ``tinytl-hf train | eval | predict | merge | memory | bench | compare | report | push | pull``.

Every option is a field of a dataclass; a YAML file given with ``--config`` comes first and what is on
the command line wins. A mistake ends with one line; ``--debug`` shows where it was raised.
"""

from __future__ import annotations

import argparse
import difflib
import json
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_loader, set_parsing_settings

from tinytl_hf.config.hub import HubConfig, PullConfig, PushConfig
from tinytl_hf.config.run import RENAMED, Config, DataConfig, MemoryConfig, TrainConfig, flat
from tinytl_hf.config.verbs import (
    BenchConfig,
    CompareConfig,
    EvalConfig,
    MemoryTableConfig,
    MergeConfig,
    PredictConfig,
    ReportConfig,
)
from tinytl_hf.config.yaml12 import load_yaml
from tinytl_hf.errors import Interrupted, TinyTLError
from tinytl_hf.version import __version__

PROG = "tinytl-hf"
T = TypeVar("T")


def main(argv: list[str] | None = None) -> None:
    """Run the command line and exit."""
    argv = sys.argv[1:] if argv is None else argv
    debug = "--debug" in argv
    logging.basicConfig(format="%(message)s", level=logging.WARNING, force=True)
    logging.getLogger("tinytl_hf").setLevel(logging.INFO if _is_main_process() else logging.ERROR)
    if not debug:
        warnings.filterwarnings("ignore")
    try:
        execute(_with_values([argument for argument in argv if argument != "--debug"] or ["--help"]))
    except Interrupted as stop:
        if not _is_main_process():
            sys.exit(stop.exit_code)  # the first process says it
        _end(str(stop), stop.exit_code)
    except KeyboardInterrupt:
        _end("interrupted", 130)
    except Exception as error:
        if debug:
            traceback.print_exc()
        _end(f"error: {_one_line(error)}", 2 if isinstance(error, ArgumentError) else 1)


def execute(argv: list[str]) -> None:
    """Parse ``argv`` and do what it says. Slow imports, such as torch, happen once the arguments have been checked."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    set_loader("yaml", load_yaml, (yaml.YAMLError,))
    parser = make_parser(next((word for word in argv if word in VERBS), None), _eval_defaults(argv))
    try:
        parsed = parser.parse_args(argv)
    except (UnicodeDecodeError, RecursionError) as error:
        raise ArgumentError(None, f"a config file or an option cannot be read: {error}") from error
    for key in (field.name for field in fields(Config) if is_dataclass(field.default_factory)):
        if key in parsed[parsed.subcommand] and parsed[parsed.subcommand][key] is None:
            raise TinyTLError(f"{key}=null: it is a group of options; name one, or leave it out")
    values = parser.instantiate(parsed)[parsed.subcommand]
    from tinytl_hf.hub.client import bound_waiting

    bound_waiting()
    VERBS[parsed.subcommand].does(values)


def make_parser(chosen: str | None, eval_defaults: dict[str, Any] | None = None) -> ArgumentParser:
    """The parser of the command line.

    Args:
        chosen: The verb whose options it knows: those of all verbs take half a second to gather.
        eval_defaults: What ``eval`` takes from its adapter.
    """
    parser = ArgumentParser(prog=PROG, exit_on_error=False, description="TinyTL adapters, the Hugging Face way.")
    parser.add_argument("--version", action="version", version=f"{PROG} {__version__}")
    parser.add_argument("--debug", action="store_true", help="Show where an error was raised.")
    verbs = parser.add_subcommands(metavar="VERB")
    for name, verb in VERBS.items():
        added = ArgumentParser(exit_on_error=False)
        verbs.add_subcommand(name, added, help=verb.about)
        if name != chosen:
            continue
        if Config in verb.options:
            added.add_argument("--config", action="config", help="YAML file with any of the options below.")
        for options in verb.options:
            added.add_class_arguments(options)
        if verb.has_data_options:
            added.add_class_arguments(DataConfig, "data")
            added.set_defaults(eval_defaults or {})
        if verb.takes is not None:
            takes = verb.takes
            added.add_argument(takes.name, nargs=takes.nargs, metavar=takes.metavar, help=takes.about)
    return parser


def _eval_defaults(argv: list[str]) -> dict[str, Any]:
    """Data options of the adapter that ``eval`` is about; only its preprocessing if other data is named."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("verb", nargs="?")
    first.add_argument("--adapter")
    first.add_argument("--data.dataset", dest="dataset")
    try:
        known, _ = first.parse_known_args(argv)
    except argparse.ArgumentError:
        return {}  # the real parser says what is wrong
    if known.verb != "eval" or known.adapter is None:
        return {}
    from tinytl_hf.adapter.format import read_config
    from tinytl_hf.data.sets import is_same_place
    from tinytl_hf.hub.client import bound_waiting
    from tinytl_hf.hub.transfer import find_adapter

    bound_waiting()
    config = read_config(find_adapter(known.adapter))
    defaults: dict[str, Any] = {
        "train_size": config.preprocessing.train_size,
        "eval_size": config.preprocessing.eval_size,
        "crop_pct": config.preprocessing.crop_pct,
    }
    if config.data is not None and (known.dataset is None or is_same_place(known.dataset, config.data.dataset)):
        defaults.update({key: value for key, value in asdict(config.data).items() if key != "train_sha256"})
    return {f"data.{key}": value for key, value in defaults.items()}


def _with_values(argv: list[str]) -> list[str]:
    """Let an option that is true or false stand alone, as ``--json``: it is true then."""
    groups: list[tuple[str, type]] = [("", options) for verb in VERBS.values() for options in verb.options]
    groups += [("data.", DataConfig), ("train.", TrainConfig), ("memory.", MemoryConfig), ("hub.", HubConfig)]
    flags = {f"--{prefix}{field.name}" for prefix, kind in groups for field in fields(kind) if field.type == "bool"}
    result = []
    for argument, following in zip(argv, [*argv[1:], ""], strict=True):
        argument = "--create_pr" if argument == "--create-pr" else argument  # as the Hub's own client spells it
        result.append(argument)
        if argument in flags and following.lower() not in {"true", "false"}:
            result.append("true")
    return result


def _build(kind: type[T], values: Namespace) -> T:
    return kind(**{field.name: values[field.name] for field in fields(kind)})  # type: ignore[arg-type]


def _train(values: Namespace) -> None:
    """Train; then, with everything on the disk, push if that was asked for."""
    from tinytl_hf.hub.transfer import check_can_push, push
    from tinytl_hf.reports.run_folder import ADAPTER
    from tinytl_hf.train.loop import train

    config = _build(Config, values)
    if config.hub.push:
        try:
            check_can_push()
        except TinyTLError as error:
            raise TinyTLError(f"hub.push: {error}, or train without --hub.push and push later") from error
    _print_figures(train(config))
    if config.hub.push and _is_main_process():
        adapter, repo = str(Path(config.output_dir) / ADAPTER), config.hub.repo
        print(push(PushConfig(adapter, str(repo), config.hub.private)))


def _eval(values: Namespace) -> None:
    from tinytl_hf.measure.accuracy import evaluate_adapter

    _print_figures(evaluate_adapter(_build(EvalConfig, values), values.data))


def _predict(values: Namespace) -> None:
    from tinytl_hf.deploy.predict import predict

    config = _build(PredictConfig, values)
    failed = False
    for result in predict(config, values.images):
        failed |= "error" in result
        if config.json:
            print(json.dumps(result))
        elif "error" in result:
            print(f"{result['image']}: error: {result['error']}", file=sys.stderr)
        else:
            labels = ", ".join(f"{label['label']} {label['probability']:.1%}" for label in result["labels"])
            print(f"{result['image']}: {labels}")
    if failed:
        sys.exit(1)


def _merge(values: Namespace) -> None:
    from tinytl_hf.deploy.merge import merge

    print(merge(_build(MergeConfig, values)))


def _memory(values: Namespace) -> None:
    from tinytl_hf.device import set_threads
    from tinytl_hf.measure import memory
    from tinytl_hf.measure.data_memory import survey_data
    from tinytl_hf.measure.results import make_folder_of
    from tinytl_hf.reports.plots import save_memory_bars

    config, options = _build(Config, values), _build(MemoryTableConfig, values)
    set_threads(config.train.threads)
    if options.plot is not None:
        make_folder_of("plot", Path(options.plot))
    data = survey_data(config) if options.with_data else None
    photo_size = memory.photo_size_of(config, options, data)
    rows = list(memory.measure_rows(config, options, photo_size))
    conditions = memory.conditions(
        config,
        train_size=config.data.train_size,
        photo_size="{}x{}".format(*photo_size),
        batch_size=options.batch_size,
    )
    content = memory.to_json(rows, conditions, data)
    _print_measured(conditions, memory.memory_table(rows, data), content if options.json else None)
    if options.plot is not None:
        save_memory_bars(Path(options.plot), json.loads(content)["rows"])


def _bench(values: Namespace) -> None:
    from tinytl_hf.device import set_threads
    from tinytl_hf.measure import memory, speed

    config, options = _build(Config, values), _build(BenchConfig, values)
    set_threads(config.train.threads)
    rows = list(speed.bench_rows(config, options))
    conditions = memory.conditions(config)
    content = speed.to_json(rows, conditions) if options.json else None
    _print_measured(conditions, speed.bench_table(rows, config.method), content)


def _compare(values: Namespace) -> None:
    from tinytl_hf.reports.compare import compare

    table, left_out = compare(_build(CompareConfig, values), values.runs)
    for reason in left_out:
        print(f"{PROG}: left out: {reason}", file=sys.stderr)
    print(table)


def _report(values: Namespace) -> None:
    from tinytl_hf.reports.page import report

    print(report(_build(ReportConfig, values), values.run))


def _push(values: Namespace) -> None:
    from tinytl_hf.hub.transfer import push

    print(push(_build(PushConfig, values)))


def _pull(values: Namespace) -> None:
    from tinytl_hf.hub.transfer import pull

    print(pull(_build(PullConfig, values)))


@dataclass(frozen=True)
class Argument:
    """What a verb takes besides options."""

    name: str
    metavar: str
    about: str
    nargs: str | None = None


@dataclass(frozen=True)
class Verb:
    """A verb of the command line.

    Attributes:
        does: The function that carries it out.
        about: Its line of help.
        options: Dataclasses whose fields are its options; those of a run can come from a file, too.
        takes: What it takes besides options, or None.
        has_data_options: Whether it has the options of a run's data, with what its adapter says as defaults.
    """

    does: Callable[[Namespace], None]
    about: str
    options: tuple[type, ...]
    takes: Argument | None = None
    has_data_options: bool = False


IMAGES = Argument("images", "IMAGE", "Files, folders or patterns.", "+")
RUNS = Argument("runs", "RUN", "Folders of finished runs.", "+")
RUN = Argument("run", "RUN", "Folder of a finished run.")

VERBS = {
    "train": Verb(_train, "train an adapter", (Config,)),
    "eval": Verb(_eval, "evaluate an adapter, by default on the data it names", (EvalConfig,), has_data_options=True),
    "memory": Verb(
        _memory, "measure the training memory of every method, lean and stock", (MemoryTableConfig, Config)
    ),
    "bench": Verb(_bench, "time training steps of lean and stock in alternation", (BenchConfig, Config)),
    "predict": Verb(_predict, "label images with an adapter", (PredictConfig,), IMAGES),
    "merge": Verb(_merge, "write backbone and adapter as one file of weights", (MergeConfig,)),
    "push": Verb(_push, "push an adapter to the Hub", (PushConfig,)),
    "pull": Verb(_pull, "download an adapter from the Hub", (PullConfig,)),
    "compare": Verb(_compare, "put finished runs side by side", (CompareConfig,), RUNS),
    "report": Verb(_report, "show one finished run", (ReportConfig,), RUN),
}


def _print_figures(figures: dict[str, Any]) -> None:
    if _is_main_process():
        extra = [name for name in figures if name.startswith("evaluate_")]
        for name in ("accuracy", "top5", "f1", "loss", "ece", *extra):
            print(f"{name:<8} {figures[name]:.4f}")


def _print_measured(conditions: dict[str, Any], table: str, content: str | None) -> None:
    """JSON if there is any, else the table under its conditions."""
    if content is None:
        content = ", ".join(f"{name} {value}" for name, value in conditions.items()) + "\n\n" + table
    print(content, end="")


def _one_line(error: Exception) -> str:
    """What went wrong and how to mend it, without the library's own layout."""
    text = "".join(c if c.isprintable() else " " for c in str(error))  # no escape sequences of a file's making
    text = " ".join(text.split())
    if text.startswith("Caught TinyTLError in DataLoader"):  # torch wraps what a worker process raises
        text = text.rpartition("TinyTLError: ")[2]
    if isinstance(error, TinyTLError):
        return text
    if not isinstance(error, ArgumentError):
        return f"{type(error).__name__}: {text} (unexpected: --debug shows where)"
    unknown = re.search(r"does not accept option '([^']+)'|unrecognized arguments: -*([\w.]+)", text)
    if unknown:
        return _no_such_option(unknown[1] or unknown[2])
    text = re.sub(r"<class '([^']+)'>", r"\1", text).replace("typing.", "")
    return re.sub(r'Parser key "([^"]+)": ', r"\1: ", text)


def _no_such_option(key: str) -> str:
    if key in RENAMED:
        return f"{key}: this option is called {RENAMED[key]} now"
    options = [f"data.{field.name}" for field in fields(DataConfig)]
    options += [field.name for verb in VERBS.values() for kind in verb.options for field in fields(kind)]
    options += flat(Config().to_dict())
    close = difflib.get_close_matches(key, options, n=1)
    return f"{key}: no such option{f'; did you mean {close[0]}?' if close else '; see --help'}"


def _is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _end(message: str, code: int) -> NoReturn:
    rank = "" if os.environ.get("WORLD_SIZE", "1") == "1" else f" (process {os.environ.get('RANK', '0')})"
    print(f"{PROG}{rank}: {message}", file=sys.stderr)
    sys.exit(code)

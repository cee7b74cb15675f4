"""What each verb of the command line does, and the table of them: a verb, its options, its function."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from jsonargparse import Namespace

from tinytl_hf.config.export import ExportConfig
from tinytl_hf.config.fit import FitConfig
from tinytl_hf.config.hub import PullConfig, PushConfig
from tinytl_hf.config.run import Config
from tinytl_hf.config.verbs import (
    BackbonesConfig,
    BenchConfig,
    CompareConfig,
    EvalConfig,
    MemoryTableConfig,
    MergeConfig,
    PredictConfig,
    ReportConfig,
)
from tinytl_hf.disk import check_ours, write_bytes, writing
from tinytl_hf.errors import TURNING, TinyTLError, one_line

PROG = "tinytl-hf"
VARIED_BY_FIT = {"gradient_accumulation_steps", "frozen_weights", "trained_blocks", "precision"}  # its rows have them
T = TypeVar("T")


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
    if is_main_process():
        print(_next_steps(config))
    if config.hub.push and is_main_process():
        adapter, repo = str(Path(config.output_dir) / ADAPTER), config.hub.repo
        print(push(PushConfig(adapter, str(repo), config.hub.private)))


def _next_steps(config: Config) -> str:
    """The commands that a user wants after a training."""
    from tinytl_hf.reports.run_folder import ADAPTER

    output = shlex.quote(config.output_dir)
    adapter = shlex.quote(str(Path(config.output_dir) / ADAPTER))
    lines = [
        "next:",
        f"  {PROG} predict --adapter {adapter} IMAGE",
        f"  {PROG} report {output} --html",
        f"  {PROG} push --adapter {adapter} --repo USER/NAME --private",
    ]
    return "\n".join(lines)


def _eval(values: Namespace) -> None:
    from tinytl_hf.measure.accuracy import evaluate_adapter
    from tinytl_hf.train.idle import say_idle_of_data

    say_idle_of_data(values.given)
    _print_figures(evaluate_adapter(_build(EvalConfig, values), values.data, values.given))


def _predict(values: Namespace) -> None:
    from tinytl_hf.deploy.predict import predict
    from tinytl_hf.deploy.table import into_csv

    config = _build(PredictConfig, values)
    failed = False
    results = predict(config, values.images)
    for result in results if config.csv is None else into_csv(config.csv, config.top_k, results):
        failed |= "error" in result
        if config.json:
            print(json.dumps(result), flush=True)
        elif "error" in result:
            print(f"{shown(result['image'])}: error: {one_line(result['error'])}", file=sys.stderr)
        else:
            labels = ", ".join(f"{shown(label['label'])} {label['probability']:.1%}" for label in result["labels"])
            print(f"{shown(result['image'])}: {labels}", flush=True)
    if failed:
        sys.exit(1)


def shown(name: str) -> str:
    """A name with its control characters escaped, and marks that turn text: a terminal would act on them."""
    return "".join(c if c.isprintable() or (ord(c) > 0x9F and c not in TURNING) else repr(c)[1:-1] for c in name)


def _merge(values: Namespace) -> None:
    from tinytl_hf.deploy.merge import merge

    print(merge(_build(MergeConfig, values)))


def _export(values: Namespace) -> None:
    from tinytl_hf.deploy.export import export
    from tinytl_hf.train.idle import say_idle_of_data

    say_idle_of_data(values.given)
    print(export(_build(ExportConfig, values), values.data))


def _memory(values: Namespace) -> None:
    from tinytl_hf.data.sets import open_data
    from tinytl_hf.device import set_threads
    from tinytl_hf.measure import memory
    from tinytl_hf.measure.data_memory import data_memory
    from tinytl_hf.reports.plots import draw_memory_bars
    from tinytl_hf.train.idle import rules_of_memory, say_idle

    config, options = _build(Config, values), _build(MemoryTableConfig, values)
    say_idle(config, rules_of_memory(config, options))
    set_threads(config.train.threads)
    if options.plot is not None:
        _check_plot(Path(options.plot))
    data = data_memory(open_data(config.data), config.data) if options.with_data else None
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
        with writing(f"plot={options.plot}", "name another file"):
            write_bytes(Path(options.plot), draw_memory_bars(json.loads(content)["rows"]))


def _check_plot(path: Path) -> None:
    """Raise, before anything is measured, if the picture cannot be drawn into this file."""
    from tinytl_hf.adapter.format import CONFIG_FILE
    from tinytl_hf.hub.card import PICTURES
    from tinytl_hf.measure.results import check_output_file
    from tinytl_hf.reports.plots import SOFTWARE

    check_ours("plot", path, SOFTWARE)
    if path.name in PICTURES.values() and path.with_name(CONFIG_FILE).is_file():
        raise TinyTLError(f"plot={path}: is a picture of the adapter there; name another file")
    check_output_file("plot", path)


def _bench(values: Namespace) -> None:
    from tinytl_hf.device import set_threads
    from tinytl_hf.measure import memory, speed
    from tinytl_hf.train.idle import rules_of_bench, say_idle

    config, options = _build(Config, values), _build(BenchConfig, values)
    say_idle(config, rules_of_bench(config, options))
    set_threads(config.train.threads)
    rows = list(speed.bench_rows(config, options))
    conditions = memory.conditions(config)
    content = speed.to_json(rows, conditions) if options.json else None
    _print_measured(conditions, speed.bench_table(rows, config.method), content)


def _backbones(values: Namespace) -> None:
    from tinytl_hf.measure.backbone_table import backbones

    for line in backbones(_build(BackbonesConfig, values), values.pattern):
        print(line, flush=True)


def _fit(values: Namespace) -> None:
    from tinytl_hf.device import set_threads
    from tinytl_hf.measure import memory
    from tinytl_hf.train.fit import fit
    from tinytl_hf.train.fit_table import fit_table, to_json
    from tinytl_hf.train.idle import rules_of_fit, say_idle

    config, options = _build(Config, values), _build(FitConfig, values)
    say_idle(config, rules_of_fit(options))
    set_threads(config.train.threads)
    found = fit(config, options)
    conditions = {key: value for key, value in memory.conditions(config).items() if key not in VARIED_BY_FIT}
    _print_measured(conditions, fit_table(found), to_json(found, conditions) if options.json else None)
    if options.output is not None:
        print(f"{PROG}: next: {PROG} train --config {shlex.quote(options.output)}", file=sys.stderr)


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
        is_shared: Whether the processes of a launch share its work; else the first does all of it.
    """

    does: Callable[[Namespace], None]
    about: str
    options: tuple[type, ...]
    takes: Argument | None = None
    has_data_options: bool = False
    is_shared: bool = False


IMAGES = Argument("images", "IMAGE", "Files, folders, patterns, or - for an image on standard input.", "+")
PATTERN = Argument("pattern", "PATTERN", "Names such as 'timm/mobilenet*'; all but timm's without one.", "?")
RUNS = Argument("runs", "RUN", "Folders of finished runs.", "+")
RUN = Argument("run", "RUN", "Folder of a finished run.")

VERBS = {
    "train": Verb(_train, "train an adapter", (Config,), is_shared=True),
    "eval": Verb(
        _eval,
        "evaluate an adapter, by default on the data it names",
        (EvalConfig,),
        has_data_options=True,
        is_shared=True,
    ),
    "memory": Verb(
        _memory, "measure the training memory of every method, lean and stock", (MemoryTableConfig, Config)
    ),
    "bench": Verb(_bench, "time training steps of lean and stock in alternation", (BenchConfig, Config)),
    "backbones": Verb(_backbones, "list the backbones that can be trained", (BackbonesConfig,), PATTERN),
    "fit": Verb(_fit, "find what trains best within a budget of memory and time", (FitConfig, Config)),
    "predict": Verb(_predict, "label images with an adapter", (PredictConfig,), IMAGES),
    "merge": Verb(_merge, "write backbone and adapter as one file of weights", (MergeConfig,)),
    "export": Verb(_export, "write a model for ONNX, ExecuTorch or timm", (ExportConfig,), has_data_options=True),
    "push": Verb(_push, "push an adapter to the Hub", (PushConfig,)),
    "pull": Verb(_pull, "download an adapter from the Hub", (PullConfig,)),
    "compare": Verb(_compare, "put finished runs side by side", (CompareConfig,), RUNS),
    "report": Verb(_report, "show one finished run", (ReportConfig,), RUN),
}


def _print_figures(figures: dict[str, Any]) -> None:
    if is_main_process():
        extra = [name for name in figures if name.startswith("evaluate_")]
        for name in ("accuracy", "balanced_accuracy", "top5", "f1", "loss", "ece", *extra):
            print(f"{name:<17} {figures[name]:.4f}")
        for name, value in figures.get("mirror", {}).items():
            print(f"{'mirror_' + name:<24} {value:.4f}")


def _print_measured(conditions: dict[str, Any], table: str, content: str | None) -> None:
    """JSON if there is any, else the table under its conditions."""
    if content is None:
        content = ", ".join(f"{name} {value}" for name, value in conditions.items()) + "\n\n" + table
    print(content, end="")


def is_main_process() -> bool:
    """Whether this is the first process of a launch, which alone prints; a RANK without one says nothing."""
    return "LOCAL_RANK" not in os.environ or os.environ.get("RANK", "0") == "0"

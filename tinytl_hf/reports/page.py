"""One finished run as an HTML page that needs no network, no data and no other file: the verb ``report``."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from tinytl_hf.config.run import Config, flat
from tinytl_hf.config.verbs import ReportConfig
from tinytl_hf.disk import check_ours, expanded, write_text, writing
from tinytl_hf.errors import TinyTLError
from tinytl_hf.reports.compare import CONDITIONS, Comparison
from tinytl_hf.reports.finished_run import FinishedRun, read_run
from tinytl_hf.reports.plots import MB, draw_confusion, draw_curves, draw_memory_bars
from tinytl_hf.reports.run_folder import MISTAKES_FILE, PAGE_FILE, PAGE_MARK, RESULTS_FILE
from tinytl_hf.version import __version__

TEMPLATE = "report_template.html"


def report(config: ReportConfig, folder: str) -> str:
    """Write the page of a run, or give its row of ``compare`` as text.

    Returns:
        What to tell the user.

    Raises:
        TinyTLError: No finished run, or the page cannot be written.
    """
    run = read_run(expanded(folder))
    if not config.html and config.output is None:
        return str(Comparison([run]))
    path = Path(config.output or run.folder / PAGE_FILE)
    check_ours("output", path, PAGE_MARK)
    with writing(f"output={path}", "name another file"):
        write_text(path, render(run))
    return str(path)


def render(run: FinishedRun) -> str:
    """The page. Everything that is not ours, such as a label's name, is escaped.

    Raises:
        TinyTLError: A file of the run is damaged.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    results, labels = run.results, run.results["label_names"]
    if len(results["per_class_accuracy"]) != len(labels):
        raise TinyTLError(f"{run.folder} is damaged: {RESULTS_FILE} has not an accuracy for each of its label_names")
    memory_rows = run.memory_rows
    defaults = flat(Config().to_dict())
    return environment.get_template(TEMPLATE).render(
        run=run,
        version=__version__,
        title=f"{run.method} on {results.get('backbone', run.config['backbone.name'])}",
        figures=_figures(run),
        conditions={key: results[key] for key in CONDITIONS if key in results},
        curves=_picture(draw_curves({run.method: run.epochs})),
        confusion=_picture(draw_confusion(results["confusion_matrix"], labels)),
        classes=list(zip(labels, results["per_class_accuracy"], map(sum, results["confusion_matrix"]), strict=True)),
        mistakes=_mistakes(run),
        labels=labels,
        memory=_picture(draw_memory_bars(memory_rows)) if memory_rows else None,
        memory_conditions=run.memory["conditions"] if run.memory is not None else {},
        config=[(key, _as_yaml(value), defaults.get(key) != value) for key, value in run.config.items()],
    )


def _as_yaml(value: Any) -> str:
    """A value as a config file would have it."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _figures(run: FinishedRun) -> dict[str, str]:
    """What stands at the top of the page."""
    results = run.results
    parameters = results.get("trained_parameters")
    shown = {
        "accuracy": f"{results['accuracy']:.2%}",
        "top-5 accuracy": f"{results['top5']:.2%}",
        "F1, macro average": f"{results['f1']:.4f}",
        "loss": f"{results['loss']:.4f} nats",
        "calibration error": f"{results['ece']:.4f}",
    }
    if "balanced_accuracy" in results:
        shown["balanced accuracy"] = f"{results['balanced_accuracy']:.2%}"
    shown.update({key: f"{value:.4f}" for key, value in results.items() if key.startswith("evaluate_")})
    shown["trained parameters"] = "-" if parameters is None else f"{parameters:,}"
    shown["adapter"] = f"{run.adapter_bytes / MB:.2f} MB"
    peak = run.peak_bytes(run.engine)
    shown["peak memory, measured"] = "-" if peak is None else f"{peak / MB:.1f} MB"
    shown["training"] = f"{run.seconds:,.0f} s, {run.images / run.seconds:.0f} images/s"
    if run.what_is_missing:
        shown["not complete"] = run.what_is_missing
    return shown


def _mistakes(run: FinishedRun) -> dict[str, Any] | None:
    path, labels = run.folder / MISTAKES_FILE, run.results["label_names"]
    if not path.is_file():
        return None
    try:
        found = dict(json.loads(path.read_text("utf-8")))
        for name in ("wrong", "n"):
            format(found[name], ",d")
        for mistake in found["shown"]:  # what the page will read
            base64.b64decode(mistake["png"]), int(mistake["index"])
            str(labels[mistake["answer"]] + labels[mistake["label"]])
            format(mistake["probability"], ".1f"), format(mistake["probability_of_label"], ".1f")
    except (ValueError, TypeError, LookupError, RecursionError, OverflowError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise TinyTLError(f"{path} is damaged: {reason}; remove it to do without") from error
    return found


def _picture(drawn: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(drawn).decode()}"

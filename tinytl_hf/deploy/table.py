"""What ``predict`` finds, as a CSV file."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from itertools import chain, islice
from typing import Any

from tinytl_hf.disk import check_ours, expanded, writing

HEAD = ("image", "label", "probability")
OURS = re.compile(rb"\Aimage,label,probability(,label_\d+,probability_\d+)*,error\r?\n")


def into_csv(path: str, top_k: int, results: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Hand results on, and write each as a line as it comes: image, labels with their probabilities, error.

    Args:
        path: The CSV file, in UTF-8. One that ``predict`` wrote before is replaced.
        top_k: Labels an image.
        results: As :func:`tinytl_hf.deploy.predict.predict` gives them.

    Raises:
        TinyTLError: Another file is there, or it cannot be written.
    """
    file, fix = expanded(path), "name another file"
    more = [f"{name}_{number}" for number in range(2, top_k + 1) for name in ("label", "probability")]
    results = iter(results)
    check_ours("csv", file, OURS)
    first = list(islice(results, 1))  # the adapter is loaded now, or was not: the file before is still there
    with ExitStack() as opened:
        with writing(f"csv={path}", fix):
            file.parent.mkdir(parents=True, exist_ok=True)
            lines = opened.enter_context(file.open("w", encoding="utf-8", errors="backslashreplace", newline=""))
            table = csv.DictWriter(lines, [*HEAD, *more, "error"])
            table.writeheader()
        for result in chain(first, results):
            with writing(f"csv={path}", fix):
                table.writerow(_row(result))
                lines.flush()
            yield result


def _row(result: dict[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {name: result[name] for name in ("image", "error") if name in result}
    for number, label in enumerate(result.get("labels", ()), 1):
        suffix = "" if number == 1 else f"_{number}"
        row |= {f"label{suffix}": label["label"], f"probability{suffix}": f"{label['probability']:.6g}"}
    return row

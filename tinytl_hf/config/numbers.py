"""Numbers that are written as only YAML 1.1 has them: jsonargparse reads them so, and takes ``1:30`` for 90."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from tinytl_hf.config.check import check, in_words, leaves
from tinytl_hf.config.yaml12 import load_yaml

# Base 60, as 1:30, and base 8 where version 1.2 has base 10 or a text.
OF_YAML_11 = re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?|\+0[0-7_]+|[-+]?0_[0-7_]*")


def check_numbers(value: Any, kind: Any, key: str = "", folder: Path = Path()) -> None:
    """Raise if a value is a text that the parser would take for a number that its writer does not mean.

    Args:
        value: What was written: a text, a list, or, of a group of options, a dict or the path of its YAML file.
        kind: The type of the option; of a group, its dataclass.
        key: The option's name; empty for all options of a verb.
        folder: What the path is relative to.
    """
    if not is_dataclass(kind):
        is_number = str not in leaves(kind) and bool({int, float} & leaves(kind))
        for each in value if is_number and isinstance(value, list) else [value]:
            odd = is_number and isinstance(each, str) and OF_YAML_11.fullmatch(each.strip()) is not None
            check(not odd, key, each, f"use {in_words(kind)}, written in decimal digits")
        return
    if isinstance(value, str) and (folder / value).is_file():
        path, value = folder / value, None
        with suppress(OSError, ValueError, yaml.YAMLError):  # the parser says what is wrong
            value, folder = load_yaml(path.read_text(encoding="utf-8-sig")), path.parent
    if isinstance(value, dict):
        for name, hint in get_type_hints(kind).items():
            check_numbers(value.get(name), hint, f"{key}.{name}" if key else name, folder)

"""How an option that does not hold is refused, and how one that is a path is read."""

from __future__ import annotations

from pathlib import Path
from types import UnionType
from typing import Literal, Union, get_args, get_origin, get_type_hints

from tinytl_hf.disk import expanded
from tinytl_hf.errors import TinyTLError


def check(holds: bool, key: str, value: object, fix: str) -> None:
    """Raise unless an option's value holds, with what to do."""
    if not holds:
        raise TinyTLError(f"{key}={value}: {fix}")


def check_choices(config: object, prefix: str = "") -> None:
    """Raise unless each option that is one of several names is one of them: Python checks no annotation.

    Args:
        config: The options, a dataclass.
        prefix: What comes before their names, such as ``train.``.
    """
    for name, kind in get_type_hints(type(config)).items():
        if choices := _choices(kind):
            value = getattr(config, name)
            named = ", ".join("null" if choice is None else str(choice) for choice in choices)
            check(value in choices, f"{prefix}{name}", value, f"use one of {named}")


def _choices(kind: object) -> tuple[object, ...]:
    """The values of a type that has only few, which are those of ``Literal`` and None; of any other none."""
    if get_origin(kind) is Literal:
        return get_args(kind)
    if kind is type(None):
        return (None,)
    parts = [_choices(part) for part in get_args(kind)] if get_origin(kind) in (Union, UnionType) else []
    return tuple(choice for part in parts for choice in part) if all(parts) else ()


def check_text(key: str, value: str) -> None:
    """Raise unless a path is UTF-8 text, which libraries that read and write there need, and not empty."""
    check(bool(value.strip()), key, value, "it is empty, as of a variable that is not set; name a path")
    is_text = value == value.encode("utf-8", "replace").decode("utf-8")
    check(is_text, key, value, "use a path that is UTF-8 text")


def expand_paths(config: object, *names: str) -> None:
    """Let ``~`` be the user's home in options that can be paths: a shell leaves it in ``--output_dir=~/runs``."""
    for name in names:
        value = getattr(config, name)
        if isinstance(value, (str, Path)):
            value = _expanded(str(value))
        elif isinstance(value, list):
            value = [_expanded(str(each)) for each in value]
        object.__setattr__(config, name, value)


def _expanded(value: str) -> str:
    return str(expanded(value)) if value.startswith("~") else value

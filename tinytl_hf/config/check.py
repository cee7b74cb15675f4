"""How an option that does not hold is refused, and how one that is a path is read."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real
from os import PathLike, fspath
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from tinytl_hf.disk import expanded, path_of
from tinytl_hf.errors import TinyTLError

LONGEST_VALUE = 200  # characters of what is no text, such as a whole network
LONGEST_NAME = 255  # bytes of a file's or a folder's name, on the file systems of Linux, macOS and Windows


def check(holds: bool, key: str, value: object, fix: str) -> None:
    """Raise unless an option's value holds, with what to do."""
    if not holds:
        raise TinyTLError(f"{key}={_shown(value)}: {fix}")


def _shown(value: object) -> str:
    text = str(value)
    is_short = isinstance(value, (str, PathLike)) or (len(text) <= LONGEST_VALUE and "\n" not in text)
    return text if is_short else f"a {type(value).__name__}"


def check_once(key: str, values: Sequence[object]) -> None:
    """Raise if a value stands twice in a list of what is to be measured, which would cost time and tell nothing."""
    twice = next((value for i, value in enumerate(values) if value in values[:i]), None)
    check(twice is None, key, values, f"{twice} is there twice; name it once")


def check_types(config: object, prefix: str = "") -> None:
    """Raise unless each option is of its type: Python checks no annotation, and YAML has null for everything.

    Args:
        config: The options, a dataclass.
        prefix: What comes before their names, such as ``train.``.
    """
    for name, kind in get_type_hints(type(config)).items():
        value = getattr(config, name)
        named = ", ".join("null" if choice is None else str(choice) for choice in _choices(kind))
        shown = "null" if value is None else value
        check(_is(value, kind), f"{prefix}{name}", shown, f"use one of {named}" if named else f"use {in_words(kind)}")


def whole_number(key: str, value: object) -> int:
    """``value`` as an integer, of whatever library.

    Raises:
        TinyTLError: It is none.
    """
    check(isinstance(value, Integral) and not isinstance(value, bool), key, value, "use a whole number")
    return int(value)  # type: ignore[call-overload]


def _choices(kind: object) -> tuple[object, ...]:
    """The values of a type that has only few, which are those of ``Literal`` and None; of any other none."""
    if get_origin(kind) is Literal:
        return get_args(kind)
    if kind is type(None):
        return (None,)
    parts = [_choices(part) for part in get_args(kind)] if _is_union(kind) else []
    return tuple(choice for part in parts for choice in part) if all(parts) else ()


def _is_union(kind: object) -> bool:
    return get_origin(kind) in (Union, UnionType)


def _is(value: object, kind: Any) -> bool:
    origin, parts = get_origin(kind), get_args(kind)
    if _is_union(kind):
        return any(_is(value, part) for part in parts)
    if origin is Literal:
        return any(value == part and type(value) is type(part) for part in parts)
    if origin in (list, tuple):
        several = isinstance(value, (list, tuple)) and (origin is list or len(value) == len(parts))
        return several and all(_is(each, parts[0]) for each in value)  # type: ignore[attr-defined]
    if kind in (int, float):
        return isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
    return isinstance(value, (str, PathLike) if kind is str else kind)


def leaves(kind: Any) -> set[Any]:
    """The types that a type is put together of, as int and None of a list of numbers or null."""
    parts = () if get_origin(kind) is Literal else get_args(kind)
    return {leaf for part in parts for leaf in leaves(part)} or {kind}


def in_words(kind: Any) -> str:
    """What is of a type, as ``a whole number or null``."""
    if _is_union(kind) or get_origin(kind) is Literal:
        parts = get_args(kind)
        return " or ".join(in_words(part) if _is_union(kind) else str(part) for part in parts)
    if get_origin(kind) in (list, tuple):
        return f"a list of {f'{len(get_args(kind))} ' if get_origin(kind) is tuple else ''}values"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a name or a path"}
    return "null" if kind is type(None) else words.get(kind, f"a {kind.__name__}")


def check_text(key: str, value: str) -> None:
    """Raise unless a path is UTF-8 text, which libraries that read and write there need, and can be a file's."""
    check(bool(value.strip()), key, value, "it is empty, as of a variable that is not set; name a path")
    check("\0" not in value, key, value.replace("\0", "\\0"), "no path can have a NUL in it; name another")
    is_text = value == value.encode("utf-8", "replace").decode("utf-8")
    check(is_text, key, value, "use a path that is UTF-8 text")
    longest = max(len(name.encode()) for name in value.split("/"))
    check(longest <= LONGEST_NAME, key, value, f"use names of up to {LONGEST_NAME} bytes")


def expand_paths(config: object, *names: str) -> None:
    """Let ``~`` be the user's home in options that can be paths: a shell leaves it in ``--output_dir=~/runs``.

    Of an address such as ``file:///home/ann/runs``, the path is taken.
    """
    for name in names:
        value = getattr(config, name)
        if isinstance(value, (str, PathLike)):
            value = _expanded(fspath(value))
        elif isinstance(value, list):
            value = [_expanded(fspath(each)) for each in value]
        object.__setattr__(config, name, value)


def _expanded(value: str) -> str:
    return str(expanded(value)) if value.startswith("~") else path_of(value)

"""How an option that does not hold is refused, and how one that is a path is read."""

from __future__ import annotations

from tinytl_hf.disk import expanded
from tinytl_hf.errors import TinyTLError


def check(holds: bool, key: str, value: object, fix: str) -> None:
    """Raise unless an option's value holds, with what to do."""
    if not holds:
        raise TinyTLError(f"{key}={value}: {fix}")


def check_text(key: str, value: str) -> None:
    """Raise unless a path is UTF-8 text, which libraries that read and write there need, and not empty."""
    check(bool(value.strip()), key, value, "it is empty, as of a variable that is not set; name a path")
    is_text = value == value.encode("utf-8", "replace").decode("utf-8")
    check(is_text, key, value, "use a path that is UTF-8 text")


def expand_paths(config: object, *names: str) -> None:
    """Let ``~`` be the user's home in options that can be paths: a shell leaves it in ``--output_dir=~/runs``."""
    for name in names:
        value = getattr(config, name)
        if isinstance(value, str):
            value = _expanded(value)
        elif isinstance(value, list):
            value = [_expanded(each) for each in value]
        object.__setattr__(config, name, value)


def _expanded(value: str) -> str:
    return str(expanded(value)) if value.startswith("~") else value

"""How an option that does not hold is refused."""

from __future__ import annotations

from tinytl_hf.errors import TinyTLError


def check(holds: bool, key: str, value: object, fix: str) -> None:
    """Raise unless an option's value holds, with what to do."""
    if not holds:
        raise TinyTLError(f"{key}={value}: {fix}")


def check_text(key: str, value: str) -> None:
    """Raise unless a path is UTF-8 text, which libraries that read and write there need."""
    is_text = value == value.encode("utf-8", "replace").decode("utf-8")
    check(is_text, key, value, "use a path that is UTF-8 text")

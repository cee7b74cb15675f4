"""How an option that does not hold is refused."""

from __future__ import annotations

from tinytl_hf.errors import TinyTLError


def check(holds: bool, key: str, value: object, fix: str) -> None:
    """Raise unless an option's value holds, with what to do."""
    if not holds:
        raise TinyTLError(f"{key}={value}: {fix}")

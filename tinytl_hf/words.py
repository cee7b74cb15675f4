"""How a count is said."""

from __future__ import annotations


def counted(count: float, one: str, several: str = "") -> str:
    """A count with what is counted, as ``1 epoch`` or ``1,797 images``.

    Args:
        count: How many.
        one: What is counted, in the singular.
        several: Its plural; empty for the singular with an s.
    """
    number = f"{count:g}" if count % 1 else f"{int(count):,}"
    return f"{number} {one if count == 1 else several or f'{one}s'}"

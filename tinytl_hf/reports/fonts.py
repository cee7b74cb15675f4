"""Fonts for names of any script: matplotlib's own has no Chinese, Japanese or Korean characters, for one."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable

logger = logging.getLogger(__name__)

BOXES = "LastResort"  # in the file's name of a font of matplotlib that shows a box for any character


def families_for(texts: Iterable[str]) -> list[str]:
    """The font families that show these texts: matplotlib's own first, then others of this machine as they are needed.

    What no font has is said, once.
    """
    from matplotlib import font_manager

    own = font_manager.findfont(font_manager.FontProperties(family=["sans-serif"]))
    families = [font_manager.FontProperties(fname=own).get_name()]
    missing = {c for text in texts for c in text if not c.isspace() and c.isprintable()} - _characters(own)
    if not missing:
        return families
    for path in sorted({*font_manager.findSystemFonts(), *(font.fname for font in font_manager.fontManager.ttflist)}):
        if BOXES in path or not missing & _characters(path):
            continue
        missing -= _characters(path)
        name = font_manager.FontProperties(fname=path).get_name()
        if name not in font_manager.get_font_names():  # installed since matplotlib made its list
            font_manager.fontManager.addfont(path)
        families.append(name)
    if missing:
        _say_missing("".join(sorted(missing)))
    return families


@functools.cache
def _characters(path: str) -> frozenset[str]:
    """What a font can show; nothing if it cannot be read."""
    from matplotlib.font_manager import get_font

    try:
        return frozenset(map(chr, get_font(path).get_charmap()))
    except (OSError, RuntimeError, ValueError):  # one of bitmaps, or damaged
        return frozenset()


@functools.cache
def _say_missing(characters: str) -> None:
    shown = characters if len(characters) <= 10 else f"{characters[:10]}..."
    logger.warning(
        "pictures show boxes in place of %s: no font here has them; install one, such as the package fonts-noto-cjk",
        shown,
    )

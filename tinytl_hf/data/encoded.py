"""Images that a table holds as texts, in base64, or as the numbers of their pixels."""

from __future__ import annotations

import base64
import binascii
import io
import re
from collections.abc import Mapping
from numbers import Real
from typing import Any

from PIL import Image

from tinytl_hf.errors import TinyTLError

FEWEST = 64  # numbers in a row that are likely the pixels of an image, of 8 x 8 and more
# 70 80 82, or [70, 80, 82]. A text is read in one way alone: in two ways for each number, it would take for ever.
PIXELS = re.compile(rf"\W*(\d+(\.\d+)?(?!\.\d)\W+){{{FEWEST - 1}}}\d")
SHORTEST = 64  # characters: no image is smaller, and few other texts without a space are longer


def check_no_base64(column: str, text: str | None) -> None:
    """Raise if a text of a column is an image in base64, which would be taken for a path or for nothing."""
    if text is None or not (text.startswith("data:image/") or _is_base64(text)):
        return
    raise TinyTLError(
        f"data.image_column={column}: it holds images as texts in base64, and images are read as bytes; write a "
        f'.parquet file of bytes, with base64.b64decode(text.split(",")[-1]) for each text of {column}'
    )


def _is_base64(text: str) -> bool:
    if len(text) < SHORTEST:
        return False
    try:
        with Image.open(io.BytesIO(base64.b64decode(text))):
            return True
    except (binascii.Error, ValueError, OSError, Image.DecompressionBombError):
        return False


def pixel_columns(row: Mapping[str, Any]) -> list[str]:
    """Columns that likely hold pixels, by the values of a row: a text of many numbers in one, or a number in each."""
    texts = [name for name, value in row.items() if isinstance(value, str) and PIXELS.match(value)]
    numbers = [name for name, value in row.items() if isinstance(value, Real) or str(value).isdecimal()]
    return texts or (numbers if len(numbers) >= FEWEST else [])

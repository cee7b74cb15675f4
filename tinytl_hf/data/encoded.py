"""Images that a table holds as texts, in base64."""

from __future__ import annotations

import base64
import binascii
import io

from PIL import Image

from tinytl_hf.errors import TinyTLError

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

"""Image files of any kind to RGB pixels: ``uint8`` arrays ``[H, W, 3]``, without torch; ``tensors.py`` goes on."""

from __future__ import annotations

import functools
import io
import logging
import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, PngImagePlugin

from tinytl_hf.disk import check_is_file

logger = logging.getLogger(__name__)

# Larger images are reduced to this multiple of the network's input on their shorter side, so that a decoded
# photo takes little memory; only crops of less than a quarter of its area could show more detail than that.
REDUCE_ABOVE = 2
MAX_ASPECT = 4  # longer images are cropped to it at their centre: a batch takes the size of its largest image
LFS = b"version https://git-lfs"  # what a pointer of Git LFS starts with, which a clone may have in place of a file
WHITE_IS_ZERO, TWELVE_BITS = (262, 0), (258, (12,))  # tags of TIFF with a value of each
GREYS = {"L;2": 85, "L;4": 17}  # by how Pillow calls greys of few bits in a PNG, what brings them to 8
# What brings a picture upright, by EXIF's orientation.
UPRIGHT: dict[Any, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SWAPPING = {UPRIGHT[orientation] for orientation in (5, 6, 7, 8)}

Image.init()
if find_spec("pillow_heif") is not None:
    import_module("pillow_heif").register_heif_opener()
FORMATS = [name for name in Image.ID if name != "EPS"]  # Pillow hands EPS files to Ghostscript, which runs them
_NOT_READ = {"EPS", "BUFR", "GRIB", "HDF5", "MPEG", "WMF"}  # Pillow knows no more than the header of the others
IMAGE_SUFFIXES = frozenset(
    suffix for suffix, name in Image.EXTENSION.items() if name in {*Image.OPEN, "MPO"} and name not in _NOT_READ
) | {".pjpeg", ".pjp"}  # JPEG files, as Chrome calls some
HEIF_SUFFIXES = {".heic", ".heif", ".hif"}
# What holds pictures and Pillow cannot read: it is counted where it is left out.
UNREAD_SUFFIXES = {
    *HEIF_SUFFIXES,
    *(".svg", ".eps", ".jxl", ".wmf", ".emf", ".dcm", ".xcf", ".exr", ".hdr", ".psb"),
    *(".cr2", ".cr3", ".nef", ".arw", ".dng", ".raf", ".orf", ".rw2", ".pef", ".srw", ".3fr"),
    *(".npy", ".npz", ".pdf", ".nii", ".mp4", ".mov", ".avi", ".mkv", ".webm"),
} - IMAGE_SUFFIXES
# What files that are called .jpg can be: bytes in them, where those are, and what to say.
OTHERS = (
    *((b"ftyp" + brand, 4, "it is a film") for brand in (b"isom", b"mp4", b"qt  ", b"M4V", b"3gp")),
    (b"%PDF", 0, "it is a PDF file"),
    (b"PK\3\4", 0, "it is a .zip archive"),
    (b"\x1f\x8b", 0, "it is a .gz archive"),
    (b"DICM", 128, "it is a DICOM file"),
    (bytes(64), 0, "it begins with nothing but zeros, as what was not copied or downloaded to its end"),
)
HEIC = (b"ftyphei", b"ftyphev", b"ftypmif1")


class UnreadableImageError(ValueError):
    """A file that Pillow cannot read, or that is no image."""


def decode_pixels(encoded: dict[str, Any] | None, input_size: int) -> np.ndarray:
    """Read an undecoded image of ``datasets``: ``{"bytes": ..., "path": ...}``.

    Raises:
        UnreadableImageError: With what Pillow says of it.
    """
    if encoded is None:
        raise UnreadableImageError("there is no image")
    try:
        with _opened(encoded) as image:
            pixels = to_pixels(image, input_size)
            if _has_more(image):
                _note_more(image.format or "")
            return pixels
    except UnreadableImageError:
        raise
    except Image.DecompressionBombError as error:
        count = re.search(r"\d+", str(error))
        raise UnreadableImageError(
            f"it has {int(count[0]) / 1e6 if count else 0:,.0f} megapixels; if you trust the file, allow that with "
            "--data.max_megapixels, or --max_megapixels in predict"
        ) from error
    except Exception as error:  # a damaged file can make Pillow raise almost anything
        reason = re.sub(r" <_io\.BytesIO object at \w+>", "", str(error))
        raise UnreadableImageError((reason or type(error).__name__) + _what_it_is(encoded)) from error


def _what_it_is(encoded: dict[str, Any]) -> str:
    """What is known of a file that cannot be read, for the line that says so."""
    start = encoded["bytes"]
    if start is None:
        try:
            check_is_file(Path(encoded["path"] or ""))
            with open(encoded["path"] or "", "rb") as file:
                start = file.read(256)
        except (OSError, ValueError):
            return ""
    if not start:
        return "; the file is empty"
    if start.startswith(LFS):
        return "; it is a pointer, and git lfs pull downloads the image"
    if start.lstrip().startswith(b"<"):
        return "; it is a web page or the like"
    if start[4:].startswith(HEIC) and ".heic" in UNREAD_SUFFIXES:
        return "; it is HEIC, and pip install pillow-heif reads that"
    return next((f"; {what}" for mark, place, what in OTHERS if start[place:].startswith(mark)), "")


def _opened(encoded: dict[str, Any]) -> Image.Image:
    if encoded["bytes"] is None:
        check_is_file(Path(encoded["path"] or ""))
        return Image.open(encoded["path"], formats=FORMATS)
    return Image.open(io.BytesIO(encoded["bytes"]), formats=FORMATS)


def _scale_transparent_colour(image: PngImagePlugin.PngImageFile) -> None:
    """Bring the colour that is to be seen through to 8 bits, as Pillow does with the pixels alone."""
    colour, stored = image.info.get("transparency"), image.tile[0].args if image.tile else None
    if isinstance(colour, tuple) and stored == "RGB;16B":
        image.info["transparency"] = tuple(value >> 8 for value in colour)
    elif isinstance(colour, int) and stored in GREYS:
        image.info["transparency"] = GREYS[stored] * colour


def _has_more(image: Image.Image) -> bool:
    """Whether a file holds frames or pages behind the first, which alone is read; previews of a camera are none."""
    try:
        return image.format != "MPO" and getattr(image, "is_animated", False)  # which not all formats have
    except Exception:  # what is behind the first can be damaged, and is not read
        return True


@functools.cache  # once a process and format, not for each image
def _note_more(kind: str) -> None:
    logger.warning("there are %s images of several frames or pages: the first of each is used", kind)


def allow_megapixels(count: int) -> None:
    """Read images of up to that many megapixels: what Pillow refuses beyond is for the whole process."""
    Image.MAX_IMAGE_PIXELS = count * 1_000_000 // 2  # it warns from here on, and refuses twice as many


def to_pixels(image: Image.Image, input_size: int) -> np.ndarray:
    """Turn an image of any mode upright and into RGB pixels.

    Transparency is laid over white, unless it hides a whole picture; EXIF rotation is applied, and of very long images
    the middle is kept. White is 65,535 in images of 16 bits (4,095 where a TIFF file says that it has 12), and in
    those of 32 bits that go beyond 255; it is 1.0 in images of floats, whose values must lie between 0 and 1. Nothing
    is clipped.

    Args:
        image: A PIL image.
        input_size: Side of the network's input in px; much larger images are reduced.

    Returns:
        ``uint8`` ``[H, W, 3]``.

    Raises:
        UnreadableImageError: Its values go beyond those ranges.
    """
    # Zero is white as scanners write TIFF: Pillow inverts such images of up to 8 bits alone.
    is_inverted, is_netpbm = _has_tag(image, WHITE_IS_ZERO), image.format == "PPM"
    has_twelve = _has_tag(image, TWELVE_BITS)
    if isinstance(image, PngImagePlugin.PngImageFile):
        _scale_transparent_colour(image)
    image.load()  # which turns TIFF files
    if (method := _upright(image)) is not None:
        image = image.transpose(method)
    if image.mode.startswith(("I", "F")):
        image = _eight_bits(image, is_netpbm, is_inverted, has_twelve)
    image = _limit_aspect(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if _hides_all(image):
            _note_hidden()
            image.putalpha(255)
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    size = _reduced(image.width, image.height, input_size)
    if size != image.size:
        image = image.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)
    return np.array(image)


def _upright(image: Image.Image) -> Image.Transpose | None:
    """What brings an image upright by its EXIF; None: nothing, or it says nothing that can be read.

    Pillow's own function writes all of the EXIF anew, and fails where a value has another type than its tag.
    """
    try:
        return UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # damaged EXIF can make Pillow raise almost anything, and the picture is whole
        return None


def decoded_size(encoded: dict[str, Any], input_size: int) -> tuple[int, int] | None:
    """Height and width in px that :func:`decode_pixels` gives, by the file's header; None: it cannot be read."""
    try:
        with _opened(encoded) as image:
            size, method = image.size, _upright(image)
            is_turned = method in SWAPPING and image.format != "TIFF"  # whose size Pillow gives upright
    except Exception:  # a damaged file can make Pillow raise almost anything; who decodes it says what is wrong
        return None
    longest = MAX_ASPECT * min(size)
    width, height = _reduced(min(size[0], longest), min(size[1], longest), input_size)
    return (width, height) if is_turned else (height, width)


def _reduced(width: int, height: int, input_size: int) -> tuple[int, int]:
    """Width and height to which an image is reduced: its own, unless it is much larger than the input."""
    shorter = min(width, height)
    if shorter <= REDUCE_ABOVE * input_size:
        return width, height
    scale = REDUCE_ABOVE * input_size / shorter
    return round(width * scale), round(height * scale)


def decoded_photo_size(input_size: int) -> tuple[int, int]:
    """Height and width in px of a large photo of 3:2, across, once it is decoded for an input of that side."""
    return REDUCE_ABOVE * input_size, 3 * REDUCE_ABOVE * input_size // 2


def _limit_aspect(image: Image.Image) -> Image.Image:
    longest = MAX_ASPECT * min(image.size)
    width, height = (min(side, longest) for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image if (width, height) == image.size else image.crop((left, top, left + width, top + height))


def _hides_all(image: Image.Image) -> bool:
    """Whether nothing is seen of a picture: programs leave the fourth channel of .tga and .dds files empty."""
    if image.getchannel("A").getextrema() != (0, 0):
        return False
    red, green, blue, _ = image.split()
    return any(low != high for low, high in (each.getextrema() for each in (red, green, blue)))


@functools.cache  # once a process, not for each image
def _note_hidden() -> None:
    logger.warning("there are images that are transparent all over: their colours are used as if they were not")


def _has_tag(image: Image.Image, tag: tuple[int, Any]) -> bool:
    return getattr(image, "tag_v2", {}).get(tag[0]) == tag[1]  # which a TIFF image that was pickled lacks


def _eight_bits(image: Image.Image, is_netpbm: bool, is_inverted: bool, has_twelve: bool) -> Image.Image:
    """The same with 8 bits; Pillow scales what Netpbm files hold to 65,535 as their white."""
    values = np.asarray(image).astype(np.float64)
    low, high = float(values.min()), float(values.max())
    is_float = image.mode.startswith("F")
    limit = 1 if is_float else 65535
    if not 0 <= low <= high <= limit:  # not a number fails this, too
        kind = "floats" if is_float else "whole numbers"
        raise UnreadableImageError(
            f"its values are {kind} from {low:g} to {high:g}, and only 0 to {limit:,} have a known white; save it so, "
            "or with 8 bits"
        )
    if is_float:
        white = 1.0
    elif image.mode.startswith("I;16") or is_netpbm or high > 255:  # mode I does not say how many bits are used
        white = 4095.0 if has_twelve else 65535.0
        if not has_twelve and 255 < high < 4096:
            _note_few_bits()
    else:
        white = 255.0
    shown = white - values if is_inverted else values
    reduced = Image.fromarray((shown * (255 / white)).round().astype(np.uint8))
    if isinstance(transparent := image.info.get("transparency"), int):  # the grey that is to be seen through
        reduced.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return reduced


@functools.cache  # once a process, not for each image
def _note_few_bits() -> None:
    logger.warning(
        "there are 16-bit images whose values stay below 4,096: white is 65,535, so they are dark; if they hold 12 "
        "bits, save them with 8 bits or multiplied by 16"
    )

"""What a caller may hand over as images: PIL images, arrays, tensors, paths, alone or in a list."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.fx import Proxy

from tinytl_hf.data.images import UnreadableImageError
from tinytl_hf.data.tensors import decode, to_rgb
from tinytl_hf.disk import StrPath, expanded, path_of
from tinytl_hf.errors import TinyTLError

GivenImage: TypeAlias = Image.Image | StrPath | np.ndarray | Tensor
GivenImages: TypeAlias = GivenImage | Iterable[GivenImage]  # arrays and tensors of four dimensions hold several

TAKEN = (
    "use PIL images, paths, arrays [height, width, 3] or tensors [3, height, width] (integers from 0 to 255, or "
    "floats from 0 to 1), or a list of those"
)
CHANNELS = (1, 3, 4)  # grey, RGB, RGB with transparency


def check_normalised(images: Tensor, network: nn.Module) -> None:
    """Raise unless a tensor can be what a network takes: of pixels from 0 to 255, an engine would make nonsense.

    Args:
        images: What the network is called with.
        network: What is called, whose weights are to be of their type, but in mixed precision.

    Raises:
        TinyTLError: With what to use.
    """
    if isinstance(images, Proxy):
        raise TinyTLError(
            "torch.fx: it cannot follow a model that looks at its images; trace model.backbone, in evaluation mode or "
            "of a model that is built with lean=False"
        )
    if not isinstance(images, Tensor) or not images.is_floating_point() or images.ndim not in (2, 4):
        of = f"{images.dtype} and shape {list(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise TinyTLError(
            f"images are of {of}: use normalised ones [N, 3, H, W] in floating point, as preprocess() gives them"
        )
    own = next(p.dtype for p in network.parameters() if p.is_floating_point())  # frozen weights can be int8
    if images.dtype != own and not _is_cast(images, own):
        raise TinyTLError(
            f"images are of {images.dtype} and the model of {own}: use images.to({own}), or model.to({images.dtype})"
        )


def true_sizes(pixels: Tensor, sizes: Tensor) -> Tensor:
    """The sizes of decoded images that are padded to one size, once both are found to be that.

    Args:
        pixels: ``uint8`` ``[N, 3, H, W]``.
        sizes: ``[N, 2]`` height and width in px, whose values are looked at on a CPU only: a GPU would be waited for.

    Raises:
        TinyTLError: They are not, or a size is not from 1 px to that of the padded images.
    """
    shape = pixels.shape if isinstance(pixels, Tensor) and pixels.dtype is torch.uint8 else ()
    if len(shape) != 4 or shape[1] != 3:
        raise TinyTLError("pixels: use a tensor [N, 3, H, W] of uint8; preprocess() takes images of other kinds")
    if not isinstance(sizes, Tensor) or sizes.shape != (shape[0], 2):
        raise TinyTLError(f"sizes: use a tensor [{shape[0]}, 2], the height and the width of each image in px")
    largest = torch.tensor(shape[2:])
    if sizes.device.type == "cpu" and not bool(((sizes >= 1) & (sizes <= largest)).all()):
        raise TinyTLError(f"sizes: use heights from 1 to {shape[2]} px and widths from 1 to {shape[3]} px")
    return sizes


def _is_cast(images: Tensor, dtype: torch.dtype) -> bool:
    """Whether mixed precision brings images and weights of ``dtype`` to one type: all but float64."""
    return torch.float64 not in (images.dtype, dtype) and torch.is_autocast_enabled(images.device.type)


def pixels_of(images: GivenImages, input_size: int) -> list[Tensor]:
    """Decode what a caller calls images.

    Args:
        images: One image or several: PIL images, paths, arrays ``[H, W]`` or ``[H, W, C]``, tensors ``[H, W]`` or
            ``[C, H, W]`` with 1, 3 or 4 channels; or arrays ``[N, H, W, C]`` and tensors ``[N, C, H, W]``.
        input_size: Side of the network's input in px; much larger images are reduced.

    Returns:
        For each a ``uint8`` tensor ``[3, H, W]``.

    Raises:
        TinyTLError: Something else, or a file that cannot be read.
    """
    is_one = isinstance(images, (Image.Image, str, os.PathLike))
    is_one = is_one or (isinstance(images, (np.ndarray, Tensor)) and images.ndim < 4)
    if not is_one and (isinstance(images, (bytes, Mapping)) or not isinstance(images, Iterable)):
        raise TinyTLError(f"{type(images).__name__} is no image: {TAKEN}")
    several = [images] if is_one else cast("Iterable[object]", images)
    found = [_decoded(image, input_size) for image in several]
    if not found:
        raise TinyTLError(f"there is no image: {TAKEN}")
    return found


def _decoded(image: Any, input_size: int) -> Tensor:
    if isinstance(image, (str, os.PathLike)):
        name = path_of(os.fspath(image))
        if not name or "://" in name:
            raise TinyTLError(f"{name!r} is {'an address' if name else 'empty'}: name the file of an image")
        path = expanded(name)
        try:
            return decode({"bytes": None, "path": str(path)}, input_size)
        except UnreadableImageError as error:
            raise TinyTLError(f"{path} cannot be read as an image ({error})") from error
    if isinstance(image, (np.ndarray, Tensor)):
        image = _from_array(image)
    if not isinstance(image, Image.Image):
        raise TinyTLError(f"{type(image).__name__} is no image: {TAKEN}")
    if 0 in image.size:
        raise TinyTLError(f"an image of {image.width} x {image.height} px has no pixels: {TAKEN}")
    try:
        return to_rgb(image, input_size)
    except (OSError, ValueError, SyntaxError) as error:  # a file that PIL opened without reading all of it
        raise TinyTLError(f"an image cannot be read ({error})") from error


def _from_array(array: np.ndarray | Tensor) -> Image.Image:
    """An array or tensor as a PIL image."""
    what = f"{'tensor' if isinstance(array, Tensor) else 'array'} {list(array.shape)} of {array.dtype}"
    if isinstance(array, Tensor):
        if array.is_meta:
            raise TinyTLError(f"{what} is on the meta device, and holds no pixels: {TAKEN}")
        array = array.detach().cpu()
        array = array.float() if array.is_floating_point() else array  # NumPy has no bfloat16
        values = array.numpy()
        values = np.moveaxis(values, 0, -1) if values.ndim == 3 else values
    else:
        values = array
    if not (values.ndim == 2 or (values.ndim == 3 and values.shape[2] in CHANNELS)) or 0 in values.shape:
        raise TinyTLError(f"{what} is no image: {TAKEN}")
    is_float = np.issubdtype(values.dtype, np.floating)
    highest = 1 if is_float else 255
    if not is_float and not np.issubdtype(values.dtype, np.integer):
        raise TinyTLError(f"{what} holds no numbers: {TAKEN}")
    if not (values.min() >= 0 and values.max() <= highest):  # also where there are NaNs
        raise TinyTLError(f"{what} has values that are no pixels (from {values.min()} to {values.max()}): {TAKEN}")
    pixels = (values * 255.0).round() if is_float else values
    pixels = pixels[..., 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels
    return Image.fromarray(np.ascontiguousarray(pixels, dtype=np.uint8))

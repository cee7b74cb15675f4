import io

import numpy as np
import pytest
from PIL import Image

from tinytl_hf.data.images import UnreadableImageError
from tinytl_hf.data.tensors import decode, pad_images, to_rgb


def corner(image):
    return to_rgb(image, 32)[:, 0, 0].tolist()


def test_every_mode_comes_out_as_the_colour_one_sees():
    orange = (250, 120, 10)
    assert corner(Image.new("RGB", (8, 8), orange)) == list(orange)
    assert corner(Image.new("L", (8, 8), 77)) == [77, 77, 77]
    assert corner(Image.new("1", (8, 8), 1)) == [255, 255, 255]
    assert corner(Image.new("RGBA", (8, 8), (*orange, 255))) == list(orange)
    assert corner(Image.new("RGBA", (8, 8), (0, 0, 0, 0))) == [255, 255, 255]  # transparent: the page shows
    assert corner(Image.new("LA", (8, 8), (0, 0))) == [255, 255, 255]
    assert corner(Image.new("CMYK", (8, 8), (0, 255, 255, 0))) == [255, 0, 0]
    palette = Image.new("RGB", (8, 8), orange).quantize(4)
    assert palette.mode == "P" and np.abs(np.array(corner(palette)) - orange).max() <= 2


def test_sixteen_bits_are_scaled_and_not_clipped():
    values = np.array([[0, 257 * 100], [257 * 200, 65535]], dtype=np.uint16)
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    pixels = decode({"bytes": file.getvalue(), "path": None}, 32)
    assert pixels[0].tolist() == [[0, 100], [200, 255]]


def test_dark_sixteen_bit_images_stay_dark():
    assert corner(Image.fromarray(np.full((4, 4), 200, dtype=np.uint16))) == [1, 1, 1]


def test_of_a_very_long_image_the_middle_is_kept():
    image = Image.new("RGB", (400, 20), "black")
    image.paste("white", (180, 0, 220, 20))
    pixels = to_rgb(image, 32)
    assert pixels.shape == (3, 20, 80) and pixels[0, 10, 40] == 255 and pixels[0, 10, 0] == 0


def test_exif_rotation_is_applied():
    image = Image.new("RGB", (20, 10), "black")
    image.paste("white", (0, 0, 10, 10))  # left half white
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate 90 degrees clockwise to view
    file = io.BytesIO()
    image.save(file, "JPEG", exif=exif, quality=95)
    pixels = decode({"bytes": file.getvalue(), "path": None}, 32)
    assert pixels.shape == (3, 20, 10)
    assert pixels[0, :8].float().mean() > 240 and pixels[0, 12:].float().mean() < 15  # white is on top now


def test_large_images_are_reduced_with_their_shape_kept(tmp_path):
    path = tmp_path / "large.jpg"
    Image.new("RGB", (1600, 800), "red").save(path)
    pixels = decode({"bytes": None, "path": str(path)}, 64)
    assert min(pixels.shape[1:]) == 128 and max(pixels.shape[1:]) == 256
    assert decode({"bytes": None, "path": str(path)}, 800).shape == (3, 800, 1600)


def test_images_are_padded_at_the_bottom_right():
    images = [to_rgb(Image.new("RGB", size, "white"), 32) for size in ((3, 2), (1, 4))]
    pixels, sizes = pad_images(images)
    assert pixels.shape == (2, 3, 4, 3) and sizes.tolist() == [[2, 3], [4, 1]]
    assert pixels[0, 0].tolist() == [[255] * 3, [255] * 3, [0] * 3, [0] * 3]


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + b"\x00" * 40])
def test_what_is_no_image_raises_an_error_that_the_data_reader_knows(content):
    with pytest.raises(UnreadableImageError):
        decode({"bytes": content, "path": None}, 32)

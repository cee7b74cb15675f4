import io
import pickle
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from tinytl_hf.data.images import (
    UnreadableImageError,
    _note_few_bits,
    _note_hidden,
    _note_more,
    allow_megapixels,
    decode_pixels,
    decoded_size,
    to_pixels,
)
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
    see_through = Image.new("P", (8, 8), 0)
    see_through.putpalette([0, 0, 0, 0], "RGBA")
    assert corner(see_through) == [255, 255, 255]


def test_sixteen_bits_are_scaled_and_not_clipped():
    values = np.array([[0, 257 * 100], [257 * 200, 65535]], dtype=np.uint16)
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    pixels = decode({"bytes": file.getvalue(), "path": None}, 32)
    assert pixels[0].tolist() == [[0, 100], [200, 255]]


def test_dark_sixteen_bit_images_stay_dark():
    assert corner(Image.fromarray(np.full((4, 4), 200, dtype=np.uint16))) == [1, 1, 1]


def tiff(values):
    file = io.BytesIO()
    Image.fromarray(values).save(file, "TIFF")
    return decode({"bytes": file.getvalue(), "path": None}, 32)


def test_floats_from_0_to_1_are_scaled():
    values = np.array([[0, 0.5], [0.25, 1]], dtype=np.float32)
    assert tiff(values)[0].tolist() == [[0, 128], [64, 255]]


@pytest.mark.parametrize("values", [[0, 65535], [-0.5, 1], [0, float("nan")], [0, float("inf")], [0, 255]])
def test_floats_whose_white_is_not_known_are_refused(values):
    with pytest.raises(
        UnreadableImageError, match=r"its values are floats from .*, and only 0 to 1 have a known white"
    ):
        tiff(np.array([values], dtype=np.float32))


@pytest.mark.parametrize("values", [[0, 70_000], [-1, 5]])
def test_whole_numbers_beyond_16_bits_are_refused(values):
    with pytest.raises(UnreadableImageError, match=r"whole numbers from .*only 0 to 65,535"):
        tiff(np.array([values], dtype=np.int32))


def test_twelve_bits_in_sixteen_are_noted(caplog):
    _note_few_bits.cache_clear()
    for _ in range(2):
        pixels = tiff(np.array([[0, 4095]], dtype=np.uint16))
    assert pixels[0].tolist() == [[0, 16]]
    assert caplog.text.count("16-bit images whose values stay below 4,096: white is 65,535") == 1


@pytest.mark.parametrize(("bits", "shown"), [(12, 128), (16, 8)])
def test_a_tiff_file_says_how_many_bits_it_has(bits, shown):
    row = bytes([0x80, 0x08, 0x00]) * 2 if bits == 12 else struct.pack("<H", 0x800) * 4  # four times 2,048
    tags = [(256, 4), (257, 1), (258, bits), (259, 1), (262, 1), (273, 122), (277, 1), (278, 1), (279, len(row))]
    entries = b"".join(struct.pack("<HHII", tag, 3, 1, value) for tag, value in tags)
    content = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + row
    assert decode_pixels({"bytes": content, "path": None}, 32).tolist() == [[[shown] * 3] * 4]


def test_the_limit_of_pixels_is_named_with_the_option_that_lifts_it(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400_000)
    file = io.BytesIO()
    Image.new("1", (2000, 1000)).save(file, "PNG")
    with pytest.raises(UnreadableImageError, match=r"it has 2 megapixels; if you trust the file, allow that with"):
        decode({"bytes": file.getvalue(), "path": None}, 32)
    allow_megapixels(2)
    assert decode({"bytes": file.getvalue(), "path": None}, 32).shape == (3, 64, 128)


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


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", [None, 1, 3, 6, 8, 99])
def test_the_size_by_the_header_is_that_of_the_decoded_image(kind, orientation):
    exif, file = Image.Exif(), io.BytesIO()
    if orientation is not None:
        exif[0x0112] = orientation
    Image.new("RGB", (20, 10)).save(file, kind, exif=exif)
    encoded = {"bytes": file.getvalue(), "path": None}
    assert decoded_size(encoded, 32) == decode(encoded, 32).shape[1:]


def test_an_orientation_that_is_a_text_says_nothing():
    text = struct.pack("<HHI4s", 0x0112, 2, 2, b"6")  # one entry: its tag, a text, of two bytes, and it
    exif, file = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 1) + text + bytes(4), io.BytesIO()
    Image.new("RGB", (20, 10)).save(file, "JPEG", exif=exif)
    encoded = {"bytes": file.getvalue(), "path": None}
    assert decoded_size(encoded, 32) == decode(encoded, 32).shape[1:] == (10, 20)


ODD_EXIF = {
    "a text where numbers are due": [(0x0112, 3, struct.pack("<HH", 6, 0)), (0x0128, 2, b"2\0\0\0")],
    "a number below zero": [(0x0101, 9, struct.pack("<i", -5)), (0x0112, 3, struct.pack("<HH", 6, 0))],
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("tags", ODD_EXIF.values(), ids=ODD_EXIF)
def test_a_photo_whose_exif_has_values_of_other_types_is_turned_all_the_same(kind, tags):
    entries = b"".join(struct.pack("<HHI", tag, of_type, 1) + value for tag, of_type, value in tags)
    exif, file = b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4), io.BytesIO()
    Image.new("RGB", (20, 10)).save(file, kind, exif=exif)
    encoded = {"bytes": file.getvalue(), "path": None}
    assert decoded_size(encoded, 32) == decode(encoded, 32).shape[1:] == (20, 10)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_photo_with_damaged_exif_is_read_as_it_lies(kind):
    file = io.BytesIO()
    Image.new("RGB", (20, 10)).save(file, kind, exif=b"Exif\0\0XXXXXXXX" * 4)
    encoded = {"bytes": file.getvalue(), "path": None}
    assert decoded_size(encoded, 32) == decode(encoded, 32).shape[1:] == (10, 20)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize(
    ("orientation", "stored_as"),
    [
        (1, lambda upright: upright),
        (2, np.fliplr),
        (3, lambda upright: np.rot90(upright, 2)),
        (4, np.flipud),
        (5, lambda upright: upright.swapaxes(0, 1)),
        (6, np.rot90),
        (7, lambda upright: np.rot90(upright, 2).swapaxes(0, 1)),
        (8, lambda upright: np.rot90(upright, 3)),
    ],
)
def test_a_photo_is_upright_however_it_is_stored(kind, orientation, stored_as):
    upright = np.zeros((40, 24, 3), dtype=np.uint8)
    upright[:10, :8], upright[:10, 16:], upright[30:, :8] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored_as(upright))).save(file, kind, exif=exif, quality=95)
    pixels = decode_pixels({"bytes": file.getvalue(), "path": None}, 32)
    assert pixels.shape == upright.shape
    assert np.abs(pixels.astype(int) - upright).mean() < 12


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_an_image_that_comes_from_another_process_or_was_read_before_gives_the_same_pixels(kind):
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (10, 20, 3), dtype=np.uint8)).save(file, kind, exif=exif)
    expected = decode_pixels({"bytes": file.getvalue(), "path": None}, 32)
    with Image.open(file) as image:
        for form in (image, image.copy(), pickle.loads(pickle.dumps(image)), image):
            assert np.array_equal(to_pixels(form, 32), expected)


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


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "WEBP", "PNG"])
def test_frames_and_pages_behind_the_first_are_said(kind, caplog):
    red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    for frames in ([], [blue]):
        file = io.BytesIO()
        red.save(file, kind, save_all=bool(frames), append_images=frames)
        _note_more.cache_clear()
        caplog.clear()
        for _ in range(2):
            pixels = decode_pixels({"bytes": file.getvalue(), "path": None}, 32)
        assert pixels[0, 0, 0] > 250 > 5 > pixels[0, 0, 2]
        said = f"there are {kind} images of several frames or pages: the first of each is used"
        assert caplog.messages == ([said] if frames else [])


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "the file is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "it is a pointer, and git lfs pull downloads the image"),
        (b"\n<!DOCTYPE html>", "it is a web page or the like"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "it is HEIC, and pip install pillow-heif reads that"),
        (b"\0\0\0\x18ftypqt  \0\0\0\0", "it is a film"),
        (b"%PDF-1.4\n", "it is a PDF file"),
        (b"PK\3\4\x14\0", "it is a .zip archive"),
        (b"\x1f\x8b\x08\0", "it is a .gz archive"),
        (bytes(128) + b"DICM", "it is a DICOM file"),
        (bytes(4000), "it begins with nothing but zeros, as what was not copied or downloaded to its end"),
    ],
)
def test_what_lies_in_the_place_of_an_image_is_named(content, what, tmp_path):
    (tmp_path / "a.jpg").write_bytes(content)
    for encoded in ({"bytes": content, "path": None}, {"bytes": None, "path": str(tmp_path / "a.jpg")}):
        with pytest.raises(UnreadableImageError, match=f"cannot identify image file.*; {what}$"):
            decode_pixels(encoded, 32)


def png(depth, kind, row, transparent):
    """A PNG of 4 x 4 pixels whose rows are those bytes, with a colour that is to be seen through."""
    parts = [(b"IHDR", struct.pack(">IIBBBBB", 4, 4, depth, kind, 0, 0, 0)), (b"tRNS", transparent)]
    parts += [(b"IDAT", zlib.compress((b"\0" + row) * 4)), (b"IEND", b"")]
    chunks = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in parts
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize(
    ("depth", "kind", "row", "colour", "shown"),
    [
        (16, 2, b"\x12\x34\x56\x78\x9a\xbc" * 4, (0x1234, 0x5678, 0x9ABC), [255, 255, 255]),
        (16, 2, b"\x12\x34\x56\x78\x9a\xbc" * 4, (0x12, 0x56, 0x9A), [18, 86, 154]),
        (8, 2, b"\x12\x56\x9a" * 4, (0x12, 0x56, 0x9A), [255, 255, 255]),
        (4, 0, b"\x55\x55", (5,), [255, 255, 255]),
        (4, 0, b"\x55\x55", (4,), [85, 85, 85]),
        (2, 0, b"\x55", (1,), [255, 255, 255]),
    ],
)
def test_the_colour_of_a_png_that_is_seen_through_has_the_bits_of_its_pixels(depth, kind, row, colour, shown):
    content = png(depth, kind, row, struct.pack(f">{len(colour)}H", *colour))
    assert decode_pixels({"bytes": content, "path": None}, 32)[0, 0].tolist() == shown
    with Image.open(io.BytesIO(content)) as image:
        assert [corner(image), corner(image)] == [shown, shown]


@pytest.mark.parametrize("kind", ["TGA", "DDS", "TIFF", "PNG"])
def test_a_picture_of_which_nothing_would_be_seen_is_shown_and_said(kind, caplog):
    _note_hidden.cache_clear()
    values = np.zeros((8, 8, 4), dtype=np.uint8)
    values[:4, :, 0] = 200
    for transparency, shown in ((0, [200, 0, 0]), (255, [200, 0, 0]), (128, [227, 127, 127])):
        values[..., 3] = transparency
        file = io.BytesIO()
        Image.fromarray(values).save(file, kind)
        assert decode_pixels({"bytes": file.getvalue(), "path": None}, 32)[0, 0].tolist() == shown
    assert caplog.messages == [
        "there are images that are transparent all over: their colours are used as if they were not"
    ]

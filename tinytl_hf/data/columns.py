"""Which column of a table holds the images, and which the labels."""

from __future__ import annotations

import io
import logging
import os
import re
import stat
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.compute
from PIL import Image

from tinytl_hf.config.data import DataConfig
from tinytl_hf.data.csv_files import NUMBER, TRUTH, WHOLE, is_of_texts
from tinytl_hf.data.encoded import check_no_base64, pixel_columns
from tinytl_hf.data.find import suffix_of
from tinytl_hf.data.found import named
from tinytl_hf.data.ids import id_columns, is_id, with_ids_placed
from tinytl_hf.data.images import FORMATS, IMAGE_SUFFIXES
from tinytl_hf.data.several_classes import check_one_class
from tinytl_hf.disk import expanded, path_of
from tinytl_hf.errors import TinyTLError

logger = logging.getLogger(__name__)

LABEL = "label"
SPLIT = "split"
OF_WEBDATASET = "cls"
KEY = "__key__"  # of WebDataset, too
NO_LABELS = {KEY, "__url__", "file_name"}  # they name an image each
CALLED_CLASSES = re.compile(
    r"(class(es)?|target|category|labels?|y|gt|ground[-_ ]?truth|diagnosis|grade|species|breed)"
    r"([-_ ]?(id|idx|index|no|num(ber)?|code|name)s?)?",
    re.I,
)
STRINGS = {"string", "large_string", "string_view"}
SEEN = 100  # rows that are looked at for a value
SIZES_AT_ONCE = 10_000  # rows
FEW = 20  # rows in which each text may be a class of its own, and columns that an error lists
BYTES = {"binary", "large_binary"}
ARRAYS = (datasets.List, datasets.LargeList, datasets.Array2D, datasets.Array3D, datasets.Array4D)
NUMBERS_OR_TRUTHS = {f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)} | {"bool"}


class NoLabelsError(TinyTLError):
    """A split whose images have no labels at all."""


def class_order(names: Collection[str]) -> list[str]:
    """Names of classes in order: by number if they all are whole numbers."""
    if all(name.removeprefix("-").isdecimal() for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def as_label(text: str) -> str:
    """The class that a folder's name or a text says: systems write one accented letter in two ways."""
    return unicodedata.normalize("NFC", text)


def image_rows(
    table: datasets.Dataset, config: DataConfig, base: Path | None, split: str | None = None
) -> tuple[str, datasets.Dataset]:
    """The name of the images' column, and a table of that column alone, called ``image``, undecoded.

    Args:
        table: A split.
        config: Which column it is, if that was said.
        base: Folder that paths are relative to; None: the table is not on this disk, and paths say nothing.
        split: Its name, if there are others: of images with one name, it has the one in a folder that is called so.

    Raises:
        TinyTLError: There is none, or there are several.
    """
    if config.image_column is None:
        column = _only(table, "image_column", _image_columns(table, config, base))
    else:
        column = _chosen(table, "image_column", config.image_column)
    # Without a format: one that names columns, as that of tables put together does, is not changed with them.
    rows = table.with_format(None).select_columns([column]).rename_columns({column: "image"})
    if is_id(rows.features["image"]):
        rows = rows.cast_column("image", datasets.Value("string"))
    feature = rows.features["image"]
    if is_string(feature):
        return column, _from_paths(rows["image"][:], column, base, config.skip_corrupt, split)
    if _is_struct(feature):
        parts = rows.flatten()
        without_bytes = parts.data.column("image.bytes").null_count
        if without_bytes == len(rows):
            return column, _from_paths(parts["image.path"][:], column, base, config.skip_corrupt, split)
        if without_bytes and base is not None:
            rows = _with_places(rows, base)
    if not _is_image(feature) and not _is_bytes(feature):
        raise TinyTLError(f"data.image_column={column}: it holds {feature}, not images")
    return column, rows.cast_column("image", datasets.Image(decode=False))


def byte_sizes(rows: datasets.Dataset) -> np.ndarray:
    """The size of each image's file in bytes, without reading one; -1 of a file that is not there."""
    sizes: list[int] = []
    for held, paths in _parts(rows):
        lengths = pyarrow.compute.binary_length(held).to_pylist()
        sizes += [
            length if length is not None else _size_of_file(path)
            for length, path in zip(lengths, paths.to_pylist(), strict=True)
        ]
    return np.array(sizes, dtype=np.int64)


def image_paths(rows: datasets.Dataset) -> list[str | None]:
    """The path of each image, or what it was called before it came into the table, without reading one."""
    return rows.flatten()["image.path"][:]  # without the bytes beside them


def image_files(rows: datasets.Dataset) -> list[str | None]:
    """The file of each image, without reading one; None of those that are in the table itself."""
    files: list[str | None] = []
    for held, paths in _parts(rows):
        files += pyarrow.compute.if_else(held.is_null(), paths, None).to_pylist()
    return files


def _parts(rows: datasets.Dataset) -> Iterator[tuple[pyarrow.ChunkedArray, pyarrow.ChunkedArray]]:
    """The bytes and the paths of images, some at a time; as columns of their own, which arrow is quicker with."""
    for table in rows.flatten().with_format("arrow").iter(batch_size=SIZES_AT_ONCE):
        yield table.column("image.bytes"), table.column("image.path")


def _size_of_file(path: str | None) -> int:
    try:
        state = os.stat(path or "")
    except (OSError, ValueError):
        return -1
    return state.st_size if stat.S_ISREG(state.st_mode) else -1


def label_column(table: datasets.Dataset, config: DataConfig, image_column: str) -> str:
    """The named column, else ``label``, else the only one of classes, else WebDataset's, else the one of texts.

    Numbers and truths say as often what an image has beside its class, so that no column of them is taken unless it is
    called so. One that is called ``class`` or ``target`` is asked about, where the only texts may be those of cameras.
    """
    if config.label_column is not None:
        return _chosen(table, "label_column", config.label_column)
    called_so = [name for name in table.column_names if name.lower() == LABEL and name != image_column]
    if LABEL in called_so or len(called_so) == 1:
        return LABEL if LABEL in called_so else called_so[0]
    classes = [name for name, feature in table.features.items() if isinstance(feature, datasets.ClassLabel)]
    if not classes and OF_WEBDATASET in table.column_names:
        return OF_WEBDATASET
    if not classes:
        texts = [name for name, feature in table.features.items() if is_string(feature)]
        classes = _repeating(table, [name for name in texts if name not in {*NO_LABELS, image_column}])
        check_one_class(table, classes)
        if is_of_texts(table):
            classes = [name for name in classes if not any(_are_all(kind, table, name) for kind in (NUMBER, TRUTH))]
        classes += _numbers_called_classes(table, classes[0]) if len(classes) == 1 else []
    if len(classes) == 1:
        return classes[0]
    if classes:
        raise _several("label_column", classes)
    raise _none("label_column", table, [name for name in _numbers_or_truths(table) if name != image_column])


def _are_all(kind: re.Pattern[str], table: datasets.Dataset, column: str) -> bool:
    """Whether all texts of a column, but those that are missing, match."""
    return all(text is None or kind.fullmatch(text.strip()) for text in table[column][:])


def _numbers_or_truths(table: datasets.Dataset) -> list[str]:
    """Columns of whole numbers, or of true and false, that may be classes."""
    if is_of_texts(table):
        found = [name for name in table.column_names if any(_are_all(kind, table, name) for kind in (WHOLE, TRUTH))]
    else:
        types = {name: getattr(feature, "dtype", "") for name, feature in table.features.items()}
        found = [name for name, dtype in types.items() if dtype in NUMBERS_OR_TRUTHS]
    return _repeating(table, [name for name in found if name not in NO_LABELS])


def _numbers_called_classes(table: datasets.Dataset, guessed: str) -> list[str]:
    """Columns of numbers or truths called as classes are, where the only one of texts is not and says other things."""
    if CALLED_CLASSES.fullmatch(guessed):
        return []
    called_so = [name for name in _numbers_or_truths(table) if CALLED_CLASSES.fullmatch(name)]
    texts = table[guessed][:] if called_so else []
    return [name for name in called_so if not _is_one_to_one(table[name][:], texts)]


def _is_one_to_one(numbers: Sequence[Any], texts: Sequence[Any]) -> bool:
    """Whether each number stands for one text, and each text for one number."""
    return len(set(zip(numbers, texts, strict=True))) == len(set(numbers)) == len(set(texts))


def _repeating(table: datasets.Dataset, columns: list[str]) -> list[str]:
    """Those whose values are classes: most occur more than once, unlike captions and names. Few rows do not tell."""
    if len(table) <= FEW or not columns:
        return columns
    texts = table.select_columns(columns).with_format("arrow")[:]
    return [name for name in columns if len(set(texts.column(name).to_pylist())) <= len(texts) / 2]


def _chosen(table: datasets.Dataset, key: str, chosen: str) -> str:
    if chosen not in table.column_names:
        columns = named(table.column_names, shown=FEW)
        raise TinyTLError(f"data.{key}={chosen}: no such column; the data set has {columns}")
    return chosen


def _image_columns(table: datasets.Dataset, config: DataConfig, base: Path | None) -> Iterator[list[str]]:
    """Columns of each kind that can hold images, the likeliest kind first."""
    seen = _seen(table)
    for fit in (_is_image, _holds_bytes, _holds_paths):
        yield [name for name, (feature, first) in seen.items() if fit(feature, first)]
    for name, (feature, first) in seen.items():
        if is_string(feature):
            check_no_base64(name, first)
    if base is not None:
        yield id_columns(table, base, config.label_column or LABEL)


def _only(table: datasets.Dataset, key: str, kinds: Iterable[list[str]]) -> str:
    """The only column of the first kind that occurs."""
    for found in kinds:
        if len(found) == 1:
            return found[0]
        if found:
            raise _several(key, found)
    raise _none(key, table, [])


def _seen(table: datasets.Dataset) -> dict[str, tuple[Any, Any]]:
    """Type and first value of each column. There can be hundreds, so that none is looked up by itself."""
    features, head = table.features, table.with_format("arrow")[:SEEN]
    return {
        name: (features[name], next((value.as_py() for value in head.column(name) if value.is_valid), None))
        for name in head.column_names
    }


def _several(key: str, found: Sequence[str]) -> TinyTLError:
    return TinyTLError(f"data.{key}: {named(found, shown=FEW)} all fit; name one, as --data.{key} {found[0]}")


def _none(key: str, table: datasets.Dataset, others: Sequence[str]) -> TinyTLError:
    columns = named(table.column_names, shown=FEW)
    if key == "label_column" and KEY in table.column_names:
        return NoLabelsError(
            f"data.{key}: no column of {columns} fits: in a .tar the class of an image is in a .cls file of its name; "
            "if the folders in it are the classes, unpack it and name the folder"
        )
    kind = NoLabelsError if key == "label_column" else TinyTLError
    mixed = [name for name, feature in table.features.items() if isinstance(feature, datasets.Json)]
    aside = f" ({named(mixed)} with values of several kinds)" if mixed else ""
    fix = f"name one with --data.{key}"
    if others:
        fix = f"if the numbers or truths of {named(others)} are classes, name the column, as --data.{key} {others[0]}"
    row = {name: first for name, (_, first) in _seen(table).items() if name.lower() != LABEL}
    pixels = pixel_columns(row) if key == "image_column" else []
    arrays = [name for name, feature in table.features.items() if isinstance(feature, ARRAYS)]
    if arrays and key == "image_column":
        fix = (
            f"if {named(arrays, shown=2)} holds pixels or lists of images, write the bytes of one image into each row"
        )
    if pixels:
        fix = f"if {named(pixels, shown=2)} are the pixels of images, write each row into an image file of its class"
    return kind(f"data.{key}: no column of {columns} fits by its type{aside}; {fix}")


def _is_image(feature: Any, _first: Any = None) -> bool:
    return isinstance(feature, datasets.Image)


def is_string(feature: Any) -> bool:
    """Whether a column holds texts, by its type."""
    return isinstance(feature, datasets.Value) and feature.dtype in STRINGS


def _is_struct(feature: Any) -> bool:
    """Whether a column is as datasets stores images: ``{"bytes": ..., "path": ...}``."""
    return isinstance(feature, dict) and feature.keys() == {"bytes", "path"}


def _is_bytes(feature: Any) -> bool:
    """Whether a column holds bytes, alone or beside paths, where all of them may be missing."""
    if _is_struct(feature):
        return getattr(feature["bytes"], "dtype", None) in {*BYTES, "null"}
    return isinstance(feature, datasets.Value) and feature.dtype in BYTES


def _with_places(rows: datasets.Dataset, base: Path) -> datasets.Dataset:
    """Images of which some are in the table and others at paths relative to its folder."""
    place = {path: place_of(path, base) for path in rows.flatten()["image.path"][:] if path is not None}

    def placed(image: dict[str, Any] | None) -> dict[str, Any] | None:
        if image is None or image["bytes"] is not None or image["path"] is None:
            return image
        return {**image, "path": place[image["path"]]}

    features = datasets.Features(image={"bytes": datasets.Value("binary"), "path": datasets.Value("string")})
    return rows.map(lambda row: {"image": placed(row["image"])}, features=features, keep_in_memory=True)


def _holds_bytes(feature: Any, first: Any) -> bool:
    """Whether bytes are those of images, by the first."""
    if not _is_bytes(feature):
        return False
    content = first["bytes"] if isinstance(first, dict) else first
    if not content:
        return isinstance(first, dict)
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS):
            return True
    except Exception:  # a damaged file can make Pillow raise almost anything
        return isinstance(first, dict)


def _holds_paths(feature: Any, first: Any) -> bool:
    return is_string(feature) and is_path(first or "")


def is_path(text: str) -> bool:
    """Whether a text is the path of an image, by its suffix."""
    return suffix_of(text.rstrip()) in IMAGE_SUFFIXES


def path_columns(table: datasets.Dataset) -> list[str]:
    """Columns that have paths of images, by the first."""
    return [name for name, (feature, first) in _seen(table).items() if _holds_paths(feature, first)]


def _from_paths(
    values: Sequence[str | None], column: str, base: Path | None, skip_missing: bool, split: str | None
) -> datasets.Dataset:
    """Images by their paths: relative ones to the table's folder, else to the current one."""
    paths = [None if path is None else path_of(str(path)) for path in values]
    remote = next((path for path in paths if path is not None and "://" in path), None)
    if remote is not None or base is None:
        raise TinyTLError(
            f"data.image_column={column}: it holds {remote or 'paths'}, and images must be in the table or files on "
            "this disk; download them first"
        )
    places = [None if path is None else place_of(path, base) for path in paths]
    check_no_base64(column, next((path for path in paths if path is not None), None))
    places = with_ids_placed(paths, places, column, base, split)
    missing = [place for place in places if place is not None and not os.path.isfile(place)]
    if missing and not skip_missing:
        raise TinyTLError(
            f"column {column} names {named(missing, shown=1)}, and there is no such file; mend it, or leave such rows "
            "out with --data.skip_corrupt true"
        )
    features = datasets.Features(image=datasets.Image(decode=False))
    return datasets.Dataset.from_dict({"image": places}, features=features)


def images_named(table: datasets.Dataset, base: Path) -> set[str]:
    """Whole paths of the images that a table names."""
    return {
        place_of(str(path), base) for column in path_columns(table) for path in table[column][:] if path is not None
    }


def place_of(path: str, base: Path) -> str:
    """The image that a path in a table means: beside the table if it is there, else in the current folder."""
    beside = os.path.join(base, expanded(path))
    if os.path.exists(beside):
        return beside
    slashes = os.path.join(base, path.replace("\\", "/"))  # as Windows writes what is between folders
    for form in ("NFC", "NFD"):  # systems write one accented letter in two ways
        for place in (beside, slashes, beside.rstrip()):  # people leave spaces behind
            if os.path.exists(spelled := unicodedata.normalize(form, place)):
                return spelled
    return os.path.abspath(path) if os.path.exists(path) else beside

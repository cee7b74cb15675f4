"""Paths as people write them, and files that appear whole or not at all, also where a machine stops in the middle."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import unquote

from tinytl_hf.errors import TinyTLError

ADDRESS = re.compile(r"file:(//(localhost(?=/))?)?", re.I)
StrPath = str | os.PathLike[str]  # what callers hand over as a path, or as a name that can be one


def local_path(name: StrPath) -> Path:
    """The path that a name stands for: absolute, with ``~`` for the user's home and without ``.``, ``..`` and links.

    It is compared and stored like this, so that one place has one spelling.
    """
    path = expanded(name)
    try:
        return path.resolve()
    except (OSError, ValueError, RuntimeError):  # a circle of links, or characters that no path can have
        return path.absolute()


def expanded(name: StrPath) -> Path:
    """A path with ``~`` for the user's home, as a shell expands it where it is not quoted; of an address, its path."""
    path = Path(path_of(os.fspath(name)))
    try:
        return path.expanduser()
    except RuntimeError:  # ~other, where there is no such user
        return path


def path_of(name: str) -> str:
    """The path in an address of this disk (``file:///a%20b/1.jpg``), as browsers give it; other names as they are."""
    address = ADDRESS.match(name)
    if address is None or os.path.lexists(name):
        return name
    path = name[address.end() :]
    return path if "%" not in path or os.path.lexists(path) else unquote(path)


def check_ours(key: str, path: Path, mark: str | re.Pattern[bytes]) -> None:
    """Raise if a file is there that is none of ours: nothing else is ever replaced.

    Args:
        key: The option that names the file.
        path: The file.
        mark: What every one of ours holds: a text, or what a pattern finds.

    Raises:
        TinyTLError: It is another's, or cannot be read.
    """
    pattern = re.compile(re.escape(mark.encode())) if isinstance(mark, str) else mark
    with writing(f"{key}={path}", "name another file"):
        check_is_file(path)
        is_other = os.path.lexists(path) and pattern.search(path.read_bytes()) is None
    if is_other:
        raise TinyTLError(f"{key}={path}: is there, and was not written by this command; name another file")


def check_is_file(path: Path) -> None:
    """Raise if a pipe or a device is at a path: the one is waited for, for ever, and the other can have no end.

    Raises:
        OSError: With what it is. A folder, or nothing at all, is told by what opens it.
    """
    try:
        mode = path.stat().st_mode
    except OSError:
        return
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise OSError("it is no file, but a pipe, a device or the like")


@contextmanager
def writing(what: object, fix: str) -> Iterator[None]:
    """Where a file or a folder cannot be written, say so on one line.

    Args:
        what: The file, or the option that names it with its value.
        fix: What to do about it.

    Raises:
        TinyTLError: It cannot.
    """
    try:
        yield
    except OSError as error:
        raise TinyTLError(f"{what}: cannot be written ({error}); {fix}") from error


def check_writable(path: Path) -> None:
    """Try that a file can be written later, in its folder or, where that is to be made, in the one that is there.

    Raises:
        OSError: None can.
    """
    with suppress(FileNotFoundError):
        path.parent.stat()  # names that are too long, or below a file
    there = next(folder for folder in path.absolute().parents if folder.exists())
    trial = there / f".{path.name}.tmp"
    with suppress(FileExistsError):  # another process of a launch tries the same, or it is somebody's
        trial.open("xb").close()
        trial.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file under another name, bring it to the disk, and give it its name."""
    write_together({path: content})


def write_together(files: Mapping[Path, bytes]) -> None:
    """As :func:`write_bytes`, for files that belong together: none gets its name before all are on the disk.

    So where one finds no room, or a person stops it there, those that were there before still fit one another, and
    nothing new stays. Folders that are not there are made. A pipe or a device is not replaced, and nothing is written
    through a link that somebody put where the file is to be made.

    Raises:
        OSError: One cannot be written.
    """
    for path in files:
        check_is_file(path)
    temporary = {path: path.with_name(f".{path.name}.tmp") for path in files}
    folders = {path.parent for path in files}
    made = [place for folder in folders for place in (folder, *folder.parents) if not place.exists()]
    try:
        for path, content in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary[path].unlink(missing_ok=True)  # what a kill left, or a link
            with temporary[path].open("xb") as file:
                file.write(content)
            sync(temporary[path])
        for path in files:
            temporary[path].replace(path)
    except BaseException:  # Ctrl-C is none of the others
        _remove(temporary.values(), made)
        raise
    for folder in folders:
        sync(folder)


def _remove(files: Iterable[Path], folders: Iterable[Path]) -> None:
    """Remove what there is of these, and nothing that somebody else put there."""
    for file in files:
        with suppress(OSError):  # nor could the folder around it be made, or be read
            file.unlink()
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def write_text(path: Path, text: str) -> None:
    """As :func:`write_bytes`, in UTF-8; bytes of a file's name that are no such text are escaped."""
    write_bytes(path, encoded(text))


def encoded(text: str) -> bytes:
    """Text in UTF-8, in which bytes of a file's name that are no such text are escaped."""
    return text.encode("utf-8", "backslashreplace")


def sync(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

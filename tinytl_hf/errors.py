"""The exceptions that are meant for the person at the keyboard, and text that is safe to show there."""

import json
import unicodedata

# Marks that turn the direction of the text behind them, so that a name shows as another one.
TURNING = frozenset(map(chr, (*range(0x202A, 0x202F), *range(0x2066, 0x206A))))


class TinyTLError(ValueError):
    """Bad input: the message names the thing, the value found and the fix."""


class Interrupted(Exception):
    """The run was asked to stop and has saved a checkpoint.

    Attributes:
        exit_code: 128 plus the signal's number, as shells expect.
    """

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum


class Terminated(KeyboardInterrupt):
    """A signal asked the command to end: what is cleared away at Ctrl-C is cleared away at that, too.

    Attributes:
        exit_code: 128 plus the signal's number, as shells expect.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.exit_code = 128 + signum


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its class where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip() if lines else type(error).__name__


def one_line(text: object) -> str:
    """Text on one line, without what is no character: line ends, escape sequences, bytes of a name that is not UTF-8.

    Nor has it marks that turn the direction of text.

    A name of a file or a class can hold such things, and a terminal or a page would act on them.
    """
    shown = "".join(" " if unicodedata.category(c) in ("Cc", "Cs") or c in TURNING else c for c in str(text))
    return " ".join(shown.split())


def quoted(text: str) -> str:
    """Text as a string of Python's in double quotes, for code that a person copies."""
    return json.dumps(text, ensure_ascii=False)

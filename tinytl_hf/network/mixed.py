"""Classes made while a program runs, of a mix-in and a network's own class, that pickle can make again.

Pickle looks a class up by its name, which these do not have: so ``torch.save(model)`` would fail.
"""

from __future__ import annotations

import copyreg
import functools
from typing import Any


class Mixed(type):
    """Their metaclass, by which pickle knows them.

    Attributes:
        made_of: What :func:`mixed` was called with.
    """

    made_of: tuple[str, type, type]


def mixed(name: str, mixin: type, own: type) -> Any:
    """The class called ``name`` whose methods are first those of ``mixin``, then those of ``own``."""
    return _made(name, mixin, own)


@functools.cache  # apart from :func:`mixed`, as mypy takes no class for an argument of a cached function
def _made(name: str, mixin: type, own: type) -> Mixed:
    return Mixed(name, (mixin, own), {"__module__": mixin.__module__, "made_of": (name, mixin, own)})


def _pickled(made: Mixed) -> str | tuple[Any, ...]:
    return (mixed, made.made_of) if "made_of" in vars(made) else made.__qualname__  # a subclass of one has a name


copyreg.pickle(Mixed, _pickled)

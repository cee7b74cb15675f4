"""Folders that are called almost as splits are: ``seg_train``, ``training_set``, ``trainval``."""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Mapping
from pathlib import Path

from tinytl_hf.data.found import named
from tinytl_hf.data.roles import SPLIT_WORDS, role_of
from tinytl_hf.errors import TinyTLError

logger = logging.getLogger(__name__)

MORE_BEHIND = re.compile(r"(?<=.)(val|data|dataset|set|images?|imgs?)$")  # trainval, testset


def check_almost_splits(root: Path, tops: Mapping[str, list[str]]) -> None:
    """Raise if folders are called almost as splits are and hold the same ones, as ``seg_train``, ``seg_test`` do.

    Args:
        root: The data set's folder.
        tops: Its top folders, with the paths of their images.
    """
    roles = {top: found for top in tops if (found := {role_of(word) for word in split_words(top)})}
    inside = {top: {name for path in tops[top] for name in path.split("/")[1:-1]} for top in roles}
    first = {top: {path.split("/")[1] for path in tops[top]} for top in roles}
    for one, other in itertools.combinations(roles, 2):
        shared = inside[one] & inside[other]
        if len(shared) < 2 or roles[one] == roles[other]:
            continue
        fix = "put these folders right into folders called train and test"
        if shared <= first[one]:
            fix = "name the two with --data.train_split and --data.eval_split"
        raise TinyTLError(
            f"data.dataset={root}: {one}/ and {other}/ are called almost as splits are, and hold the same folders "
            f"({named(sorted(shared))}): if they are splits, {fix}; if they are classes, put their images right into "
            "them"
        )


def say_odd_names(tops: list[str], labelled: bool = False) -> None:
    """Say if folders are no splits, though their names make one think so.

    Args:
        tops: The top folders of the images.
        labelled: Whether something else than the folders gives the labels.
    """
    odd = [top for top in tops if split_words(top)]
    roles = {role_of(word) for top in odd for word in split_words(top)}
    if not (odd and len(odd) == len(tops)) and not any(role_of(top) for top in odd) and len(roles) < 2:
        return
    if labelled:
        logger.warning("%s: not read as splits, which are called train, validation and test", named(odd))
        return
    logger.warning(
        "%s: read as %s, as splits hold class folders and are called train, validation and test",
        named(odd),
        "classes" if len(odd) > 1 else "a class",
    )


def split_words(name: str) -> set[str]:
    """What splits are called, of the words that a name is made of."""
    words = re.split(r"[^a-z]+", name.lower())
    return SPLIT_WORDS & {each for word in words for each in (word, MORE_BEHIND.sub("", word))}

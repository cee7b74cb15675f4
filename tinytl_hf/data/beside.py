"""What is said of files beside class folders that are about the images in those, and that are not used."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from tinytl_hf.data.found import named

logger = logging.getLogger(__name__)


def say_not_used(files: Mapping[str, int], fix: str) -> None:
    """Say that files which name images are not used.

    Args:
        files: Each of them, with how many of the images it names.
        fix: What to do to have other labels.
    """
    one = len(files) == 1
    logger.warning(
        "%s %s %s of these images and %s not used: the folders are the classes; %s",
        *(named(list(files)), "names" if one else "name", f"{sum(files.values()):,}", "is" if one else "are", fix),
    )


def say_splits_not_taken(
    files: Sequence[str],
    fix: str = "put the images into train/CLASS and test/CLASS, or write a table with columns path, label and split, "
    "and name that",
) -> None:
    """Say that files which say what is for tests are not used.

    Args:
        files: The files.
        fix: What to do to have the splits that they say.
    """
    logger.warning(
        "%s: which images are for tests is not taken from there, and the folders do not say it; %s", named(files), fix
    )

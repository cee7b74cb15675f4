"""A folder of image files to labelled tables: which folders are classes, which are splits, and what is left out.

Classes are the first level of folders below the split, as in torchvision's ``ImageFolder``; deeper levels belong to
them. Folders are splits if people call splits so and they hold class folders themselves. File names decide nothing.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import datasets

from tinytl_hf.config.data import DataConfig
from tinytl_hf.data.almost_splits import check_almost_splits, say_odd_names
from tinytl_hf.data.columns import as_label, class_order
from tinytl_hf.data.found import named
from tinytl_hf.data.listing import Listing
from tinytl_hf.data.masks import check_no_masks, say_masks, say_pairs
from tinytl_hf.data.roles import asked_splits, chosen_splits, role_of
from tinytl_hf.errors import TinyTLError

logger = logging.getLogger(__name__)


@dataclass
class Folder:
    """A folder's image files, by their paths relative to the data set's folder.

    Attributes:
        direct: Those that lie in it.
        below: Those of each folder in it, of any depth.
    """

    direct: list[str] = field(default_factory=list)
    below: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    @property
    def all(self) -> list[str]:
        """All of them."""
        return [*self.direct, *(path for paths in self.below.values() for path in paths)]

    @property
    def example(self) -> str:
        """One of them."""
        return self.direct[0] if self.direct else next(iter(self.below.values()))[0]


Tops = dict[str, Folder]


def class_folders(listing: Listing, config: DataConfig) -> datasets.DatasetDict:
    """Label images by the folders that they are in.

    Args:
        listing: The files; what is left out is added to it.
        config: The names of the splits that were asked for.

    Raises:
        TinyTLError: They can be read in two ways, or in none.
    """
    tops, loose = _by_top(listing.images)
    if loose:
        if not tops:
            raise TinyTLError(
                f"data.dataset={listing.root}: its images lie in no class folder ({loose[0]}); put those of each "
                "class into a folder of its name, or write a metadata.csv with columns file_name and label"
            )
        listing.left_out.add("in no class folder", loose[0], len(loose))
    tops, depth = _unwrapped(tops, chosen_splits(config))
    splits = find_splits(tops, listing, config)
    if splits is None:
        check_no_masks(listing.root, {name: folder.all for name, folder in tops.items()})
        _check_splits_inside(listing.root, tops)
        check_almost_splits(listing.root, {name: folder.all for name, folder in tops.items()})
        say_odd_names(list(tops))
        found = {"train": {name: folder.all for name, folder in tops.items()}}
    else:
        found = {}
        for name, top in splits.items():
            folder = tops[top]
            if folder.direct:
                listing.left_out.add("in no class folder", folder.direct[0], len(folder.direct))
            found[name] = dict(folder.below)
            check_no_masks(listing.root, found[name])
    depth += 1 if splits is None else 2  # of a class folder
    for classes in found.values():
        _check_no_class_of_classes(listing.root, classes, depth)
        say_pairs(classes)
    _say_same_folders(next(iter(found.values())), depth)
    say_masks((path for classes in found.values() for paths in classes.values() for path in paths), depth)
    _say_depths(found, depth)
    return _tables(listing.root, found)


def find_splits(tops: Tops, listing: Listing, config: DataConfig, labelled: bool = False) -> dict[str, str] | None:
    """Which of the top folders are splits: their folders by the splits' names; None: all folders are classes.

    Args:
        tops: Top folders of the images.
        listing: Gets what is left out.
        config: The names of the splits that were asked for.
        labelled: Whether all these images have labels, so that a split needs no class folders.

    Raises:
        TinyTLError: They can be read in two ways, or two folders are the same split.
    """
    chosen = chosen_splits(config)
    called = [top for top in tops if role_of(top) or top in chosen]
    splits = [top for top in called if tops[top].below or labelled]
    others = [top for top in tops if top not in splits]
    if not splits:
        return None
    strangers = [top for top in others if top not in called]
    if strangers and not _agree(tops, splits, labelled) and not chosen & set(splits):
        train = next((top for top in splits if role_of(top) == "train" and not tops[top].direct), None)
        if train is None or len(tops[train].below) < 2:
            return None
        raise _two_readings(listing.root, tops, train, strangers[0])
    trains = any(role_of(top) == "train" or top in chosen for top in splits)
    if not trains and any(role_of(top) == "train" for top in others):
        raise _two_readings(listing.root, tops, splits[0], others[0])
    for top in others:
        reason = "beside the splits" if top in strangers else "without labels, as there are no class folders"
        listing.left_out.add(reason, tops[top].example, len(tops[top].all))
    same: dict[str, list[str]] = defaultdict(list)
    for top in splits:
        same[role_of(top) or top].append(top)
    return {name: _only(name, folders, tops, listing, config) for name, folders in same.items()}


def _only(split: str, folders: list[str], tops: Tops, listing: Listing, config: DataConfig) -> str:
    """The folder of a split: of several that are called so, the one that was asked for."""
    asked = [folder for folder in folders if folder in asked_splits(config)]
    if len(folders) > 1 and len(asked) != 1:
        option = "train_split" if split == "train" else "eval_split"
        named = next(folder for folder in folders if folder != DataConfig.train_split)  # a default asks for no folder
        fix = f", or name one with --data.{option} {named}"
        raise TinyTLError(
            f"data.dataset={listing.root}: {folders[0]}/ and {folders[1]}/ are both the {split} split; put them "
            f"together{fix}"
        )
    taken = asked[0] if asked else folders[0]
    for folder in folders:
        if folder != taken:
            listing.left_out.add(f"beside {taken}/, which was named", tops[folder].example, len(tops[folder].all))
    return taken


def _agree(tops: Tops, splits: list[str], labelled: bool) -> bool:
    """Whether there are two splits or more, with a class in common with the training images."""
    train = next((top for top in splits if role_of(top) == "train"), None)
    if train is None:
        return False
    others = [top for top in splits if top != train]
    return any(labelled or tops[train].below.keys() & tops[top].below.keys() for top in others)


def _by_top(paths: list[str], depth: int = 0) -> tuple[Tops, list[str]]:
    """Images by the folders that lie at a depth, from 0 on, and those that lie in none there."""
    tops: Tops = defaultdict(Folder)
    loose = []
    for path in paths:
        parts = path.split("/", depth + 2)[depth:]
        if len(parts) == 1:
            loose.append(path)
        elif len(parts) == 2:
            tops[parts[0]].direct.append(path)
        else:
            tops[parts[0]].below[parts[1]].append(path)
    return dict(tops), loose


def _unwrapped(tops: Tops, chosen: set[str]) -> tuple[Tops, int]:
    """The folders inside the only one, if those are splits (as in ``data/train/cat``); and at which depth they lie."""
    if len(tops) != 1:
        return tops, 0
    ((outer, folder),) = tops.items()
    holds_splits = not folder.direct and all(role_of(name) or name in chosen for name in folder.below)
    if not holds_splits or role_of(outer) or outer in chosen:
        return tops, 0
    inner, _ = _by_top(folder.all, depth=1)
    return (inner, 1) if any(folder.below for folder in inner.values()) else (tops, 0)


def _two_readings(root: Path, tops: Tops, split: str, other: str) -> TinyTLError:
    inside = named(list(tops[split].below))
    same = tops[split].below.keys() & tops[other].below.keys()
    third = f"; if {other}/ is a split as well, name it with --data.eval_split {other}" if same else ""
    return TinyTLError(
        f"data.dataset={root}: {split}/ can be a split with the classes {inside} ({tops[split].example}), or a class "
        f"beside {other} ({tops[other].example}); name {root / split} for the first, and for the second put all "
        f"images right into {split}/{third}"
    )


def _check_splits_inside(root: Path, tops: Tops) -> None:
    """Raise if all folders hold nothing but splits, as in ``cat/train``: their test images would be trained on."""
    names = {name for folder in tops.values() for name in folder.below}
    if len({role_of(name) for name in names}) < 2 or not all(role_of(name) for name in names):
        return
    if any(folder.direct for folder in tops.values()):
        return
    first = next(iter(tops))
    if len(tops) == 1 and all(path.count("/") == 2 for path in tops[first].all):
        raise TinyTLError(
            f"data.dataset={root}: its images lie in splits and in no class folder ({tops[first].example}); put those "
            "of each class into a folder of its name in each split, or write a metadata.csv with columns file_name "
            "and label"
        )
    raise TinyTLError(
        f"data.dataset={root}: its folders hold {', '.join(sorted(names))} ({tops[first].example}), which are called "
        f"as splits are: if {first} is a class, put its images into train/{first} and test/{first} or, to train on "
        f"all of them, right into {first}/; if {first} is a data set, name {root / first}"
    )


def _say_same_folders(classes: dict[str, list[str]], depth: int) -> None:
    """Say if most class folders hold the same ones, which may be the classes: ``color/apple``, ``gray/apple``."""
    inside: dict[str, set[str]] = {}
    for folder, paths in classes.items():
        levels = [place.split("/")[depth:] for place in {path.rpartition("/")[0] for path in paths}]
        first = {names[0] for names in levels if names}
        inside[folder] = first | {
            name for names in levels for name in names if not name.isdecimal()
        }  # 2024/12 are dates
    counts = Counter(name for names in inside.values() for name in names)
    same = {name for name, count in counts.items() if count > 1 and 2 * count >= len(classes)}
    if len(same) < 2:
        return
    logger.warning(
        "the classes %s hold the same folders (%s): if those are the classes, name the folder of one",
        *(named([folder for folder, names in inside.items() if names & same]), named(sorted(same))),
    )


def _check_no_class_of_classes(root: Path, classes: dict[str, list[str]], depth: int) -> None:
    """Raise if a class folder holds folders that are called as the other classes are, and nothing else.

    Archives that are packed twice leave such a folder (``PlantVillage/PlantVillage``), and so do programs that add
    changed copies (``augmented/cat`` beside ``cat``).
    """
    for folder, paths in classes.items():
        inside = {path.split("/")[depth] for path in paths if path.count("/") > depth}
        is_deep = all(path.count("/") > depth for path in paths)
        if len(inside) < 2 or not is_deep or not inside <= classes.keys() - {folder}:
            continue
        outer = "/".join(paths[0].split("/")[:depth])
        fix = "; if it is a split, put the folders beside it into one called train" if role_of(folder) else ""
        raise TinyTLError(
            f"data.dataset={root}: {outer}/ holds folders that are called as classes beside it "
            f"({named(sorted(inside))}; {paths[0]}): if it holds images of those classes, put them into the folders "
            f"beside it, or take {outer}/ away; if it is a class, put its images right into it{fix}"
        )


def _say_depths(found: dict[str, dict[str, list[str]]], depth: int) -> None:
    """Say if images lie deeper than their class folders do, with one of each depth."""
    examples: dict[int, str] = {}
    for classes in found.values():
        for paths in classes.values():
            for path in paths:
                examples.setdefault(path.count("/"), path)
    if examples.keys() != {depth}:
        where = "at different depths" if len(examples) > 1 else "in folders of their class folders"
        shown = named([examples[key] for key in sorted(examples)])
        logger.info(
            "images lie %s (%s): the class is the %s folder, and what is below belongs to it",
            *(where, shown, ("first", "second", "third")[min(depth, 3) - 1]),
        )


def _tables(root: Path, found: dict[str, dict[str, list[str]]]) -> datasets.DatasetDict:
    tables = datasets.DatasetDict()
    for split, classes in found.items():
        labels = {folder: as_label(folder) for folder in classes}
        names = class_order(set(labels.values()))  # of this split: a run takes in those of the splits that it uses
        numbers = {name: number for number, name in enumerate(names)}
        number = {folder: numbers[label] for folder, label in labels.items()}
        features = datasets.Features(image=datasets.Image(decode=False), label=datasets.ClassLabel(names=names))
        rows = sorted((number[folder], path) for folder, paths in classes.items() for path in paths)
        columns = {"image": [f"{root}/{path}" for _, path in rows], "label": [label for label, _ in rows]}
        tables[split] = datasets.Dataset.from_dict(columns, features=features)
    return tables

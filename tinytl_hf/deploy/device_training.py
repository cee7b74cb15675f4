"""Train on a device: an exported step, photos, and an adapter in the end, without PyTorch's autograd.

``python -m tinytl_hf.deploy.device_training --step step.pte --images folder --output adapter`` trains on a folder that
has a sub-folder of photos for each class. ExecuTorch computes losses and gradients and changes the parameters.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinytl_hf.adapter.format import CONFIG_FILE, folder_named, write_adapter
from tinytl_hf.adapter.record import AdapterConfig, InitRecord, config_from
from tinytl_hf.config.check import check
from tinytl_hf.data.found import named
from tinytl_hf.data.images import UnreadableImageError, decode_pixels
from tinytl_hf.data.listing import is_of_system
from tinytl_hf.data.view import centre_view, normalised
from tinytl_hf.deploy.sources import images_in
from tinytl_hf.disk import StrPath, check_writable, expanded, writing
from tinytl_hf.errors import TinyTLError
from tinytl_hf.hub.card import read_card, render_card
from tinytl_hf.words import counted

logger = logging.getLogger(__name__)


class DeviceTraining:
    """Trains from a step that ``tinytl-hf export --format executorch --train true`` wrote.

    Args:
        path: The .pte file, with its .json file beside it.
        lr: Learning rate of SGD.
        momentum: Momentum of SGD.

    Attributes:
        label_names: Names of the classes.
        batch_size: Images a step.
        size: Side of the images in px.

    Raises:
        TinyTLError: ExecuTorch is not installed, a file is absent, damaged or of another kind, or a number does not
            fit.
    """

    def __init__(self, path: StrPath, lr: float, momentum: float = 0.0) -> None:
        check(0 < lr < float("inf"), "lr", lr, "use a number above 0")
        check(0 <= momentum < 1, "momentum", momentum, "use 0 or more, below 1")
        try:
            from executorch.extension import training
        except ImportError as error:
            raise TinyTLError(
                f"{path}: the package executorch is not installed ({error}); run pip install 'tinytl-hf[executorch]'"
            ) from error
        path = expanded(path)
        self._about_path = path.with_suffix(".json")
        try:
            about = json.loads(self._about_path.read_text(encoding="utf-8"))
            self._adapter_names: dict[str, str] = about["gradients"]
            self._preprocessing = about["preprocessing"]
            self.batch_size, _, self.size, _ = about["input"]["shape"]
            self._config = config_from(about["adapter_config"], self._about_path)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise TinyTLError(
                f"{self._about_path}: is not the description of a training step ({error}); write both files with "
                "tinytl-hf export --format executorch --train true"
            ) from error
        self.label_names = self._config.label_names
        try:
            self._module = training._load_for_executorch_for_training(str(path))
            # It knows its parameters after a first pass (1.5.1), which changes nothing.
            blank = torch.zeros(self.batch_size, 3, self.size, self.size)
            self._module.forward_backward("forward", [blank, torch.zeros(self.batch_size, dtype=torch.int64)])
            parameters = self._module.named_parameters()
        except Exception as error:  # its errors have no class in common but this one
            raise TinyTLError(f"{path}: ExecuTorch cannot load it ({error}); export it again") from error
        self._optimizer = training.get_sgd_optimizer(parameters, lr, momentum, 0.0, 0.0, False)

    def view(self, photo: np.ndarray) -> np.ndarray:
        """A photo ``uint8`` ``[H, W, 3]`` as the step gets it, ``float32`` ``[3, S, S]``."""
        options = (self.size, self._preprocessing["crop_pct"], self._preprocessing.get("interpolation", "bilinear"))
        view = centre_view(photo, *options)
        return normalised(view[None], self._preprocessing)[0]

    def step(self, views: np.ndarray, labels: np.ndarray) -> float:
        """Take a step of SGD.

        Args:
            views: ``float32`` ``[batch_size, 3, S, S]``.
            labels: Class numbers ``[batch_size]``.

        Returns:
            The mean loss before the step.

        Raises:
            TinyTLError: A number of no class.
        """
        numbers = class_numbers(labels, len(views), len(self.label_names))
        inputs = [torch.from_numpy(np.ascontiguousarray(views)), torch.from_numpy(numbers)]
        loss = float(self._module.forward_backward("forward", inputs)[0])
        self._optimizer.step(self._module.named_gradients())
        return loss

    def train(self, photos: Sequence[np.ndarray], labels: Sequence[int], steps: int, seed: int = 0) -> list[float]:
        """Take steps on photos in random order, each photo once before any comes again.

        Args:
            photos: ``uint8`` ``[H, W, 3]`` of any sizes.
            labels: Their class numbers.
            steps: How many.
            seed: Of the order.

        Returns:
            The mean loss of each step's batch, before the step.

        Raises:
            TinyTLError: No step, no photo, or a number of no class.
        """
        check(steps >= 1, "steps", steps, "use 1 or more")
        numbers = class_numbers(labels, len(photos), len(self.label_names))
        views = np.stack([self.view(photo) for photo in photos])
        random, losses = np.random.default_rng(seed), []
        order: np.ndarray = np.empty(0, int)
        for _ in range(steps):
            while len(order) < self.batch_size:
                order = np.concatenate([order, random.permutation(len(photos))])
            batch, order = order[: self.batch_size], order[self.batch_size :]
            losses.append(self.step(views[batch], numbers[batch]))
        return losses

    def adapter_tensors(self) -> dict[str, Tensor]:
        """What was trained, by the names that it has in an adapter."""
        parameters = self._module.named_parameters()
        return {name: parameters[key].detach().clone() for key, name in self._adapter_names.items()}

    def save_adapter(self, folder: StrPath) -> None:
        """Write an adapter folder that ``TinyTLModel.from_pretrained`` loads.

        Raises:
            TinyTLError: The folder cannot be written, or training went to values that are not finite.
        """
        target = folder_named("folder", folder)
        config = trained_further(self._config)
        card = render_card(config, None, read_card(target))
        write_adapter(target, config, self.adapter_tensors(), card)


def class_numbers(labels: Any, photos: int, classes: int) -> np.ndarray:
    """Class numbers of photos, ``int64``; with one of no class, ExecuTorch's kernels would read other memory.

    Raises:
        TinyTLError: There is no photo, or not one number of a class for each.
    """
    numbers = np.asarray(labels)
    check(photos >= 1, "photos", photos, "use one or more")
    fits = numbers.shape == (photos,) and np.issubdtype(numbers.dtype, np.integer)
    check(fits, "labels", f"{numbers.dtype} {list(numbers.shape)}", f"use a class number for each of {photos} photos")
    wrong = numbers[(numbers < 0) | (numbers >= classes)]
    check(not wrong.size, "labels", wrong[:1].tolist(), f"use class numbers from 0 to {classes - 1}")
    return numbers.astype(np.int64)


def trained_further(config: AdapterConfig) -> AdapterConfig:
    """The config of an adapter that went on from this one on photos of a device, of which nobody has the hash."""
    hashes = [record.train_sha256 for record in (config.data, config.init) if record is not None]
    init = InitRecord(config.method, config.label_names, train_sha256=next(filter(None, hashes), None))
    data = config.data and replace(config.data, train_sha256=None, eval_sha256=None, test_sha256=None)
    return replace(config, init=init, data=data)


def read_folder(folder: StrPath, label_names: Sequence[str], size: int) -> tuple[list[np.ndarray], list[int]]:
    """The photos of a folder with a sub-folder for each class, decoded for an input of ``size`` px.

    Deeper folders belong to their class. What is left out is counted and logged.

    Raises:
        TinyTLError: No such folder, one of another class, a photo that cannot be read, or a class without photos.
    """
    root = folder_named("images", folder)
    inside = sorted(root.iterdir()) if root.is_dir() else []
    others = [path.name for path in inside if _is_no_class(path)]
    if others:
        shown = named([ascii(name) for name in others])
        logger.info("%s: left out, as they are no folder of a class: %s", root, shown)
    classes = [path.name for path in inside if path.name not in others]
    unknown = [name for name in classes if name not in label_names]
    if not classes or unknown:
        what = f"has a sub-folder {unknown[0]}" if unknown else "has no sub-folder"
        raise TinyTLError(f"images={root}: {what}; use one for each class ({', '.join(label_names[:5])}, ...)")
    photos, labels = [], []
    for name in classes:
        found = images_in(root / name)
        if not found:
            raise TinyTLError(f"images={root}: there is no photo in its sub-folder {name}; add some, or remove it")
        for path in found:
            try:
                photos.append(decode_pixels({"bytes": None, "path": path}, size))
            except UnreadableImageError as error:
                raise TinyTLError(f"{path} cannot be read ({error}); mend or remove it") from error
        labels += [label_names.index(name)] * len(found)
    return photos, labels


def _is_no_class(path: Path) -> bool:
    """Whether something beside the classes is a file, or a folder of a system or tool."""
    return not path.is_dir() or path.name.startswith(".") or is_of_system(path.name)


def _output_folder(name: str, overwrite: bool) -> Path:
    """The folder to write an adapter to, once it is known that this can be done.

    Raises:
        TinyTLError: It holds an adapter that is not to be replaced, or cannot be written.
    """
    folder = folder_named("output", name)
    if os.path.lexists(folder / CONFIG_FILE) and not overwrite:
        raise TinyTLError(f"output={folder}: holds an adapter; name another folder, or replace it with --overwrite")
    with writing(f"output={folder}", "name another folder"):
        check_writable(folder / CONFIG_FILE)
    return folder


def main(arguments: Sequence[str] | None = None) -> None:
    """Train on a folder of photos from the command line."""
    parser = argparse.ArgumentParser(description="Train an adapter with an exported training step.")
    parser.add_argument("--step", required=True, help="The .pte file of the step.")
    parser.add_argument("--images", required=True, help="Folder with a sub-folder of photos for each class.")
    parser.add_argument("--output", required=True, help="Folder of the adapter to write.")
    parser.add_argument("--steps", type=int, default=50, help="Steps of SGD.")
    parser.add_argument("--lr", type=float, default=0.01, help="Learning rate.")
    parser.add_argument("--momentum", type=float, default=0.0, help="Momentum.")
    parser.add_argument("--overwrite", action="store_true", help="Replace an adapter that is there.")
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("tinytl_hf").setLevel(logging.INFO)
    try:
        output = _output_folder(options.output, options.overwrite)
        training = DeviceTraining(options.step, options.lr, options.momentum)
        photos, labels = read_folder(options.images, training.label_names, training.size)
        losses = training.train(photos, labels, options.steps)
        training.save_adapter(output)
    except TinyTLError as error:
        sys.exit(f"error: {error}")
    share = max(1, len(losses) // 10)
    first, last = np.mean(losses[:share]), np.mean(losses[-share:])
    done = f"{counted(options.steps, 'step')} on {counted(len(photos), 'photo')}"
    print(f"{options.output}: {done}, loss {first:.3f} to {last:.3f}")


if __name__ == "__main__":
    main()

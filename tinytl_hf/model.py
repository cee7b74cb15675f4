"""``TinyTLModel``: a backbone, a method and the delta that it trains, as one module."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tinytl_hf.adapter import delta
from tinytl_hf.adapter.build import as_it_is, build_network, check_fits, check_weights, new_config, recorded, source_of
from tinytl_hf.adapter.format import folder_named, holds, read_config, read_tensors, write_adapter
from tinytl_hf.adapter.record import AdapterConfig, DataRecord
from tinytl_hf.adapter.switching import Adapters, LoadedAdapter
from tinytl_hf.config.engine import BackendName, Engine
from tinytl_hf.config.export import ExportFormat
from tinytl_hf.config.hub import PushConfig
from tinytl_hf.config.network import HeadConfig, LiteConfig
from tinytl_hf.config.run import Config
from tinytl_hf.data.augment import centre_boxes, resample
from tinytl_hf.data.given_images import GivenImages, check_normalised, pixels_of, true_sizes
from tinytl_hf.data.tensors import channels_last, pad_images
from tinytl_hf.disk import StrPath
from tinytl_hf.hub.card import read_card, render_card
from tinytl_hf.hub.transfer import find_adapter, folder_to_push, push
from tinytl_hf.lean.convert import convert
from tinytl_hf.lean.int8 import quantise
from tinytl_hf.lean.notes import training_paths
from tinytl_hf.lean.prefix import find_prefix
from tinytl_hf.network import methods, norms
from tinytl_hf.network.backbones import locate_weights, sha256
from tinytl_hf.network.head import Head, head_of, without_head


class TinyTLModel(nn.Module):
    """An image classifier whose heavy weights are frozen and whose deltas train.

    Build it with :meth:`from_backbone` or :meth:`from_pretrained`. Parameter names under ``backbone`` are its
    library's, with ``lite_residual`` added to the blocks that have one. The method says what trains, and an adapter is
    that, whatever is frozen later. More adapters can share the frozen weights (:meth:`load_adapter`).

    Args:
        config: What to build. A ``sha256`` in it is checked against the frozen weights.
        engine: How training passes run.

    Attributes:
        stock_layers: Layers that can keep full-size maps while training, by name and type.
        folder: Folder that it was loaded from or, after that, saved to; or None.
        prefix: Where the last blocks alone train: what runs before them.
    """

    def __init__(self, config: AdapterConfig, engine: Engine | None = None) -> None:
        super().__init__()
        self.engine = engine = engine or Engine()
        self.backbone, self._blocks = build_network(config, None, engine.gradient_checkpointing)
        delta.check_values(delta.frozen_tensors(self.backbone))
        found = sha256(delta.frozen_tensors(self.backbone))
        self.config = replace(config, backbone=replace(config.backbone, sha256=found))
        if config.backbone.frozen_weights == "int8":
            quantise(self.backbone)
        delta.remember_complete(self.backbone)
        size, trained = config.preprocessing.train_size, config.trained_blocks
        self.stock_layers = convert(self.backbone, self._blocks, self.engine, size, trained)
        # One layout always, so that a saved and a loaded model run the same kernels on the same numbers.
        self.backbone.to(memory_format=torch.channels_last)
        self.prefix = find_prefix(self.backbone, self._blocks, trained, self.engine.slice_mb)
        self._adapters, self._weights_from, self._unchecked = Adapters(), config.backbone.weights, True
        self.folder: Path | None = None

    @classmethod
    def from_config(cls, config: Config, label_names: Sequence[str]) -> TinyTLModel:
        """Build the model that a run trains: :meth:`from_backbone` with the run's options and these classes."""
        return cls.from_backbone(
            config.backbone.name,
            method=config.method,
            label_names=label_names,
            weights=config.backbone.weights,
            frozen_weights=config.backbone.frozen_weights,
            train_size=config.data.train_size,
            eval_size=config.data.eval_size,
            crop_pct=config.data.crop_pct,
            lite=config.lite,
            head=config.head,
            trained_blocks=config.trained_blocks,
            **asdict(config.engine),
        )

    @classmethod
    def from_backbone(
        cls,
        name: str,
        *,
        method: str = "TinyTL-L+B",
        num_classes: int | None = None,
        label_names: Iterable[object] | None = None,
        weights: StrPath = "imagenet",
        frozen_weights: Literal["fp32", "int8"] = "fp32",
        train_size: int = 224,
        eval_size: int | None = None,
        crop_pct: float | None = None,
        lite: LiteConfig | None = None,
        head: HeadConfig | None = None,
        trained_blocks: int | Literal["all"] | None = None,
        lean: bool = Engine.lean,
        backend: BackendName = Engine.backend,
        slice_mb: float | None = None,
        gradient_checkpointing: bool = Engine.gradient_checkpointing,
    ) -> TinyTLModel:
        """Build a model to train.

        Args:
            name: The backbone, as :class:`~tinytl_hf.config.network.BackboneConfig` takes names.
            method: One of the seven methods, or an alias.
            num_classes: Number of classes, where ``label_names`` does not say it.
            label_names: Names of the classes, strings or numbers; ``"0"``, ``"1"``, ... by default.
            weights: Source of the backbone's weights.
            frozen_weights: How to store frozen convolution weights in memory.
            train_size: Side of the training images in px.
            eval_size: Side of the images at evaluation and in use; None: ``train_size``.
            crop_pct: Side of the evaluation crop as a share of an image's shorter side; None: as the backbone has it.
            lite: Options of the lite residuals.
            head: Options of the head.
            trained_blocks: How many of the last residual blocks train, with what follows them; None or "all": all.
            lean: Keep only what the gradients need while training, or what stock PyTorch keeps.
            backend: Who computes frozen blocks: eager, native (CPU), triton (CUDA), or auto, the fastest there is.
            slice_mb: About how much of a frozen block's widest map exists at a time, in MB; None: what suits it.
            gradient_checkpointing: Compute each block a second time in the backward pass.

        Raises:
            TinyTLError: A name, source or option that does not fit, with the fix.
        """
        labels, sizes = (label_names, num_classes), (train_size, eval_size, crop_pct)
        config = new_config(name, weights, method, labels, sizes, frozen_weights, trained_blocks, lite, head)
        model = cls(config, Engine(lean, backend, slice_mb, gradient_checkpointing))
        methods.name_what_stays(model.backbone, model._blocks, model.config.method)
        return model

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: StrPath,
        *,
        weights: StrPath | None = None,
        lean: bool = Engine.lean,
        backend: BackendName = Engine.backend,
        slice_mb: float | None = None,
        gradient_checkpointing: bool = Engine.gradient_checkpointing,
        revision: str | None = None,
        token: str | None = None,
        **download: Any,
    ) -> TinyTLModel:
        """Load an adapter, and the backbone it names, in evaluation mode: call ``train()`` before training it.

        Args:
            pretrained_model_name_or_path: A folder, or a name on the Hub such as ``user/name``.
            weights: Where to take the backbone from instead; it must hold the same frozen tensors.
            lean: As for :meth:`from_backbone`.
            backend: As there.
            slice_mb: As there.
            gradient_checkpointing: As there.
            revision: On the Hub: a branch, a tag or a commit.
            token: On the Hub: the token; None: that of ``hf auth login`` or HF_TOKEN.
            **download: On the Hub: ``cache_dir`` and the like, as ``huggingface_hub.snapshot_download`` takes them.

        Raises:
            TinyTLError: No adapter there, a damaged one, or another backbone than it was trained on.
        """
        folder = find_adapter(pretrained_model_name_or_path, revision, token, **download)
        saved = read_config(folder)
        source = source_of(weights, own=saved.backbone.weights)
        engine = Engine(lean, backend, slice_mb, gradient_checkpointing)
        model = cls._with_tensors(folder, saved, source, engine, token=token, **download)
        check_weights(saved, model.config.backbone.sha256, source, str(folder))
        return model.eval()

    @classmethod
    def _with_tensors(cls, folder: Path, saved: AdapterConfig, source: str, engine: Engine, **net: Any) -> TinyTLModel:
        """The adapter in ``folder`` over the weights from ``source``, whose hash is still to be compared."""
        check_fits(saved, tensors := read_tensors(folder), str(folder))
        # A method that trains everything needs nothing of the backbone but its shape.
        needed = saved.backbone.sha256 is not None
        source, weights = locate_weights(saved.backbone.name, source, **net) if needed else (source, "none")
        model = cls(replace(saved, backbone=replace(saved.backbone, weights=weights)), engine)
        delta.load_tensors(model.backbone, tensors, source=str(folder))
        model._weights_from, model.folder = source, folder.absolute()  # found from another folder, too
        model.config = replace(model.config, backbone=replace(model.config.backbone, weights=recorded(saved, source)))
        return model

    def save_pretrained(
        self,
        save_directory: StrPath,
        *,
        dtype: Literal["fp32", "fp16"] | None = None,
        data: DataRecord | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Write the adapter folder: config, tensors and card. The Hub is never asked.

        Args:
            save_directory: The folder; files of other names in it stay.
            dtype: ``fp32`` or ``fp16``; by default that of the adapter that was loaded, or fp32.
            data: The data it was trained on.
            metrics: Figures on the evaluation set for the card, as ``{"accuracy": 0.9}``.

        Raises:
            TinyTLError: The folder cannot be written, or a value is not finite or would not be read again.
        """
        folder = folder_named("save_directory", save_directory)
        config = as_it_is(self.config, self.backbone)
        config = replace(config, dtype=dtype or config.dtype, data=data or config.data)
        write_adapter(folder, config, self.adapter_tensors(), render_card(config, metrics, read_card(folder)))
        self.folder = folder.absolute()

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = False,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str | None = None,
        token: str | None = None,
    ) -> str:
        """Push the adapter in one commit, without the backbone; returns its address, or that of the pull request.

        If it has not changed since it was loaded or saved, that folder is pushed, with its card and figures.

        Args:
            repo_id: Name on the Hub, as ``user/name``; the repository is made if there is none.
            private: Make it a private one.
            revision: Branch to push to, made if there is none; None: main.
            create_pr: Open a pull request.
            commit_message: None: what the adapter is.
            token: The Hub token; None: that of ``hf auth login`` or HF_TOKEN.

        Raises:
            TinyTLError: The push failed; with the reason and the command to retry. The adapter has been saved before.
        """
        before = folder = self.folder
        with ExitStack() as held:
            if folder is None or not holds(folder, as_it_is(self.config, self.backbone), self.adapter_tensors()):
                self.save_pretrained(folder := held.enter_context(folder_to_push()))
            url = push(PushConfig(str(folder), repo_id, private, revision, create_pr, commit_message), token)
        self.folder = before
        return url

    def export(self, output: StrPath, *, format: ExportFormat, **options: Any) -> str:
        """Write it for another runtime; the options are those of :func:`tinytl_hf.deploy.export.export_as`."""
        return import_module("tinytl_hf.deploy.export").export_as(self, output, format, **options)  # a room above

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images ``[N, 3, H, W]``, or :meth:`features` or ``prefix.maps`` of them, to logits."""
        check_normalised(images, self.backbone)
        if images.ndim == 2:
            return self._head(images)
        if self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            norms.check_even(self.backbone, images)
            delta.check_trains(self.backbone, self.config.method, whole=self._unchecked)
            self._unchecked = False
        images = channels_last(images)
        lean = self.training and self.engine.lean
        return self.backbone(images) if self.prefix is None else self.prefix.run(self.backbone, images, lean=lean)

    def train(self, mode: bool = True) -> TinyTLModel:
        """As of any module; the next training pass looks again at what trains."""
        self._unchecked = True
        return super().train(mode)

    def features(self, images: Tensor) -> Tensor:
        """What the head gets of normalised images: ``[N, features]``, without gradients; in any thread."""
        check_normalised(images, self.backbone)
        with torch.no_grad():
            return without_head(self.backbone)(channels_last(images)).flatten(1)

    @property
    def label_names(self) -> list[str]:
        """Names of the classes, in the order of the logits."""
        return self.config.label_names

    @property
    def training_paths(self) -> dict[str, str]:
        """How each part of the backbone trains, by name: see :mod:`tinytl_hf.lean.notes`."""
        return training_paths(self.backbone)

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that train, in the backbone's order: what an optimizer should get."""
        return (parameter for parameter in self.backbone.parameters() if parameter.requires_grad)

    def print_trainable_parameters(self) -> None:
        """Print how many parameters train, of all that the network has, in the words of PEFT's models."""
        print(methods.trained_share(self.backbone))  # noqa: T201

    def parameter_groups(self, lr: float, weight_decay: float, **options: Any) -> list[dict[str, Any]]:
        """Optimizer groups with the method's learning rates; ``options`` as of :func:`methods.parameter_groups`."""
        return methods.parameter_groups(self.backbone, self._blocks, self.config.method, lr, weight_decay, **options)

    @property
    def active_adapter(self) -> str:
        """Name of the adapter in use; ``default`` is the one that the model was made with."""
        return self._adapters.active

    @property
    def adapter_names(self) -> list[str]:
        """Names of all loaded adapters, the active one first."""
        return self._adapters.names

    def load_adapter(
        self, path: StrPath, name: str, *, weights: StrPath | None = None, revision: str | None = None, **download: Any
    ) -> None:
        """Load another adapter, of any method, labels and image size, beside the active one, over the same weights.

        Args:
            path: Its folder, or its name on the Hub.
            name: What to call it here.
            weights: Where to read what the active adapter trains of the backbone; None: where the model's came from.
            revision: On the Hub: a branch, a tag or a commit.
            **download: On the Hub: ``token``, ``cache_dir`` and the like, as of :meth:`from_pretrained`.

        Raises:
            TinyTLError: No adapter there, a damaged one, one of another backbone, or a name that is taken.
        """
        saved = read_config(folder := find_adapter(path, revision, **download))
        self._adapters.check_new(name, saved, self.config, folder)
        source = source_of(weights, own=self._adapters.source(self._loaded(), own=saved.backbone.weights))
        new = self._with_tensors(folder, saved, source, self.engine, **download)
        self._adapters.add(name, new._loaded(), self._loaded(), folder, saved.backbone.sha256)

    def set_adapter(self, name: str) -> None:
        """Use the adapter called ``name`` from now on, in all threads; it takes the model's mode, train or eval.

        An optimizer keeps the parameters that it was given: make one for the adapter that is to train.

        Raises:
            TinyTLError: No such adapter.
        """
        adapter = self._adapters.switch(name, self._loaded())
        self.backbone, self._blocks, self.prefix, self.stock_layers = adapter[:4]
        self.config, self._weights_from, self.folder = adapter[4:]
        self._unchecked = True

    @contextmanager
    def using(self, name: str) -> Iterator[TinyTLModel]:
        """Use another adapter in a ``with`` block, in all threads, and after it the one before again."""
        before = self.active_adapter
        self.set_adapter(name)
        try:
            yield self
        finally:
            self.set_adapter(before)

    def unload_adapter(self, name: str) -> None:
        """Free what an adapter has of its own.

        Raises:
            TinyTLError: No such adapter, or it is the active one.
        """
        self._adapters.remove(name)

    def adapter_tensors(self) -> dict[str, Tensor]:
        """The delta by the backbone's own names: trained parameters and buffers that can change."""
        return delta.adapter_tensors(self.backbone)

    def load_adapter_tensors(self, tensors: Mapping[str, Tensor], source: str) -> None:
        """Copy a delta in, strictly; ``source`` names it in errors."""
        delta.load_tensors(self.backbone, tensors, source)

    def preprocess(self, images: GivenImages) -> Tensor:
        """What :mod:`tinytl_hf.data.given_images` takes, to normalised ``[N, 3, eval_size, eval_size]``."""
        return self.normalise(*pad_images(pixels_of(images, self.config.preprocessing.eval_size)))

    def normalise(self, pixels: Tensor, sizes: Tensor) -> Tensor:
        """The evaluation view of decoded images, ``[N, 3, eval_size, eval_size]``, on the model's device in its type.

        Args:
            pixels: ``uint8`` ``[N, 3, H, W]``, padded at the bottom right.
            sizes: ``[N, 2]`` true height and width in px.
        """
        options, head = self.config.preprocessing, self._head.weight
        boxes = centre_boxes(true_sizes(pixels, sizes), options.crop_pct)
        device = "cpu" if head.is_meta else head.device  # of weights that are offloaded
        return resample(pixels.to(device), sizes, boxes, options.eval_size, *options.normal).to(head.dtype)

    @property
    def _head(self) -> Head:
        return head_of(self.backbone)[1]

    def _loaded(self) -> LoadedAdapter:
        network = self.backbone, self._blocks, self.prefix, self.stock_layers
        return LoadedAdapter(*network, self.config, self._weights_from, self.folder)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TinyTLModel:
        """Move or cast all adapters, where PyTorch would only reach the active one."""
        super()._apply(fn, recurse)
        self._adapters.apply(fn, self._loaded())
        return self

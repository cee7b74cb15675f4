"""What one training step is made of, for the run that takes it and for the figures that are measured of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Muon, Optimizer

from tinytl_hf.config.train import TrainConfig
from tinytl_hf.data.augment import RandomCropFlip, normalise, random_crops
from tinytl_hf.data.changes import Changes
from tinytl_hf.model import TinyTLModel

AS_THEY_ARE = (0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255)  # mean and std that leave pixels from 0 to 255
MUON_MOMENTUM = 0.95
MUON_RATE = 10.0  # of AdamW's: each of Muon's steps has a norm of its own, whatever the gradient's


def make_optimizer(model: TinyTLModel, options: TrainConfig) -> Optimizer:
    """An optimizer over the parameters that train, and no others."""
    optimizer = _optimizer(model, options)
    # A fused one leaves steps that fp16 cannot represent out by itself, and tells nobody: the schedule would go on,
    # and the run would count none. So a gradient scaler is to decide, before it calls the step.
    optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
    return optimizer


def _optimizer(model: TinyTLModel, options: TrainConfig) -> Optimizer:
    lr = options.plan.lr
    decay_all, factors = options.decay_norms_and_biases, options.lr_factors
    groups = model.parameter_groups(lr, options.weight_decay, decay_all=decay_all, factors=factors)
    # One kernel for all of the many small tensors, where there is one.
    fused = next(model.trainable_parameters()).device.type in {"cpu", "cuda"}
    if options.optimizer == "sgd":
        return SGD(groups, lr=lr, momentum=options.momentum, fused=fused)
    kinds = {"adamw": AdamW, "adam": Adam, "muon": MuonAdamW}
    return kinds[options.optimizer](groups, lr=lr, fused=fused)


def training_view(
    model: TinyTLModel,
    batch: Mapping[str, Tensor],
    augment: RandomCropFlip,
    size: int,
    changes: Changes,
    dtype: torch.dtype,
) -> Tensor:
    """A batch of decoded photos, cropped, flipped, resized, normalised, and changed where the run does that.

    Args:
        model: For mean, standard deviation and interpolation of its preprocessing.
        batch: ``pixels``, ``sizes`` and ``index``, as :mod:`tinytl_hf.data.batches` describes them.
        augment: What draws the crops.
        size: Side of the result in px.
        changes: What else happens to the images.
        dtype: Of the result.

    Returns:
        ``[N, 3, size, size]``, channels last.
    """
    boxes, flips = augment(batch["sizes"], batch["index"])
    options = model.config.preprocessing
    crops = batch["pixels"], batch["sizes"], boxes, flips, size
    if changes.acts and changes.operates:
        pixels = random_crops(*crops, *AS_THEY_ARE, options.interpolation)
        images = normalise(changes.operate(pixels, batch["index"]).float(), options.mean, options.std)
    else:
        images = random_crops(*crops, *options.normal)
    if changes.acts and changes.mixes:
        images = changes.mix(images, batch["index"])
    return images.to(dtype)


@contextmanager
def left_as_found(model: TinyTLModel) -> Iterator[None]:
    """Start in training mode without gradients; leave the model and the random generator as they were."""
    delta = {name: tensor.clone() for name, tensor in model.adapter_tensors().items()}
    gradients = {parameter: parameter.grad for parameter in model.parameters()}
    modes = {module: module.training for module in model.modules()}
    model.train().zero_grad()
    try:
        with torch.random.fork_rng({p.device for p in gradients if p.is_cuda}):
            yield
    finally:
        for name, tensor in model.adapter_tensors().items():
            tensor.copy_(delta[name])
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        for module, mode in modes.items():
            module.training = mode


class Loss:
    """Cross entropy as a run's options have it.

    Args:
        options: Label smoothing, and whether classes are weighted.
        labels: Class numbers of the training images ``[N]``: the more of a class there are, the less each weighs.
        classes: Number of classes.
    """

    def __init__(self, options: TrainConfig, labels: Tensor, classes: int) -> None:
        self.label_smoothing, self.weights = options.smoothing, None
        if options.class_weights == "balanced":
            counts = labels.bincount(minlength=classes)
            self.weights = len(labels) / ((counts > 0).sum() * counts.clamp(min=1))

    def __call__(self, logits: Tensor, batch: Mapping[str, Tensor], size: int, changes: Changes) -> Tensor:
        """The mean over a batch, so that the batches of several processes add up to that of one.

        Args:
            logits: ``[N, classes]``.
            batch: Its ``labels``, and ``index``.
            size: Side of the images in px.
            changes: What was done to them; of a blend, both labels count by their shares.
        """
        labels, mixes = batch["labels"], changes.acts and changes.mixes
        if self.weights is None and not mixes:
            return F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        losses = self._each(logits, labels)
        if mixes:
            shares = changes.shares(batch["index"], size)
            others = labels[changes.partners(len(labels), labels.device)]
            losses = shares * losses + (1 - shares) * self._each(logits, others)
        return losses.mean()

    def _each(self, logits: Tensor, labels: Tensor) -> Tensor:
        losses = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing, reduction="none")
        if self.weights is None:
            return losses
        self.weights = self.weights.to(labels.device)  # once: a step would wait for a GPU to take them
        return losses * self.weights[labels]


def right_answers(logits: Tensor, batch: Mapping[str, Tensor], size: int, changes: Changes) -> Tensor:
    """How right the answer of each image is ``[N]``: 1 or 0 or, of a blend, the share of it that has that label.

    Arguments are those of :meth:`Loss.__call__`.
    """
    labels, answers = batch["labels"], logits.argmax(1)
    right = (answers == labels).float()
    if not (changes.acts and changes.mixes):
        return right
    others = (answers == labels[changes.partners(len(labels), labels.device)]).float()
    return torch.lerp(others, right, changes.shares(batch["index"], size))


class MuonAdamW(AdamW):
    """AdamW that leaves the groups with ``matrices`` to PyTorch's Muon, which takes matrices only.

    A weight is as many matrices as its convolution has groups, each of a row for each channel that it makes. One
    optimizer for all of them goes through Accelerate, schedules, gradient scalers and checkpoints as any other does.
    """

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take a step of both."""
        every = self.param_groups
        try:
            self.param_groups = [group for group in every if not group["matrices"]]
            loss = super().step(closure)
        finally:
            self.param_groups = every
        for group in every:
            if group["matrices"]:
                self._muon_step(group)
        return loss

    @torch.no_grad()
    def _muon_step(self, group: dict[str, Any]) -> None:
        """Give Muon the matrices of this step: weights can have moved to another device since the last."""
        momenta: dict[nn.Parameter, Tensor] = {}
        for weight in group["params"]:
            if weight.grad is None:
                continue
            gradients = matrices_of(weight.grad, group["matrices"])
            state = self.state[weight]
            if not state:  # with the count of steps that AdamW looks for in what it loads
                state["step"], state["momentum"] = torch.tensor(0.0), torch.zeros_like(gradients)
            state["step"] += 1
            for matrix, gradient, momentum in zip(
                matrices_of(weight, group["matrices"]), gradients, state["momentum"], strict=True
            ):
                parameter = nn.Parameter(matrix)
                parameter.grad = gradient
                momenta[parameter] = momentum
        if momenta:
            lr, decay = group["lr"] * MUON_RATE, group["weight_decay"]
            muon = Muon(momenta, lr=lr, weight_decay=decay, momentum=MUON_MOMENTUM)
            muon.state.update({parameter: {"momentum_buffer": momentum} for parameter, momentum in momenta.items()})
            muon.step()


def matrices_of(weight: Tensor, groups: int) -> Tensor:
    """The weight of a convolution ``[out, in / groups, k, k]`` as ``[groups, out / groups, k * k * in / groups]``.

    Of a weight that lies as convolutions want it (channels last), it is a view.
    """
    channels_last = weight.detach().contiguous(memory_format=torch.channels_last)
    return channels_last.permute(0, 2, 3, 1).reshape(groups, weight.shape[0] // groups, -1)

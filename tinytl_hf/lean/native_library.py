"""The compiled kernels: found, loaded by ctypes, and what is passed to them (``native/native.h``)."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterable
from ctypes import c_double, c_float, c_int64, c_void_p
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

MODULE = "tinytl_hf.lean._native"
DTYPES = (torch.float32, torch.bfloat16)  # of maps
LARGEST_KERNEL = 11  # whose taps fit into native/tiles.h
HOW_TO_BUILD = "needs a C compiler when tinytl_hf is installed: install one (gcc or clang) and then tinytl_hf again"


class Maps(ctypes.Structure):
    """A channels-last tensor of fp32 or bf16."""

    _fields_ = (("data", c_void_p), ("is_bf16", c_int64))

    @classmethod
    def of(cls, maps: Tensor | None) -> Maps:
        """``maps``, which the caller keeps alive."""
        if maps is None:
            return cls(None, 0)
        return cls(maps.data_ptr(), maps.dtype == torch.bfloat16)


class StageArguments(ctypes.Structure):
    """``Stage`` of native.h."""

    _fields_ = (
        *((name, c_int64) for name in ("in_channels", "out_channels", "kernel", "stride", "padding", "depthwise")),
        ("weight_strides", c_int64 * 4),
        *((name, c_void_p) for name in ("weight", "int8_weight", "int8_scale", "gamma", "mean", "var", "bias")),
        ("eps", c_double),
        ("activation", c_int64),
        ("upper", c_float),
        *((name, c_void_p) for name in ("mask", "before", "grad_bias")),
    )


class ChainArguments(ctypes.Structure):
    """``Chain`` of native.h."""

    _fields_ = (
        *((name, c_int64) for name in ("images", "height", "width", "stages")),
        ("stage", ctypes.POINTER(StageArguments)),
        *((name, c_int64) for name in ("branch", "residual")),
        *((name, Maps) for name in ("input", "output", "pooled", "grad_output", "grad_pooled", "grad_input")),
        ("first", c_int64),
        ("scratch", c_void_p),
        *((name, c_int64) for name in ("threads", "cache")),
    )


class NormArguments(ctypes.Structure):
    """``Norm`` of native.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("gamma", "beta", "running_mean", "running_var")),
        *((name, c_double) for name in ("rate", "eps")),
        *((name, c_void_p) for name in ("mean", "inverse", "grad_gamma", "grad_beta")),
    )


Reduce = ctypes.CFUNCTYPE(None, ctypes.POINTER(c_double), c_int64)


class BranchArguments(ctypes.Structure):
    """``Branch`` of native.h."""

    _fields_ = (
        *((name, c_int64) for name in ("images", "height", "width", "in_channels", "middle", "out_channels")),
        *((name, c_int64) for name in ("kernel", "stride", "padding", "groups")),
        *((name, Maps) for name in ("input", "output", "grad_output", "grad_input")),
        *((name, c_void_p) for name in ("weight1", "weight2")),
        ("weight1_strides", c_int64 * 3),
        *((name, c_void_p) for name in ("grad_weight1", "grad_weight2")),
        *((name, NormArguments) for name in ("norm1", "norm2")),
        ("values", c_double),
        ("reduce", Reduce),
        ("scratch", c_void_p),
        ("threads", c_int64),
    )


class UpsamplingArguments(ctypes.Structure):
    """``Upsampling`` of native.h."""

    _fields_ = (
        *((name, c_int64) for name in ("images", "height", "width", "small_height", "small_width", "channels")),
        ("maps", Maps),
        ("small", Maps),
        ("scratch", c_void_p),
        ("threads", c_int64),
    )


def _kernel(arguments: type[ctypes.Structure], result: type | None = None) -> type:
    return ctypes.CFUNCTYPE(result, ctypes.POINTER(arguments))


class Kernels(ctypes.Structure):
    """``Kernels`` of native.h: those of one instruction set."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("chain_scratch", _kernel(ChainArguments, c_int64)),
        *((name, _kernel(ChainArguments)) for name in ("chain_forward", "chain_backward")),
        ("branch_scratch", _kernel(BranchArguments, c_int64)),
        *((name, _kernel(BranchArguments)) for name in ("branch_forward", "branch_backward")),
        ("upsampling_scratch", _kernel(UpsamplingArguments, c_int64)),
        *((name, _kernel(UpsamplingArguments)) for name in ("upsample_add", "upsample_backward")),
    )


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled library, or None where the package was installed without a compiler."""
    spec = find_spec(MODULE)
    if spec is None or spec.origin is None:
        return None
    found = ctypes.CDLL(spec.origin)  # after torch, whose OpenMP it shares
    found.tinytl_kernels.restype = ctypes.POINTER(Kernels)
    found.tinytl_kernels.argtypes = [ctypes.c_int]
    return found


def instruction_sets() -> dict[str, Kernels]:
    """The kernels that this processor can run, by the name of their instruction set, the best first."""
    found: dict[str, Kernels] = {}
    if (compiled := library()) is not None:
        while pointer := compiled.tinytl_kernels(len(found)):
            found[pointer.contents.name.decode()] = pointer.contents
    return found


@functools.cache
def kernels() -> Kernels | None:
    """Those of the best instruction set of this processor."""
    return next(iter(instruction_sets().values()), None)


class Call:
    """The arguments of a kernel, and the tensors that they point to, which must outlive it."""

    def __init__(self, arguments: ctypes.Structure, alive: Iterable[Tensor | None]) -> None:
        self.arguments: Any = arguments
        self.alive = list(alive)

    def set(self, **maps: Tensor | None) -> None:
        """Pass channels-last maps."""
        for name, tensor in maps.items():
            setattr(self.arguments, name, Maps.of(tensor))
            self.alive.append(tensor)

    def run(self, kernel: str, scratch_of: str) -> None:
        """Call a kernel with as much scratch memory as another function says that it needs."""
        found = kernels()
        assert found is not None
        scratch = torch.empty(getattr(found, scratch_of)(self.arguments), dtype=torch.float32)
        self.arguments.scratch = scratch.data_ptr()
        getattr(found, kernel)(self.arguments)


def unfit_tensors(dtype: torch.dtype, parameters: Iterable[Tensor | None]) -> str | None:
    """Why maps of ``dtype`` or these parameters are not as the kernels can read them; None if they are."""
    if dtype not in DTYPES:
        return f"{str(dtype).removeprefix('torch.')} maps (only fp32 and bf16)"
    for tensor in parameters:
        if tensor is not None and tensor.dtype not in (torch.float32, torch.int8):
            return "parameters that are not fp32"
        if tensor is not None and tensor.dim() == 1 and not tensor.is_contiguous():  # weights come with their strides
            return "norms and biases whose values do not lie one after the other"
    return None


def channels_last(maps: Tensor) -> Tensor:
    """``maps`` as the kernels take them: channels-last in memory, and of a type that they read."""
    maps = maps.detach() if maps.dtype in DTYPES else maps.detach().float()
    maps = maps.contiguous(memory_format=torch.channels_last)
    _, c, h, w = maps.shape
    strides = (c * h * w, 1, c * w, c)
    if maps.stride() == strides:
        return maps
    # With one channel or pixel, other strides pass for channels-last too; in memory they are the same.
    return maps.as_strided(maps.shape, strides)

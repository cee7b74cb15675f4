"""Chains, lite branches and up-samplings as PyTorch operators, which ``torch.compile`` takes whole.

A compiled graph holds tensors, numbers and names only, so an operator gets a chain or branch by its handle: a name, as
numbers that differ from call to call would become symbols. Outside of a compiled graph, the autograd functions beside
the classes do the same with less overhead a call.
"""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.library import custom_op

from tinytl_hf.config.engine import BackendName
from tinytl_hf.errors import TinyTLError
from tinytl_hf.lean import backend
from tinytl_hf.lean.slices import empty_maps
from tinytl_hf.network.norms import keep_running_statistics

if TYPE_CHECKING:
    from tinytl_hf.lean.chain import Chain
    from tinytl_hf.lean.lite_branch import Branch

_held: WeakValueDictionary[str, Any] = WeakValueDictionary()
_counter = itertools.count()
_process = secrets.token_hex(8)


def new_handle(holder: Chain | Branch) -> str:
    """A name by which the operators find ``holder`` as long as it lives.

    No other process has it: PyTorch stores compiled graphs on disk, and takes those of another process for its own if
    they have the same names and shapes in them, whatever these names stand for there.
    """
    handle = f"{_process}-{next(_counter)}"
    _held[handle] = holder
    return handle


def versions_of(tensors: Iterable[Tensor]) -> list[int]:
    """How often each parameter was written over, as autograd counts it."""
    return [t._version for t in tensors if type(t) is nn.Parameter and not t.is_inference()]


def check_own(given: Sequence[Tensor], own: Sequence[Tensor], versions: Sequence[int] | None = None) -> None:
    """Raise if a pass was given other parameters than those that the back-end will read.

    Args:
        given: Those of the forward pass.
        own: Those that will be read.
        versions: What :func:`versions_of` gave of ``given`` in the forward pass; None: no time has passed.

    Raises:
        TinyTLError: It was, or they have changed since; what it computed would be wrong.
    """
    if versions is not None and versions != versions_of(given):
        raise TinyTLError(
            "parameters were changed in place between the forward and the backward pass, which reads them: call "
            "backward() before optimizer.step()"
        )
    pairs = [pair for pair in zip(given, own, strict=True) if pair[0].data_ptr() != pair[1].data_ptr()]
    if not all(torch.equal(one, other) for one, other in pairs):
        raise TinyTLError(
            "a lean model computes its gradients with its own parameters, and was given others (by torch.func or, in "
            "a compiled graph, by an optimizer's step): compile the model alone, or build it with lean=False"
        )


def _apart(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The tensors, each in memory of its own: back-ends give parts of one, which an operator may not return."""
    return [each if each.nbytes == each.untyped_storage().nbytes() else each.clone() for each in tensors]


def run_chain(chain: Chain, x: Tensor, dtype: torch.dtype, pools: bool) -> tuple[Tensor, Tensor | None]:
    """A chain's output and, if ``pools``, the pooled input of its block."""
    biases = [stage.bias for stage in chain.stages if stage.bias is not None]
    keeps = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *biases))
    outputs = chain_forward(x, biases, chain.handle, dtype, keeps, pools)
    return outputs[0], outputs[1] if pools else None


def run_branch(branch: Branch, pooled: Tensor, dtype: torch.dtype) -> Tensor:
    """A lite branch's output; the running statistics of its norms take in those of the batch."""
    output, *statistics = branch_forward(pooled, list(branch.parameters), branch.handle, dtype)
    values = branch.norm1.values_of_a_channel(output.shape)
    for norm, mean, inverse in zip((branch.norm1, branch.norm2), statistics[::2], statistics[1::2], strict=True):
        norm.take_in(mean, inverse**-2 - norm.eps, values)
    return output


@torch.compiler.assume_constant_result
def branch_backend(handle: str, device: str, dtype: torch.dtype) -> BackendName:
    """Who runs a lite branch; asked once, while a graph is compiled."""
    return backend.of_branch(_held[handle], torch.device(device), dtype)


@custom_op("tinytl::chain_forward", mutates_args=())
def chain_forward(
    x: Tensor, biases: list[Tensor], handle: str, dtype: torch.dtype, keeps: bool, pools: bool
) -> list[Tensor]:
    """A chain's output; if ``pools`` the pooled input of its block; if ``keeps`` the masks that there are."""
    chain: Chain = _held[handle]
    check_own(biases, [stage.bias for stage in chain.stages if stage.bias is not None])
    chosen = backend.named(backend.of_chain(chain, x.device, dtype, x.shape))
    output, pooled, kept = chosen.chain_forward(chain, x, dtype, keeps, pools)
    return _apart(tensor for tensor in (output, pooled, *kept) if tensor is not None)


@chain_forward.register_fake
def _(x: Tensor, biases: list[Tensor], handle: str, dtype: torch.dtype, keeps: bool, pools: bool) -> list[Tensor]:
    chain: Chain = _held[handle]
    sizes = chain.map_sizes(x.shape)
    channels, height, width = sizes[chain.branch]
    pooled = [empty_maps(x, dtype, (x.shape[0], channels, height // 2, width // 2))] if pools else []
    masks = [mask for mask in chain.empty_kept(x, dtype, keeps) if mask is not None]
    return [empty_maps(x, dtype, (x.shape[0], *sizes[-1])), *pooled, *masks]


@custom_op("tinytl::chain_backward", mutates_args=())
def chain_backward(
    grad: Tensor,
    grad_pooled: Tensor | None,
    masks: list[Tensor],
    shape: list[int],
    handle: str,
    dtype: torch.dtype,
    needs_input: bool,
    needs_bias: list[bool],
) -> list[Tensor]:
    """The gradient of a chain's input, if needed, and those of the biases (of all stages) that need one."""
    chain: Chain = _held[handle]
    chosen = backend.named(backend.of_chain(chain, grad.device, dtype, torch.Size(shape)))
    given = iter(masks)
    kept = [next(given) if stage.activation else None for stage in chain.stages]
    grad_input, of_biases = chosen.chain_backward(
        chain, kept, torch.Size(shape), dtype, grad, grad_pooled, needs_input, needs_bias
    )
    found = [
        total.to(stage.bias.dtype)
        for total, stage in zip(of_biases, chain.stages, strict=True)
        if total is not None and stage.bias is not None
    ]
    return _apart(found if grad_input is None else [grad_input, *found])


@chain_backward.register_fake
def _(
    grad: Tensor,
    grad_pooled: Tensor | None,
    masks: list[Tensor],
    shape: list[int],
    handle: str,
    dtype: torch.dtype,
    needs_input: bool,
    needs_bias: list[bool],
) -> list[Tensor]:
    chain: Chain = _held[handle]
    found = [
        grad.new_empty(stage.bias.shape, dtype=stage.bias.dtype)
        for stage, needed in zip(chain.stages, needs_bias, strict=True)
        if needed and stage.bias is not None
    ]
    return [empty_maps(grad, dtype, shape), *found] if needs_input else found


def _keep_of_chain(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, biases, ctx.handle, ctx.dtype, _, ctx.pools = inputs
    ctx.shape, ctx.input_dtype, ctx.biases = x.shape, x.dtype, len(biases)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1 + ctx.pools :])


def _backward_of_chain(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    chain: Chain = _held[ctx.handle]
    needs_input, needed = ctx.needs_input_grad[0], iter(ctx.needs_input_grad[1])
    needs_bias = [stage.bias is not None and next(needed) for stage in chain.stages]
    grad, grad_pooled = grads[0], grads[1] if ctx.pools else None
    if grad is None:
        assert grad_pooled is not None
        grad = empty_maps(grad_pooled, ctx.dtype, (ctx.shape[0], *chain.map_sizes(ctx.shape)[-1])).zero_()
    found = iter(
        chain_backward(
            grad, grad_pooled, list(ctx.saved_tensors), list(ctx.shape), ctx.handle, ctx.dtype, needs_input, needs_bias
        )
    )
    grad_input = next(found).to(ctx.input_dtype) if needs_input else None
    of_biases = [next(found) if wanted else None for wanted in ctx.needs_input_grad[1]]
    return grad_input, of_biases, None, None, None, None


chain_forward.register_autograd(_backward_of_chain, setup_context=_keep_of_chain)


@custom_op("tinytl::branch_forward", mutates_args=())
def branch_forward(pooled: Tensor, parameters: list[Tensor], handle: str, dtype: torch.dtype) -> list[Tensor]:
    """A lite branch's output, then mean and inverse standard deviation of its first norm, and of its second.

    Running statistics stay as they are: an operator with a gradient changes no tensor.
    """
    branch: Branch = _held[handle]
    check_own(parameters, branch.parameters)
    chosen = backend.named(backend.of_branch(branch, pooled.device, dtype))
    with keep_running_statistics():
        output, statistics = chosen.branch_forward(branch, pooled, dtype)
    return _apart([output, *statistics])


@branch_forward.register_fake
def _(pooled: Tensor, parameters: list[Tensor], handle: str, dtype: torch.dtype) -> list[Tensor]:
    branch: Branch = _held[handle]
    name = backend.of_branch(branch, pooled.device, dtype)
    of_vectors = parameters[1].dtype if name == "eager" else torch.promote_types(dtype, torch.float32)
    channels = (branch.conv1.out_channels, branch.conv2.out_channels)
    statistics = [pooled.new_empty(count, dtype=of_vectors) for count in channels for _ in range(2)]
    return [empty_maps(pooled, dtype, (pooled.shape[0], *branch.output_size(pooled.shape))), *statistics]


@custom_op("tinytl::branch_backward", mutates_args=())
def branch_backward(
    grad: Tensor,
    pooled: Tensor,
    parameters: list[Tensor],
    statistics: list[Tensor],
    handle: str,
    dtype: torch.dtype,
    needs_input: bool,
) -> list[Tensor]:
    """The gradient of a lite branch's input, if needed, and those of its parameters."""
    branch: Branch = _held[handle]
    chosen = backend.named(backend.of_branch(branch, pooled.device, dtype))
    grad_pooled, found = chosen.branch_backward(branch, pooled, statistics, dtype, grad, needs_input)
    grads = [each.to(p.dtype).contiguous() for each, p in zip(found, parameters, strict=True)]
    if grad_pooled is None:
        return _apart(grads)
    return _apart([grad_pooled.to(pooled.dtype).contiguous(memory_format=torch.channels_last), *grads])


@branch_backward.register_fake
def _(
    grad: Tensor,
    pooled: Tensor,
    parameters: list[Tensor],
    statistics: list[Tensor],
    handle: str,
    dtype: torch.dtype,
    needs_input: bool,
) -> list[Tensor]:
    grads = [torch.empty_like(each, memory_format=torch.contiguous_format) for each in parameters]
    return [torch.empty_like(pooled, memory_format=torch.channels_last), *grads] if needs_input else grads


def _keep_of_branch(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    pooled, parameters, ctx.handle, ctx.dtype = inputs
    statistics = output[1:]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*statistics)
    ctx.save_for_backward(pooled, *statistics, *parameters)


def _backward_of_branch(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    pooled, *rest = ctx.saved_tensors
    needs_input = ctx.needs_input_grad[0]
    found = branch_backward(grads[0], pooled, rest[4:], rest[:4], ctx.handle, ctx.dtype, needs_input)
    grad_pooled = found.pop(0) if needs_input else None
    return grad_pooled, found, None, None


branch_forward.register_autograd(_backward_of_branch, setup_context=_keep_of_branch)


@custom_op("tinytl::upsample_add", mutates_args=())
def upsample_add(maps: Tensor, small: Tensor, name: str) -> Tensor:
    """The sum of ``maps`` and ``small``, bilinearly resized; an operator with a gradient changes no tensor."""
    output = maps.clone()
    backend.named(backend.of_upsampling(cast(BackendName, name), output, small)).upsample_add(output, small)
    return output


@upsample_add.register_fake
def _(maps: Tensor, small: Tensor, name: str) -> Tensor:
    return torch.empty_like(maps)


@custom_op("tinytl::upsample_backward", mutates_args=())
def upsample_backward(grad: Tensor, shape: list[int], dtype: torch.dtype, name: str) -> Tensor:
    """The gradient of what was resized, by the back-end ``name``."""
    small = backend.named(cast(BackendName, name)).upsample_backward(grad, torch.Size(shape), dtype)
    return small.contiguous(memory_format=torch.channels_last)


@upsample_backward.register_fake
def _(grad: Tensor, shape: list[int], dtype: torch.dtype, name: str) -> Tensor:
    return empty_maps(grad, dtype, shape)


def _keep_of_upsampling(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    maps, small, name = inputs
    ctx.shape, ctx.dtype, ctx.name = small.shape, small.dtype, backend.of_upsampling(name, maps, small)


def _backward_of_upsampling(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    return grad, upsample_backward(grad, list(ctx.shape), ctx.dtype, ctx.name), None


upsample_add.register_autograd(_backward_of_upsampling, setup_context=_keep_of_upsampling)

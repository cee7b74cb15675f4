"""The graph of a training step, as PyTorch exports it, made into what ExecuTorch runs in little memory."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

aten = torch.ops.aten
COMPARISONS = (aten.le.Scalar, aten.ge.Scalar, aten.lt.Scalar, aten.gt.Scalar, aten.bitwise_or.Tensor)


def keep_less(graph: Graph) -> None:
    """Change the graph of both passes, in place, so that fewer and smaller maps live until the backward pass.

    The gradient of a frozen convolution's input needs its weight only: it becomes a transposed convolution, which does
    not name the input as ``convolution_backward`` does. And which side of a threshold a value is on is noted in the
    forward pass, in a byte, so that the value itself is free.

    What ExecuTorch's kernels cannot do is written in other operators: the backward passes of max pooling and padding.
    """
    for node in list(graph.nodes):
        arguments: Any = node.args
        if node.target is aten.convolution_backward.default and not arguments[-1][1]:
            _backward_without_input(graph, node)
        elif node.target is aten.max_pool2d_with_indices_backward.default:
            _scatter(graph, node)
        elif node.target is aten.constant_pad_nd.default and max(arguments[1]) <= 0:
            _crop(graph, node)
        elif node.target is aten.alias.default:  # it would have the next step read the value in the backward pass
            node.replace_all_uses_with(arguments[0], lambda user: user.op != "output")
    position: dict[Node, float] = {node: i for i, node in enumerate(graph.nodes)}
    moved_behind: dict[Node, Node] = {}
    for node in list(graph.nodes):
        if node.target in COMPARISONS:
            last = max(node.all_input_nodes, key=position.__getitem__)
            if last.op != "placeholder":
                before = moved_behind.get(last, last)
                before.append(node)
                moved_behind[last] = node
                position[node] = position[before] + 1e-6
    graph.eliminate_dead_code()
    graph.lint()


def _backward_without_input(graph: Graph, node: Node) -> None:
    """Replace a backward convolution of which only the gradients of input and bias are used."""
    arguments: Any = node.args
    grad, input, weight, _, stride, padding, dilation, transposed, _, groups, _ = arguments
    if transposed:
        return
    sizes = (input.meta["val"].shape[2:], grad.meta["val"].shape[2:], weight.meta["val"].shape[2:])
    left_over = [
        n - ((out - 1) * s - 2 * p + d * (k - 1) + 1)
        for n, out, k, s, p, d in zip(*sizes, stride, padding, dilation, strict=True)
    ]
    for item in list(node.users):
        with graph.inserting_before(item):
            if item.args[1] == 0:
                options = (grad, weight, None, stride, padding, dilation, True, left_over, groups)
                new = graph.call_function(aten.convolution.default, options)
            else:
                new = graph.call_function(aten.sum.dim_IntList, (grad, [0, 2, 3]))
        new.meta = {**item.meta}
        name = item.name
        item.replace_all_uses_with(new)
        graph.erase_node(item)
        new.name = name  # the program's signature names its outputs
    graph.erase_node(node)


def _scatter(graph: Graph, node: Node) -> None:
    """Replace the backward pass of max pooling: ExecuTorch's kernel adds to memory that it has not cleared.

    (Seen in 1.5.1.) It needs the indices of the largest values alone, not the values.
    """
    arguments: Any = node.args
    grad, input, *_, indices = arguments
    n, c, height, width = input.meta["val"].shape
    with graph.inserting_before(node):
        zeros = _call(graph, aten.full.default, [n, c, height * width], 0.0)
        flat = [_call(graph, aten.view.default, part, [n, c, -1]) for part in (indices, grad)]
        added = _call(graph, aten.scatter_add.default, zeros, 2, *flat)
        new = _call(graph, aten.view.default, added, [n, c, height, width])
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def _crop(graph: Graph, node: Node) -> None:
    """Replace padding by less than nothing, the backward pass of padding, which ExecuTorch's kernel refuses."""
    arguments: Any = node.args
    value, padding, *_ = arguments
    with graph.inserting_before(node):
        for i in range(0, len(padding), 2):  # the last dimension comes first
            dimension = value.meta["val"].dim() - 1 - i // 2
            end = value.meta["val"].shape[dimension] + padding[i + 1]
            value = _call(graph, aten.slice.Tensor, value, dimension, -padding[i], end)
    node.replace_all_uses_with(value)
    graph.erase_node(node)


def _call(graph: Graph, target: Any, *args: Any) -> Node:
    """A new node, with the shape and type of what it gives."""
    node = graph.call_function(target, args)
    mode = next(n.meta["val"].fake_mode for n in graph.nodes if n.op == "placeholder")
    with mode:
        node.meta["val"] = target(*(arg.meta["val"] if isinstance(arg, Node) else arg for arg in args))
    return node

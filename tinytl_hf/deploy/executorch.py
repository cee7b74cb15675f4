"""Format ``executorch``: a .pte file for XNNPACK, one image at a time, and a .json file that describes it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from tinytl_hf.config.data import DataConfig
from tinytl_hf.config.export import ExportConfig
from tinytl_hf.deploy.check import compare, evaluation_images
from tinytl_hf.deploy.exported import (
    Deployed,
    check_output,
    described_by,
    description,
    layer_of,
    require,
    write_with_description,
)
from tinytl_hf.errors import TinyTLError, first_line
from tinytl_hf.model import TinyTLModel

EXTRA = "executorch"


def export_executorch(model: TinyTLModel, config: ExportConfig, data: DataConfig) -> str:
    """Write the .pte and the .json file once ExecuTorch's own runtime gives PyTorch's logits.

    Returns:
        What was written, and what was measured.

    Raises:
        TinyTLError: The package is missing, the network has an operator that ExecuTorch lacks, the logits differ, or a
            file cannot be written.
    """
    require("executorch.exir", EXTRA)
    path = check_output(config)
    deployed = Deployed(model, config.input, config.layout)
    images = evaluation_images(model, data, config.check_images)
    exported = torch.export.export(deployed, (deployed.inputs_of(images.first(1)),))
    content = _lowered(exported)
    comparison = compare("ExecuTorch", model, deployed, session(content), images)
    comparison.check()
    about = description(model, config.input, config.layout)
    write_with_description(path, content, about)
    return (
        f"{path}: {len(content) / 1e6:.2f} MB for XNNPACK, {model.config.backbone.name} by {model.config.method}, one "
        f"image at a time; labels and preprocessing are in {described_by(path).name}\n{comparison}"
    )


def session(content: bytes) -> Callable[[np.ndarray], np.ndarray]:
    """A model in ExecuTorch's runtime: one image to its logits."""
    runtime = require("executorch.runtime", EXTRA)
    program = runtime.Runtime.get().load_program(content)
    method = program.load_method("forward")
    return lambda inputs: method.execute([torch.from_numpy(inputs)])[0].numpy()


def _lowered(exported: torch.export.ExportedProgram) -> bytes:
    exir = require("executorch.exir", EXTRA)
    xnnpack = require("executorch.backends.xnnpack.partition.xnnpack_partitioner", EXTRA)
    try:
        edge = exir.to_edge_transform_and_lower(exported, partitioner=[xnnpack.XnnpackPartitioner()])
        return bytes(edge.to_executorch().buffer)
    except Exception as error:  # it raises whatever a pass of it raises
        raise lacking(exported, error) from error


def lacking(exported: torch.export.ExportedProgram, error: Exception) -> TinyTLError:
    """Name the operator that ExecuTorch cannot take, and its layer."""
    named = [
        node
        for node in exported.graph.nodes
        if node.op == "call_function" and str(node.target).removesuffix(".default") in str(error).replace("::", ".")
    ]
    what = (
        f"layer {layer_of(named[0])} has the operator {named[0].target}, which ExecuTorch lacks"
        if named
        else "refused"
    )
    return TinyTLError(f"format=executorch: {what} ({first_line(error)}); use another format or backbone")

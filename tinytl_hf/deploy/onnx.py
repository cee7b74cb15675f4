"""Format ``onnx``: one file with dynamic batch, its labels and preprocessing inside, and on request in 8 bits."""

from __future__ import annotations

import io
import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinytl_hf.config.data import DataConfig
from tinytl_hf.config.export import ExportConfig
from tinytl_hf.deploy.check import Comparison, calibration_images, compare, evaluation_images
from tinytl_hf.deploy.exported import (
    INPUT,
    OUTPUT,
    Deployed,
    check_output,
    description,
    layer_of,
    no_room,
    require,
    write_files,
)
from tinytl_hf.errors import TinyTLError, first_line
from tinytl_hf.model import TinyTLModel

RUNTIME = "onnxruntime"
CALIBRATION_IMAGES = 128
QUANTIZED = ["Conv", "Gemm", "MatMul", "Add"]  # those that compute; others read shapes, which it would break


def export_onnx(model: TinyTLModel, config: ExportConfig, data: DataConfig) -> str:
    """Write the .onnx file once onnxruntime gives PyTorch's logits with it.

    Returns:
        What was written, and what was measured.

    Raises:
        TinyTLError: A package is missing, the network has an operator that ONNX lacks, the logits differ, or the file
            cannot be written.
    """
    for module in ("onnx", "onnxscript", RUNTIME):
        require(module, "onnx")
    path = check_output(config)
    deployed = Deployed(model, config.input, config.layout)
    calibration = calibration_images(model, data, CALIBRATION_IMAGES) if config.quantize else None
    images = evaluation_images(model, data, config.check_images if calibration is None else None)
    about = description(model, config.input, config.layout)
    example = images.first(2)
    two = torch.cat([example, example])[:2]  # of one image, a graph would be for one image alone
    content = _convert(deployed, deployed.inputs_of(two), about)
    plain = compare(RUNTIME, model, deployed, session(content), images)
    plain.check()
    facts = str(plain)
    if calibration is not None:
        content = _quantised(content, deployed.inputs_of(calibration))
        small = compare(f"{RUNTIME} int8", model, deployed, session(content), images)
        facts = f"{facts}\n{_loss(plain, small)}"
    write_files(path, {path: content})
    shape = ", ".join(map(str, about["input"]["shape"]))
    dtype = "float32" if config.input == "float" else "uint8"
    return (
        f"{path}: {len(content) / 1e6:.2f} MB, {model.config.backbone.name} by {model.config.method}"
        f"{', int8' if config.quantize else ''}, {INPUT} {dtype} [batch, {shape}] to {OUTPUT} "
        f"[batch, {len(model.label_names)}]\n{facts}"
    )


def session(content: bytes) -> Callable[[np.ndarray], np.ndarray]:
    """A model in onnxruntime: a batch of inputs to logits."""
    ort = require(RUNTIME, "onnx")
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    running = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return lambda inputs: running.run([OUTPUT], {INPUT: inputs})[0]


def _convert(deployed: Deployed, example: Tensor, about: Mapping[str, Any]) -> bytes:
    onnx = require("onnx", "onnx")
    shapes = ({0: torch.export.Dim("batch", min=1)},)
    exported = torch.export.export(deployed, (example,), dynamic_shapes=shapes)
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with redirect_stdout(io.StringIO()):  # it reports its progress there
            program = torch.onnx.export(
                exported, (), dynamo=True, input_names=[INPUT], output_names=[OUTPUT], verbose=False
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise _lacking(exported, error) from error
    finally:
        log.setLevel(level)
    assert program is not None
    proto = program.model_proto
    _forget_places(proto)
    proto.producer_name, proto.doc_string = "tinytl_hf", f"{about['backbone']} by {about['method']}"
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in about.items()}
    onnx.helper.set_model_props(proto, texts)
    onnx.checker.check_model(proto)
    return proto.SerializeToString()


def _forget_places(proto: Any) -> None:
    """Drop where in this disk's files each operation was written, which the exporter notes and nobody reads."""
    for graph in (proto.graph, *proto.functions):
        for part in (graph, *graph.node, *graph.value_info):
            del part.metadata_props[:]
            part.doc_string = ""


def _lacking(exported: torch.export.ExportedProgram, error: Exception) -> TinyTLError:
    """Name the operator that has no translation, and its layer."""
    reason: BaseException = error
    while reason.__cause__ is not None:
        reason = reason.__cause__
    named = [n for n in exported.graph.nodes if n.op == "call_function" and str(n.target) in f"{error} {reason}"]
    where = f"layer {layer_of(named[0])} has the operator {named[0].target}, which ONNX lacks" if named else "no ONNX"
    return TinyTLError(f"format=onnx: {where} ({first_line(reason)}); use another format or backbone")


def _quantised(content: bytes, inputs: Tensor) -> bytes:
    """The model with 8-bit weights, with a scale for each channel, and activations in the ranges of ``inputs``."""
    quantization = require(f"{RUNTIME}.quantization", "onnx")

    class Reader(quantization.CalibrationDataReader):  # type: ignore[name-defined]
        def __init__(self) -> None:
            self.batches: Iterator[Tensor] = iter(inputs.split(8))

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.batches, None)
            return None if batch is None else {INPUT: batch.numpy()}

    with ExitStack() as held:
        try:
            folder = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="tinytl-onnx-")))
            source, target = folder / "fp32.onnx", folder / "int8.onnx"
            source.write_bytes(content)
        except OSError as error:
            raise no_room("quantize=int8", error) from error
        # Weights of 7 bits: CPUs without VNNI add pairs of products in 16 bits, which 8-bit weights overflow.
        options = {"per_channel": True, "reduce_range": True, "op_types_to_quantize": QUANTIZED}
        try:
            quantization.quantize_static(source, target, Reader(), **options)
        except Exception as error:  # it raises whatever onnxruntime raises
            raise TinyTLError(
                f"quantize=int8: onnxruntime cannot do it ({first_line(error)}); export without it"
            ) from error
        return target.read_bytes()


def _loss(plain: Comparison, small: Comparison) -> str:
    """What 8 bits cost, in words."""
    assert plain.accuracy is not None and small.accuracy is not None
    lost = 100 * (plain.accuracy[1] - small.accuracy[1])
    return f"{small}\nint8 {'loses' if lost >= 0 else 'gains'} {abs(lost):.2f} points of accuracy"

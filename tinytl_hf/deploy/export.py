"""The verb ``export``: load the adapter, and hand it to the format that was asked for."""

from __future__ import annotations

import copy
import os
from dataclasses import fields, replace
from typing import Any

import torch

from tinytl_hf.adapter.build import as_it_is
from tinytl_hf.config.check import check
from tinytl_hf.config.data import DataConfig
from tinytl_hf.config.export import ExportConfig, ExportFormat
from tinytl_hf.data.find import is_same_place
from tinytl_hf.device import set_threads
from tinytl_hf.disk import StrPath
from tinytl_hf.measure.eval_view import with_view
from tinytl_hf.model import TinyTLModel

# Options that say what to load, and those that are arguments of their own: the model is there already.
OF_THE_VERB = ("adapter", "weights", "revision", "format", "output")


def export(config: ExportConfig, data: DataConfig) -> str:
    """Export the adapter at ``config.adapter``.

    Args:
        config: What to write where.
        data: Images for the check and for calibration; its sizes and crop are those of the exported model.

    Returns:
        What was written, and what was measured.

    Raises:
        TinyTLError: The adapter or its backbone cannot be loaded, the format does not fit, or writing fails.
    """
    set_threads(None)
    model = TinyTLModel.from_pretrained(config.adapter, weights=config.weights, revision=config.revision)
    return export_model(model, config, data)


def export_as(
    model: TinyTLModel, output: StrPath, format: ExportFormat, *, data: DataConfig | None = None, **options: Any
) -> str:
    """Export a model that is in memory; it stays as it is.

    Args:
        model: The model; its active adapter is exported.
        output: The .onnx file, the .pte file or the folder to write.
        format: What to write.
        data: Images for the check and for calibration; None: those that the adapter names.
        **options: The other fields of :class:`~tinytl_hf.config.export.ExportConfig`.

    Returns:
        What was written, and what was measured.

    Raises:
        TinyTLError: An option does not fit, a package is missing, the result differs, or writing fails.
    """
    is_path = isinstance(output, (str, os.PathLike))
    check(is_path, "output", output, "name the .onnx file, the .pte file or the folder to write")
    takes = "use a DataConfig of tinytl_hf.config.data, such as DataConfig(dataset='path/to/images')"
    check(data is None or isinstance(data, DataConfig), "data", data, takes)
    names = [field.name for field in fields(ExportConfig) if field.name not in OF_THE_VERB]
    for name, value in options.items():
        check(name in names, name, value, f"export has no such option; it has {', '.join(names)}")
    config = ExportConfig(adapter="", format=format, output=os.fspath(output), **options)
    if data is not None:
        sizes, record = model.config.preprocessing, model.config.data
        data = replace(data, train_size=sizes.train_size) if data.train_size == DataConfig.train_size else data
        data = replace(data, eval_size=data.eval_size or sizes.eval_size)
        data = record.fill_in(data) if record and is_same_place(data.dataset, record.dataset) else data
    return export_model(model, config, data)


def export_model(model: TinyTLModel, config: ExportConfig, data: DataConfig | None = None) -> str:
    """As :func:`export_as`, with the options of the verb; of one that was cast, or is on a GPU, a copy is exported."""
    as_exported = as_it_is(model.config, model.backbone)  # a file says, as an adapter, which weights are in it
    tensors = model.state_dict().values()
    if any(not t.is_cpu or (t.is_floating_point() and t.dtype != torch.float32) for t in tensors):
        model = copy.deepcopy(model).float().cpu()
    sizes = model.config.preprocessing
    record = model.config.data
    if data is None:
        data = DataConfig(train_size=sizes.train_size, eval_size=sizes.eval_size, crop_pct=sizes.crop_pct)
        data = data if record is None else replace(record.as_trained(data), dataset=record.dataset)
    before, training = model.config, model.training
    model.config = as_exported
    try:
        model.config = with_view(model, data)
        with torch.no_grad():
            return _export_in_format(model.eval(), config, data)
    finally:
        model.config = before
        model.train(training)


def _export_in_format(model: TinyTLModel, config: ExportConfig, data: DataConfig) -> str:
    # Imported where they are used: each knows a package that need not be there.
    if config.format == "onnx":
        from tinytl_hf.deploy.onnx import export_onnx

        return export_onnx(model, config, data)
    if config.format == "timm":
        from tinytl_hf.deploy.timm_repo import export_timm

        return export_timm(model, config, data)
    if config.train:
        from tinytl_hf.deploy.device_step import export_device_step

        return export_device_step(model, config, data)
    from tinytl_hf.deploy.executorch import export_executorch

    return export_executorch(model, config, data)

"""The forms of exported models: how each is written and loaded.

All of them take raw images, uint8 ``[B, c, h, w]`` for any B, and return logits ``[B, C]``.
PyTorch reads ``torch-export``; ONNX Runtime, which also runs on phones, reads ``onnx`` and ``int8``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedkd.errors import FedkdError, one_line

INPUT, OUTPUT, BATCH = "pixels", "logits", "batch"
"""Names of the program's input and output, and of their first axis."""

Predictor = Callable[[Tensor], Tensor]
"""Returns logits ``[B, C]`` for images uint8 ``[B, c, h, w]``."""


class FromPixels(nn.Module):
    """A model with its normalisation in front, in evaluation mode.

    Args:
        model: takes normalised images.
        mean: per channel, of pixels scaled to 0..1.
        std: likewise.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.model = model
        means, deviations = torch.tensor(mean)[:, None, None], torch.tensor(std)[:, None, None]
        # The same numbers as in `fedkd.data.images.Images.normalise`.
        self.register_buffer("scale", 1 / (255 * deviations))
        self.register_buffer("shift", means / deviations)
        self.eval().requires_grad_(False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the logits ``[B, C]`` of images uint8 ``[B, c, h, w]``."""
        logits: Tensor = self.model(pixels.to(torch.float32) * self.scale - self.shift)
        return logits


@dataclass(frozen=True)
class Form:
    """A form of export.

    Attributes:
        ending: of its files' names.
        runtime: the package that runs it.
        is_exact: whether its logits equal the original's up to rounding in float32.
        write: writes a model to a path, for images of a shape ``(c, h, w)``; the last argument are
            images to calibrate with, uint8 ``[M, c, h, w]``.
        load: reads it.
    """

    ending: str
    runtime: str
    is_exact: bool
    write: Callable[[FromPixels, Sequence[int], Path, Tensor], None]
    load: Callable[[Path], Predictor]


# --- torch-export ---------------------------------------------------------------------------------


def traced(model: FromPixels, shape: Sequence[int]) -> torch.export.ExportedProgram:
    """Return a model traced for any number of images, without any data about this machine.

    Raises:
        FedkdError: the model cannot be traced.
    """
    example = torch.zeros((2, *shape), dtype=torch.uint8)
    sizes = {INPUT: {0: torch.export.Dim(BATCH, min=1)}}
    try:
        with torch.no_grad():
            program = torch.export.export(model, (example,), dynamic_shapes=sizes)
    except Exception as error:  # a user's model may do anything
        raise FedkdError(
            f"the model cannot be exported for any number of images: {one_line(error)}"
        ) from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine
    return program


def _write_torch(model: FromPixels, shape: Sequence[int], path: Path, _: Tensor) -> None:
    program = traced(model, shape)
    program.example_inputs = None  # all that would be pickled
    torch.export.save(program, path)


def _load_torch(path: Path) -> Predictor:
    module = torch.export.load(path).module()

    def predict(pixels: Tensor) -> Tensor:
        with torch.no_grad():
            logits: Tensor = module(pixels)
        return logits

    return predict


# --- ONNX -----------------------------------------------------------------------------------------


def _package(name: str) -> Any:
    """Return a package of the extra ``onnx``.

    Raises:
        FedkdError: it is not installed.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise FedkdError(
            f"to = 'onnx' and to = 'int8' need {name.partition('.')[0]} ({error}): "
            "pip install 'fedkd[onnx]'"
        ) from error


def check_packages(to: str) -> None:
    """Raise an error for a form whose packages are not installed, before any work.

    Raises:
        FedkdError: a package is missing; the message names what to install.
    """
    if to != "torch-export":
        for name in ("onnx", "onnxscript", "onnxruntime"):
            _package(name)


def _write_onnx(model: FromPixels, shape: Sequence[int], path: Path, _: Tensor) -> None:
    onnx = _package("onnx")
    exported = torch.onnx.export(
        traced(model, shape), dynamo=True, verbose=False, input_names=[INPUT], output_names=[OUTPUT]
    )
    assert exported is not None
    proto = exported.model_proto
    _name_batch(proto.graph)
    _remove_metadata(proto)
    onnx.checker.check_model(proto)
    onnx.save(proto, path)


def _name_batch(graph: Any) -> None:
    """Name the first axis of input and output, which the exporter numbers."""
    for value in (*graph.input, *graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = BATCH


def _remove_metadata(proto: Any) -> None:
    """Remove the metadata: they hold paths of this machine and are half of a small file."""
    graph = proto.graph
    del graph.value_info[:]  # their axes use the exporter's name for the batch
    for item in (*graph.node, *graph.input, *graph.output, *graph.initializer, graph, proto):
        del item.metadata_props[:]


def _load_onnx(path: Path) -> Predictor:
    runtime = _package("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def predict(pixels: Tensor) -> Tensor:
        return torch.from_numpy(session.run([OUTPUT], {INPUT: pixels.numpy()})[0])

    return predict


# --- int8 -----------------------------------------------------------------------------------------

QUANTISED = ("Conv", "Gemm", "MatMul", "Add", "MaxPool", "Relu")
"""Operators in 8 bits: convolutions, products, and the operators between them."""


def _write_int8(model: FromPixels, shape: Sequence[int], path: Path, calibration: Tensor) -> None:
    """Write a quantised model: weights int8 by output channel, activations uint8 by tensor.

    The ranges of activations are the smallest and largest over the calibration images. Logits stay
    float32: quantised ones would have ties.
    """
    tools = _package("onnxruntime.quantization")
    shapes = _package("onnxruntime.quantization.shape_inference")
    plain, prepared = path.with_name("plain.onnx"), path.with_name("prepared.onnx")
    _write_onnx(model, shape, plain, calibration)
    shapes.quant_pre_process(plain, prepared, skip_symbolic_shape=True)
    tools.quantize_static(
        prepared,
        path,
        _batches(tools.CalibrationDataReader, calibration),
        quant_format=tools.QuantFormat.QDQ,
        activation_type=tools.QuantType.QUInt8,
        weight_type=tools.QuantType.QInt8,
        per_channel=True,
        op_types_to_quantize=list(QUANTISED),
        extra_options={"OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"]},
    )


def _batches(reader: Any, pixels: Tensor) -> Any:
    """Return a calibration reader of images uint8 ``[M, c, h, w]``."""
    left: Iterator[Tensor] = iter(pixels.split(64))

    class Batches(reader):  # type: ignore[misc]
        def get_next(self) -> Any:
            batch = next(left, None)
            return None if batch is None else {INPUT: batch.numpy()}

    return Batches()


FORMS: dict[str, Form] = {
    "torch-export": Form(".pt2", "torch", True, _write_torch, _load_torch),
    "onnx": Form(".onnx", "onnxruntime", True, _write_onnx, _load_onnx),
    "int8": Form(".int8.onnx", "onnxruntime", False, _write_int8, _load_onnx),
}

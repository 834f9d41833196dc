"""Whether this machine's processor adds products of bytes without saturation."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import numpy as np
import pytest


@cache
def saturate() -> bool:
    """Whether ONNX Runtime's sums of uint8 · int8 products saturate at 16 bits here.

    They do on x86 processors without VNNI (ONNX Runtime, "Quantize ONNX models", on U8S8): int8 files
    are then less accurate than their operators define.
    """
    if any(find_spec(name) is None for name in ("onnx", "onnxruntime")):
        return False
    import onnxruntime
    from onnx import TensorProto, helper

    size = 64
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["a", "b"], ["c"])],
        "sums",
        [
            helper.make_tensor_value_info("a", TensorProto.UINT8, [size, size]),
            helper.make_tensor_value_info("b", TensorProto.INT8, [size, size]),
        ],
        [helper.make_tensor_value_info("c", TensorProto.INT32, [size, size])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    largest = {
        "a": np.full((size, size), 255, np.uint8),
        "b": np.full((size, size), 127, np.int8),
    }
    return bool((session.run(None, largest)[0] != 255 * 127 * size).any())


needs_exact_sums = pytest.mark.skipif(
    saturate(), reason="this processor saturates sums of uint8 · int8 products (x86 without VNNI)"
)

"""One node, or a few, for every operator that can be read; several where opsets differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

GENERATOR = np.random.default_rng(0)


def floats(*shape: int) -> Any:
    return GENERATOR.standard_normal(shape).astype(np.float32)


def ints(*values: int) -> Any:
    return np.array(values, dtype=np.int64)


@dataclass(frozen=True)
class Sample:
    """A node whose first inputs are those of the file, and whose others are constants."""

    op: str
    shapes: Sequence[tuple[int, ...]] = ((2, 3, 4, 4),)
    constants: Sequence[Any] = ()
    attributes: dict[str, Any] = field(default_factory=dict)
    opset: int = 20
    outputs: int = 1
    kind: str = "float"
    constants_first: bool = False

    def __str__(self) -> str:
        settings = "-".join(f"{key}{value}" for key, value in self.attributes.items())
        return f"{self.op}-{self.opset}-{settings}".replace(" ", "")

    def write(self, path: Path) -> Path:
        """The sample as a file."""
        import onnx
        from onnx import TensorProto, helper, numpy_helper

        kinds = {"float": TensorProto.FLOAT, "int": TensorProto.INT64, "bool": TensorProto.BOOL}
        given = [
            helper.make_tensor_value_info(f"x{place}", kinds[self.kind], shape)
            for place, shape in enumerate(self.shapes)
        ]
        names, stored = [], []
        for place, value in enumerate(self.constants):
            names.append("" if value is None else f"c{place}")
            if value is not None:
                stored.append(numpy_helper.from_array(np.asarray(value), f"c{place}"))
        own = [value.name for value in given]
        inputs = names + own if self.constants_first else own + names
        outputs = [f"y{place}" for place in range(self.outputs)]
        node = helper.make_node(self.op, inputs, outputs, name="the_node", **self.attributes)
        empty = [helper.make_empty_tensor_value_info(name) for name in outputs]
        graph = helper.make_graph([node], "sample", given, empty, stored)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)])
        model.ir_version = 8
        model = onnx.shape_inference.infer_shapes(model)
        onnx.save(model, path)
        return path


IMAGE, WORDS, MATRIX = (2, 4, 6, 6), (2, 3, 8), (3, 5)
_POOL = {"kernel_shape": [2, 2], "strides": [2, 2]}
_ELEMENTS = (
    "Abs", "Acos", "Asin", "Atan", "Ceil", "Celu", "Cos", "Elu", "Erf", "Exp", "Floor", "Gelu",
    "HardSigmoid", "HardSwish", "Identity", "LeakyRelu", "Log", "LogSoftmax", "Mish", "Neg",
    "Reciprocal",
    "Relu", "Round", "Sigmoid", "Sign", "Sin", "Softmax", "Softplus", "Softsign", "Sqrt", "Tan",
    "Tanh",
    "ThresholdedRelu", "GlobalAveragePool", "GlobalMaxPool", "ReduceL1", "ReduceL2",
    "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum", "ReduceSumSquare",
)  # fmt: skip
SAMPLES = [
    *(Sample(op) for op in _ELEMENTS),
    *(Sample(op, (MATRIX, MATRIX)) for op in ("Add", "Sub", "Mul", "Div", "Max", "Min", "Sum")),
    *(Sample(op, ((3, 1, 2),), (floats(4, 2),), constants_first=True)
      for op in ("Add", "Sub", "Mul", "Div")),
    *(Sample(op, (MATRIX,), (np.float32(0.5),), constants_first=first)
      for op in ("Add", "Sub", "Mul", "Div", "Max") for first in (False, True)),
    *(Sample(op, (MATRIX, MATRIX), kind="int") for op in ("Div", "Equal", "Greater", "Less")),
    *(Sample(op, (MATRIX, MATRIX)) for op in
      ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")),
    *(Sample(op, (MATRIX, MATRIX), kind="bool") for op in ("And", "Or", "Xor")),
    Sample("Not", (MATRIX,), kind="bool"),
    *(Sample(op, attributes={"axes": [1, -1], "keepdims": 0}, opset=13)
      for op in ("ReduceMean", "ReduceL2", "ReduceMax", "ReduceMin", "ReduceSumSquare")),
    Sample("ReduceMean", constants=(ints(2, 3),), attributes={"keepdims": 1}),
    Sample("ReduceSum", attributes={"axes": [1]}, opset=11),
    Sample("IsInf"), Sample("IsNaN"),
    Sample("Pow", (MATRIX,), (np.float32(2),)),
    Sample("PRelu", (IMAGE,), (floats(4, 1, 1),)),
    Sample("Cast", (MATRIX,), attributes={"to": 7}),
    Sample("Cast", (MATRIX,), attributes={"to": 9}),
    Sample("Clip", constants=(np.float32(0), np.float32(6))),
    Sample("Clip", constants=(None, np.float32(0.3))),
    Sample("Clip", attributes={"min": -0.5, "max": 0.5}, opset=10),
    Sample("Dropout", (MATRIX,)), Sample("Dropout", (MATRIX,), opset=9),
    Sample("Gelu", attributes={"approximate": "tanh"}),
    Sample("HardSigmoid", attributes={"alpha": 1 / 6, "beta": 0.5}),
    Sample("Softmax", (WORDS,), attributes={"axis": 1}),
    Sample("Softmax", (WORDS,), attributes={"axis": 1}, opset=11),
    Sample("LogSoftmax", (WORDS,), attributes={"axis": 2}, opset=11),
    Sample("Where", (MATRIX,), (np.float32(1), np.float32(-1)), kind="bool"),
    # windows
    Sample("Conv", (IMAGE,), (floats(8, 4, 3, 3), floats(8)), {"pads": [1, 1, 1, 1]}),
    Sample("Conv", (IMAGE,), (floats(8, 2, 3, 3),), {"group": 2, "pads": [0, 1, 1, 0]}),
    Sample("Conv", (IMAGE,), (floats(8, 4, 3, 3),), {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    Sample("Conv", (IMAGE,), (floats(8, 4, 3, 3),), {"auto_pad": "SAME_LOWER", "strides": [2, 2]}),
    Sample("Conv", ((2, 4, 9),), (floats(8, 4, 3), floats(8)), {"dilations": [2], "strides": [2]}),
    Sample("ConvTranspose", (IMAGE,), (floats(4, 3, 2, 2), floats(6)),
           {"group": 2, "strides": [2, 2], "output_padding": [1, 1]}),
    Sample("MaxPool", (IMAGE,), attributes=_POOL),
    Sample("MaxPool", (IMAGE,), attributes={"kernel_shape": [3, 3], "strides": [2, 2],
                                            "ceil_mode": 1}),
    Sample("MaxPool", (IMAGE,), attributes={"kernel_shape": [3, 3], "pads": [0, 0, 1, 1],
                                            "strides": [2, 2]}),
    Sample("AveragePool", (IMAGE,), attributes=_POOL),
    Sample("AveragePool", (IMAGE,), attributes={"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}),
    Sample("AveragePool", (IMAGE,), attributes={"kernel_shape": [3, 3], "pads": [1, 0, 1, 1],
                                                "count_include_pad": 1}),
    # products, norms, tables
    Sample("Gemm", ((3, 4),), (floats(5, 4), floats(5)), {"transB": 1}),
    Sample("Gemm", ((3, 4),), (floats(4, 5), floats(5))),
    Sample("Gemm", ((3, 4),), (floats(5, 4), floats(5)), {"transB": 1, "alpha": 0.5, "beta": 2.0}),
    Sample("Gemm", ((4, 3), (4, 5)), attributes={"transA": 1}),
    Sample("Gemm", ((3, 4),), (floats(4, 5), floats(3, 5))),
    Sample("MatMul", (WORDS,), (floats(8, 5),)),
    Sample("MatMul", ((2, 3, 4, 5), (2, 3, 5, 2))),
    Sample("MatMul", ((4, 3),), (floats(2, 4),), constants_first=True),
    Sample("BatchNormalization", (IMAGE,),
           (floats(4), floats(4), floats(4), np.abs(floats(4)) + 0.5), {"epsilon": 1e-3}),
    Sample("BatchNormalization", (WORDS,),
           (floats(3), floats(3), floats(3), np.abs(floats(3)) + 0.5), opset=9),
    Sample("InstanceNormalization", (IMAGE,), (floats(4), floats(4))),
    Sample("GroupNormalization", (IMAGE,), (floats(4), floats(4)), {"num_groups": 2}, opset=21),
    Sample("LayerNormalization", (WORDS,), (floats(8), floats(8))),
    Sample("LayerNormalization", (WORDS,), (floats(3, 8),), {"axis": 1}),
    Sample("RMSNormalization", (WORDS,), (floats(8),), opset=23),
    Sample("Gather", (WORDS,), (np.int64(-1),), {"axis": 1}),
    Sample("Gather", (WORDS,), (ints(2, 0, -1),), {"axis": 2}),
    Sample("GatherElements", (MATRIX,), (np.array([[0, 2], [1, 0], [3, 3]]),), {"axis": 1}),
    Sample("GatherND", (WORDS,), (np.array([[0, 1], [1, 2]]),)),
    Sample("ScatterND", (WORDS,), (np.array([[0, 1], [1, 2]]), floats(2, 8))),
    # shapes
    Sample("Shape", (IMAGE,)), Sample("Shape", (IMAGE,), attributes={"start": 1, "end": -1}),
    Sample("Reshape", (IMAGE,), (ints(0, -1, 3),)),
    Sample("Reshape", (IMAGE,), (ints(2, 2, -1),), {"allowzero": 1}),
    Sample("Flatten"), Sample("Flatten", attributes={"axis": 0}),
    Sample("Flatten", (MATRIX,), attributes={"axis": 2}),
    Sample("Flatten", attributes={"axis": 2}),
    Sample("Flatten", attributes={"axis": -1}),
    Sample("Squeeze", ((2, 1, 3, 1),)), Sample("Squeeze", ((2, 1, 3, 1),), (ints(-1),)),
    Sample("Squeeze", ((2, 1, 3, 1),), attributes={"axes": [1]}, opset=11),
    Sample("Unsqueeze", (MATRIX,), (ints(0, -1),)),
    Sample("Unsqueeze", (MATRIX,), attributes={"axes": [1, 2]}, opset=11),
    Sample("Transpose"), Sample("Transpose", attributes={"perm": [0, 2, 3, 1]}),
    Sample("Concat", (MATRIX, (2, 5)), attributes={"axis": 0}),
    Sample("Concat", (MATRIX,), (floats(3, 2),), {"axis": -1}),
    Sample("Split", ((2, 6),), (ints(2, 4),), {"axis": 1}, outputs=2),
    Sample("Split", ((2, 7),), attributes={"axis": -1, "num_outputs": 2}, outputs=2),
    Sample("Split", ((2, 6),), attributes={"axis": 1, "split": [1, 5]}, opset=11, outputs=2),
    Sample("Split", ((2, 6),), attributes={"axis": 1}, opset=13, outputs=3),
    Sample("Slice", (IMAGE,), (ints(1, -3), ints(2**63 - 1, -1), ints(1, 3))),
    Sample("Slice", (IMAGE,), (ints(0), ints(5), ints(2), ints(2))),
    Sample("Slice", (IMAGE,), (ints(-1), ints(-(2**63)), ints(3), ints(-1))),
    Sample("Slice", (IMAGE,), (ints(4), ints(1), ints(2), ints(-2))),
    Sample("Slice", (IMAGE,), attributes={"starts": [1, 0], "ends": [2, 3]}, opset=9),
    Sample("Expand", ((3, 1),), (ints(2, 1, 4),)), Sample("Expand", ((2, 3, 1),), (ints(1, 4),)),
    Sample("Tile", (MATRIX,), (ints(2, 3),)),
    Sample("Pad", (IMAGE,), (ints(0, 0, 1, 2, 0, 0, 0, 1), np.float32(1.5))),
    Sample("Pad", (IMAGE,), (ints(0, 0, 1, 2, 0, 0, 3, 1),), {"mode": "reflect"}),
    Sample("Pad", (IMAGE,), (ints(0, 0, 1, 2, 0, 0, 3, 1),), {"mode": "edge"}),
    Sample("Pad", (IMAGE,), attributes={"pads": [0, 1, 0, 0, 0, 2, 0, 0]}, opset=10),
    Sample("Resize", (IMAGE,), (None, np.array([1, 1, 2, 2], np.float32)),
           {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}),
    Sample("Resize", (IMAGE,), (None, None, ints(2, 4, 9, 5)), {"mode": "linear"}),
    Sample("Resize", (IMAGE,), (None, None, ints(2, 4, 9, 5)),
           {"mode": "linear", "coordinate_transformation_mode": "align_corners"}),
    Sample("Resize", (IMAGE,), (None, None, ints(2, 4, 12, 12)),
           {"mode": "cubic", "cubic_coeff_a": -0.75}),
    Sample("Upsample", (IMAGE,), (np.array([1, 1, 2, 2], np.float32),), opset=9),
    Sample("DepthToSpace", (IMAGE,), attributes={"blocksize": 2}),
    Sample("DepthToSpace", (IMAGE,), attributes={"blocksize": 2, "mode": "CRD"}),
    Sample("SpaceToDepth", (IMAGE,), attributes={"blocksize": 2}),
    Sample("Einsum", (MATRIX, (5, 2)), attributes={"equation": "ij,jk->ik"}),
]  # fmt: skip

"""What an ONNX file may ask of the library that runs it, checked before the library sees it; without the onnx package.

ONNX can loop for ever (`Loop`), grow without bound (functions that call functions) and name any file of the machine as
external data, which older versions of ONNX Runtime read. What this tool exports does none of that, so it is refused:

- only operators of `OPERATORS`, of the standard domain, and those that a vendor's own build half writes; no subgraphs,
  functions or sparse tensors;
- the opset that the graph's description names, one of `ir.profile.OPSETS`: ONNX Runtime 1.31 refuses an opset that it
  does not know, OpenVINO 2026.4 takes it for the newest that it does;
- external data only in the files that the graph's description lists, which the bundle has checked.

The file is read as protobuf messages (onnx.proto of ONNX 1.17: `ModelProto`, `GraphProto`, `NodeProto`,
`AttributeProto`, `TensorProto`); weights are skipped, not read. What protobuf would read in two ways is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from mmap import mmap
from pathlib import Path, PurePosixPath

from lemica_trt.core.errors import InputError
from lemica_trt.core.files import mapped
from lemica_trt.ir.graphs import GraphSpec
from lemica_trt.ir.profile import OPSETS

OPERATORS = frozenset(
    """
    Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh Attention AveragePool BatchNormalization BitShift
    BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Cast CastLike Ceil Celu CenterCropPad Clip Compress Concat Constant
    ConstantOfShape Conv ConvInteger ConvTranspose Cos Cosh CumSum DepthToSpace DequantizeLinear Div Dropout
    DynamicQuantizeLinear Einsum Elu Equal Erf Exp Expand EyeLike Flatten Floor Gather GatherElements GatherND Gelu
    Gemm GlobalAveragePool GlobalMaxPool Greater GreaterOrEqual GridSample GroupNormalization HardSigmoid HardSwish
    Hardmax Identity InstanceNormalization IsInf IsNaN LRN LayerNormalization LeakyRelu Less LessOrEqual Log
    LogSoftmax LpNormalization MatMul MatMulInteger Max MaxPool Mean MeanVarianceNormalization Min Mish Mod Mul Neg
    NonZero Not OneHot Or PRelu Pad Pow QLinearConv QLinearMatMul QuantizeLinear RMSNormalization Range Reciprocal
    ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum
    ReduceSumSquare Relu Reshape Resize RotaryEmbedding Round ScatterElements ScatterND Selu Shape Shrink Sigmoid
    Sign Sin Sinh Size Slice Softmax Softplus Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum Swish Tan Tanh
    ThresholdedRelu Tile TopK Transpose Trilu Unsqueeze Where Xor
    """.split()  # noqa: SIM905 (a name a line would take three pages)
)
"""Operators of the standard domain that compute a tensor from tensors, in time that their shapes bound."""

STANDARD_DOMAINS = ("", "ai.onnx")

MAX_FIELDS = 20_000_000
"""Protobuf fields in one file; a graph of 10 000 nodes has about 200 000."""

Data = mmap | bytes


def require_plain(graph: GraphSpec, path: Path, own: Collection[str] = ()) -> None:
    """Refuse an ONNX file that asks for more than computing tensors from its own and listed weights.

    Args:
        graph: its description; `data_files` are relative to the same folder as `file`.
        path: where the file lies.
        own: operators of the library itself that are allowed, too, as `domain::operator`.

    Raises:
        InputError: it does, or it is no ONNX file.
    """
    try:
        with mapped(path) as data:
            _Walk(data, graph, own).model(0, len(data))
    except OSError as error:
        raise InputError(f"{path}: expected a readable ONNX file, got: {error.strerror}") from None
    except ValueError as error:
        raise InputError(
            f"{graph.file}: {error}", fix="rebuild the bundle, or get it from somebody you trust"
        ) from None


class Messages:
    """Protobuf in memory; each method takes where a message starts and ends.

    Args:
        data: of a file. A damaged one raises ValueError where it is read.
    """

    def __init__(self, data: Data) -> None:
        self._data = data
        self._left = MAX_FIELDS

    def messages(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """Number, start and end of each field that is a message, a string or bytes."""
        for number, wire, first, last in self.fields(start, end):
            if wire == 2:
                yield number, first, last

    def fields(self, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
        """Number, wire type, and start and end of each field; of a varint its value, twice."""
        position = start
        while position < end:
            self._left -= 1
            if not self._left:
                raise ValueError(f"expected at most {MAX_FIELDS} fields")
            tag, position = self.varint(position, end)
            number, wire = tag >> 3, tag & 7
            if not 0 < number < 1 << 29:  # parsers cut longer numbers
                raise ValueError(f"expected an ONNX file, got a field {number}")
            first = position
            if wire == 0:
                first, position = self.varint(position, end)
            elif wire in (1, 5):
                position += 8 if wire == 1 else 4
            elif wire == 2:
                length, first = self.varint(position, end)
                position = first + length
            else:
                raise ValueError(f"expected an ONNX file, got wire type {wire}")
            if position > end:
                raise ValueError("expected an ONNX file, it is cut off")
            yield number, wire, first, first if wire == 0 else position

    def varint(self, position: int, end: int) -> tuple[int, int]:
        """A number, and where the next field starts."""
        value = 0
        for shift in range(0, 70, 7):
            if position >= end:
                raise ValueError("expected an ONNX file, it is cut off")
            byte = self._data[position]
            value |= (byte & 127) << shift
            position += 1
            if byte < 128:
                return value, position
        raise ValueError("expected an ONNX file, got a number of more than 64 bits")

    def text(self, start: int, end: int) -> str:
        return self._data[start:end].decode()


class _Walk(Messages):
    """Goes through the messages of a file."""

    def __init__(self, data: Data, graph: GraphSpec, own: Collection[str]) -> None:
        super().__init__(data)
        self._own = own
        self._folder = PurePosixPath(graph.file).parent
        self._data_files = frozenset(graph.data_files)
        self._opset = graph.opset

    def model(self, start: int, end: int) -> None:
        opsets: list[int] = []
        for number, first, last in self.messages(start, end):
            if number == 7:
                self._graph(first, last)
            elif number == 8:
                opsets += self._standard_opset(first, last)
            elif number in (20, 25):
                raise ValueError("expected no functions and no training graphs")
        if opsets != [self._opset] or self._opset not in OPSETS:
            found = ", ".join(map(str, opsets)) or "none"
            raise ValueError(f"expected opset {self._opset}, within {OPSETS[0]} … {OPSETS[-1]}, got {found}")

    def _standard_opset(self, start: int, end: int) -> list[int]:
        """The version that an import names, if it is of the standard domain."""
        domain, version = "", 0
        for number, wire, first, last in self.fields(start, end):
            if number == 1 and wire == 2:
                domain = self.text(first, last)
            elif number == 2 and wire == 0:
                version = first
        return [version] if domain in STANDARD_DOMAINS else []

    def _graph(self, start: int, end: int) -> None:
        for number, first, last in self.messages(start, end):
            if number == 1:
                self._node(first, last)
            elif number == 5:
                self._tensor(first, last)
            elif number == 15:
                raise ValueError("expected no sparse tensors")

    def _node(self, start: int, end: int) -> None:
        operator, domain = "", ""
        for number, first, last in self.messages(start, end):
            if number == 4:
                operator = self.text(first, last)
            elif number == 7:
                domain = self.text(first, last)
            elif number == 5:
                self._attribute(first, last)
        name = f"{domain}::{operator}" if domain else operator
        if name not in self._own and (domain not in STANDARD_DOMAINS or operator not in OPERATORS):
            raise ValueError(f"the operator {name!r} is not one that lemica-trt exports")

    def _attribute(self, start: int, end: int) -> None:
        for number, first, last in self.messages(start, end):
            if number in (5, 10):
                self._tensor(first, last)
            elif number in (6, 11, 22, 23):
                raise ValueError("expected no subgraphs and no sparse tensors")

    def _tensor(self, start: int, end: int) -> None:
        external, locations = False, []
        for number, wire, first, last in self.fields(start, end):
            if number == 14 and wire == 0:
                external = external or first != 0
            elif number == 13 and wire == 2:
                entry = [(n, self.text(a, b)) for n, a, b in self.messages(first, last)]
                if (1, "location") in entry:
                    locations += [text for n, text in entry if n == 2] or [""]
        if external and not locations:
            raise ValueError("a tensor's external data has no location")
        for location in locations:
            if str(self._folder / location) not in self._data_files:
                raise ValueError(f"external data in {location!r}, which is not one of the files listed for this graph")

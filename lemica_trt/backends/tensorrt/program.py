"""What an engine file of TensorRT for RTX tells without being loaded: which kernels it will run, in which dtypes.

Such a file carries its compiled program as text, one statement a line, for the compiler on the GPU machine to finish:

    header {
      accelerators={sm80 }
    }
    descriptors {
      tensor={ … name="x" … type=bf16 }
    }
    main {
      fully_connected={ … output={"x" } input={"a" "b" … } … }
      function={ name=_gemm_mha_v2 … output_args={ "y" } … }
    }

Found by looking at engines of TensorRT for RTX 1.7, documented nowhere: whoever calls this must be content with
nothing. Parts that a GPU machine compiles follow as programs of their own, for any accelerator (`*`); the main program
calls them, so that they are not counted.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from lemica_trt.core.files import mapped

DTYPES = {b"float": "fp32", b"half": "fp16", b"bf16": "bf16"}
"""The program's name of a dtype → ours."""

QUANTIZED = {b"fp8_e4m3": "fp8", b"int8": "int8"}
"""The same of what products multiply where they are quantised; their results are something else."""

_TENSOR = re.compile(rb'tensor=\{[^\n]*?name="([^"\n]*)"[^\n]*?type=(\w+) \}')
_STATEMENT = re.compile(rb"\n *(\w+)=\{(?: name=(\w+))?([^\n]*)")
_INPUTS = re.compile(rb"\binput(?:_args)?=\{([^}]*)\}")
_OUTPUT = re.compile(rb'\boutput(?:_args)?=\{ ?"([^"]*)"')
_COMPUTING = {b"fully_connected", b"corrltn", b"runtime_fusion"}
"""Statements: matrix product, convolution, either of them with what follows it."""
_ATTENTION = re.compile(rb"_f?mha")


class Layers(NamedTuple):
    """What an engine runs.

    Attributes:
        precisions: dtype → matrix products, convolutions and fused attentions whose result has it; of int8 and fp8
            those that multiply it; layers that share an input may be one product.
        fused_attention: how many of these are attentions in one kernel.
    """

    precisions: dict[str, int]
    fused_attention: int


def program_layers(path: Path) -> Layers | None:
    """Count the layers of an engine file; None where no program is found in it."""
    precisions: Counter[str] = Counter()
    fused, programs = 0, 0
    with mapped(path) as data:
        begin = data.find(b"header {")
        while begin >= 0:
            tensors = data.find(b"\ndescriptors {", begin)
            body = data.find(b"\nmain {", tensors)
            end = data.find(b"\n}", body)
            if begin < tensors < body < end and b"accelerators={*}" not in data[begin:tensors]:
                programs += 1
                types = dict(_TENSOR.findall(data[tensors:body]))
                for kind, name, rest in _STATEMENT.findall(data[body:end]):
                    attention = kind == b"function" and bool(_ATTENTION.search(name))
                    fused += attention
                    if attention or kind in _COMPUTING:
                        precisions.update(_precision(types, rest, product=not attention))
            begin = data.find(b"header {", begin + 1)
    return Layers(dict(precisions), fused) if programs else None


def _precision(types: Mapping[bytes, bytes], rest: bytes, *, product: bool) -> list[str]:
    """In what a statement computes; nothing where that is not known.

    Args:
        types: of the program's tensors.
        rest: the statement behind its name.
        product: whether quantised operands make it a quantised one.
    """
    inputs = _INPUTS.search(rest)
    given = re.findall(rb'"([^"]*)"', inputs[1]) if inputs and product else []
    quantized = [QUANTIZED[types[name]] for name in given if types.get(name) in QUANTIZED]
    output = _OUTPUT.search(rest)
    result = DTYPES.get(types.get(output[1], b"")) if output else None
    return quantized[:1] or ([result] if result else [])

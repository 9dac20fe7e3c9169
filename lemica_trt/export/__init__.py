"""Model, step layout → ONNX files and the `GraphSet` that describes them.

    graphs   the export of each graph, and the check of what the exporter made of it
    real     PyTorch's program of a module → one on real numbers, whose sizes stay symbols
    weights  which initializer of a graph is which parameter of the model
    passes   an exported model → the same computation, with nothing of the machine that exported it

Knows nothing of plans' contents, engines or bundles.
"""

from lemica_trt.export.graphs import export_graphs

__all__ = ["export_graphs"]

"""Model, step layout → ONNX files and the `GraphSet` that describes them.

    graphs   which graphs there are, what they are called with, and the export of each
    clean    an exported model → the same computation, with nothing of the machine that exported it

Knows nothing of plans' contents, engines or bundles.
"""

from lemica_trt.export.graphs import export_graphs

__all__ = ["export_graphs"]

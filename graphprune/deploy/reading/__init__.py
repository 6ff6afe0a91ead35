"""A file of ONNX read as a module of torch, so that it can be made smaller and written back.

A file enters; a ``torch.fx.GraphModule`` leaves whose layers are torch's own and whose outputs
are those of the file in ONNX Runtime. What an operator means stands in tables (``elementwise``,
``layers``, ``shaping``); sizes that a graph computes stay Python numbers (``numbers``), so that
they follow when channels leave.
"""

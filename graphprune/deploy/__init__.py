"""From a small model to one that is served: files for engines, checked in them.

A model and example inputs enter; a file leaves (ONNX, a ``torch.export`` package) together with a
report of how it compares with the model in the engine that runs it. Engines are loaded where they
are used: ``pip install "graphprune[onnx]"``. Of libraries whose models are folders, ``folders``
knows the layouts. The command line and the package itself import it.
"""

from graphprune.deploy.certificate import Certificate, Compared
from graphprune.deploy.exporting import Exported, export
from graphprune.deploy.likeness import Likeness
from graphprune.deploy.meeting import Met, meet_latency
from graphprune.deploy.quantizing import Quantized, quantize
from graphprune.deploy.reading.door import from_onnx
from graphprune.deploy.repeating import Repeated, repeat
from graphprune.deploy.timing import Bench, Timing, bench

__all__ = [
    "Bench",
    "Certificate",
    "Compared",
    "Exported",
    "Likeness",
    "Met",
    "Quantized",
    "Repeated",
    "Timing",
    "bench",
    "export",
    "from_onnx",
    "meet_latency",
    "quantize",
    "repeat",
]

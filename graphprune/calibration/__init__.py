"""Keep the accuracy of a small model without training.

A small model, its original and batches of data enter; the same small model leaves, its layers
refitted by least squares and its BatchNorm statistics taken anew. Imports ``execute`` and
``record``.
"""

from graphprune.calibration.refit import Calibration, calibrate

__all__ = ["Calibration", "calibrate"]

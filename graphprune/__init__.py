"""graphprune: a smaller dense model whose output equals the masked original."""

from graphprune.api import rebuild
from graphprune.calibrate import calibrate
from graphprune.checkpoint import load, save
from graphprune.graph import ChannelGraph, trace
from graphprune.mask import mask
from graphprune.measure import Measurement, measure
from graphprune.options import Options
from graphprune.plan import Plan
from graphprune.verify import verify

__all__ = [
    "ChannelGraph",
    "Measurement",
    "Options",
    "Plan",
    "calibrate",
    "load",
    "mask",
    "measure",
    "rebuild",
    "save",
    "trace",
    "verify",
]

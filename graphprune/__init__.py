"""graphprune: a smaller dense model whose output equals the masked original."""

from graphprune.api import ChannelGraph, rebuild, trace
from graphprune.calibration import calibrate
from graphprune.deploy.folders.door import from_pretrained, save_pretrained
from graphprune.deploy.folders.streaming import shrink_folder
from graphprune.execute.checkpoint import load, save
from graphprune.measurement import Measurement, measure
from graphprune.moved import find_moved
from graphprune.plan.plan import MAKERS, Plan
from graphprune.planning.options import Options
from graphprune.report import write_report
from graphprune.training.search.smallest import rebuilt, smallest
from graphprune.verification.masked import mask
from graphprune.verification.report import verify
from graphprune.version import __version__ as __version__
from graphprune.vocabulary.counting import kept_ids_by_count
from graphprune.vocabulary.tokenizer import MappedTokenizer, trim_tokenizer
from graphprune.vocabulary.trim import trim_vocabulary

__all__ = [  # and __version__, which a star does not import
    "ChannelGraph",
    "MappedTokenizer",
    "Measurement",
    "Options",
    "Plan",
    "calibrate",
    "from_pretrained",
    "kept_ids_by_count",
    "load",
    "mask",
    "measure",
    "rebuild",
    "save",
    "save_pretrained",
    "shrink_folder",
    "smallest",
    "trace",
    "trim_tokenizer",
    "trim_vocabulary",
    "verify",
]

find_moved()
MAKERS["report"] = write_report
MAKERS["smallest"] = rebuilt
del find_moved, MAKERS, rebuilt, write_report


def __dir__() -> list[str]:
    """The public names; packages are found by importing them."""
    return [*__all__, "__version__"]

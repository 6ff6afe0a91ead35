"""Whether several processes work on the same model, with the same options."""

from __future__ import annotations

from torch import nn

from graphprune.ranks import Ranks
from graphprune.record.tensors import fingerprint, mark


def agree(ranks: Ranks, options: object, **models: nn.Module) -> None:
    """Raise on every rank unless all have the same models and options.

    Buffers may differ, as running statistics do while a model is trained on several processes.

    Args:
        ranks: the processes.
        options: of which the text is compared.
        models: by what they are called.

    Raises:
        RankError: says what differs.
    """
    if ranks.size == 1:
        return
    for name, model in models.items():
        ranks.check(f"the architecture of the {name}", fingerprint(model))
        own = mark({n: p for n, p in model.named_parameters() if not p.is_meta})
        ranks.check(f"the weights of the {name}", f"{own:.9g}", _LOAD)
    ranks.check("the options", str(options), _OPTIONS)


_LOAD = "load the same weights on every rank, or draw them from the same seed"
_OPTIONS = "pass the same options on every rank; data alone are its own"

"""What other libraries call an option, and what to pass instead."""

_AMOUNT_HINT = "pass the ratio by place, rebuild(model, 0.5) or graph.plan(0.5)"
_KEEP_HINT = (
    'keep takes glob patterns of layers whose channels stay, such as keep=["head", "stem.*"]'
)
HINTS = {  # what other libraries call it, and our command line
    **dict.fromkeys(("ratio", "amount", "sparsity", "pruning_ratio", "prune_ratio"), _AMOUNT_HINT),
    **dict.fromkeys(("ignored_layers", "ignore", "exclude", "skip", "excluded"), _KEEP_HINT),
    **dict.fromkeys(("importance", "metric", "method"), "criterion says how channels are scored"),
    "global_pruning": 'scope="global" compares scores of all channels',
    "isomorphic": 'scope="isomorphic" compares scores of alike groups',
    "pruning_ratio_dict": 'ratios takes fractions by layer, such as {"layer3.*": 0.6}',
    "max_pruning_ratio": "min_kept is the smallest fraction that every group keeps",
    "max_drop": "graphprune.smallest(model, evaluate, data, max_drop) searches the budget",
    "flops": 'pass target={"macs": 0.5}',
}

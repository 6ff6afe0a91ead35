"""What other libraries call an option, and what to pass instead."""

_AMOUNT_HINT = (
    "pass the fraction of channels to remove as ratio, rebuild(model, 0.5) or graph.plan(0.5)"
)
_KEEP_HINT = (
    "keep takes modules, or glob patterns of layers, whose channels stay, such as "
    'keep=[model.head] or keep=["head", "stem.*"]'
)
_HEADS_HINT = (
    'heads are found by tracing: attention="heads" of trace and rebuild removes whole heads, '
    '"head_dim" makes all narrower; ratios takes fractions by layer'
)
_INPUTS_HINT = "pass the inputs as example_inputs"
_ROUNDS_HINT = "graphprune.training.iterate prunes and trains in turn"
_FOUND_HINT = "leave it out: which channels go together is found by tracing"
HINTS = {  # what other libraries call it, and our command line
    **dict.fromkeys(
        ("amount", "sparsity", "pruning_ratio", "prune_ratio", "ch_sparsity", "pruning_level",
         "sparsity_level"),
        _AMOUNT_HINT,
    ),
    **dict.fromkeys(
        ("ignored_layers", "ignore", "exclude", "skip", "excluded", "ignored_scopes",
         "ignored_scope", "ignored_params", "exclude_layers", "op_names"),
        _KEEP_HINT,
    ),
    **dict.fromkeys(
        ("importance", "metric", "method", "filter_importance", "importance_fn", "pruning_method"),
        "criterion says how channels are scored",
    ),
    **dict.fromkeys(
        ("num_heads", "prune_num_heads", "prune_head_dims", "head_pruning_ratio",
         "head_pruning_ratio_dict"),
        _HEADS_HINT,
    ),
    **dict.fromkeys(
        ("inputs", "input", "dummy_input", "example_input", "sample_inputs", "input_info",
         "inputs_size", "input_size"),
        _INPUTS_HINT,
    ),
    **dict.fromkeys(
        ("iterative_steps", "iterative_pruning_ratio_scheduler", "num_init_steps", "steps"),
        _ROUNDS_HINT,
    ),
    **dict.fromkeys(
        ("channel_groups", "out_channel_groups", "in_channel_groups", "customized_pruners",
         "unwrapped_parameters", "root_module_types", "root_instances", "forward_fn", "layers"),
        _FOUND_HINT,
    ),
    **dict.fromkeys(
        ("dataloader", "data_loader", "calibration_data", "collect_func"), "pass batches as data"
    ),
    **dict.fromkeys(
        ("output_transform", "outputs_transform"), "outputs of trace names the outputs that count"
    ),
    "global_pruning": 'scope="global" compares scores of all channels',
    "all_weights": 'scope="global" compares scores of all channels',
    "isomorphic": 'scope="isomorphic" compares scores of alike groups',
    **dict.fromkeys(
        ("pruning_ratio_dict", "ch_sparsity_dict"),
        'ratios takes fractions by layer, such as {"layer3.*": 0.6} or {model.layer3: 0.6}',
    ),
    **dict.fromkeys(
        ("max_pruning_ratio", "max_ch_sparsity"),
        "min_kept is the smallest fraction that every group keeps",
    ),
    **dict.fromkeys(
        ("max_drop", "evaluate", "evaluations", "confidence", "sure", "calibration", "score_func"),
        "graphprune.smallest(model, evaluate, data, max_drop) searches the budget, and so does "
        "rebuild(model, max_drop=..., evaluate=...)",
    ),
    "runtime": (
        "graphprune.deploy.meet_latency(model, 0.5, inputs, runtime=...) meets a latency in "
        "ONNX Runtime or OpenVINO"
    ),
    "constraints": 'pass limits as target={"macs": 0.5, "params": 0.6}',
    "pruning_flops_target": 'pass target={"macs": 0.5}',
    "flops": 'pass target={"macs": 0.5}',
}  # fmt: skip

"""A model, run once without its weights, as a graph of ATen ops.

The user's model and example inputs enter; a ``Record`` leaves: a ``torch.fx`` graph, with the
module, source line and given numbers of every op. Everything that runs the user's code, copies
modules or names tensors lives here. Imports ``ops``.
"""

"""The smallest model that loses at most so much: budgets are tried, repaired and evaluated.

A model and the user's evaluation enter; a small model leaves, with the curve it was chosen from.
All pruning is asked of ``api``; ``rebuild(model, max_drop=...)`` is bound to it from above.
"""

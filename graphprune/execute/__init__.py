"""A plan carried out by slicing, and the files that keep its result.

A model and a plan enter; the small model leaves. It knows no channel ids and shares no code with
``verification``, which checks it. Imports ``record`` and ``plan``.
"""

"""Folders of other libraries that hold a small model: its weights, the original's config, the plan.

A small model enters where ``save_pretrained`` is called, a folder leaves, and the other way round.
What is known of transformers, timm, diffusers and sentence-transformers is known here alone; none
of them is imported before a model of theirs is met. Imports ``execute`` and what is below.
"""

"""Fewer ids: rows of embedding tables and of output layers leave.

A model and ids enter; a small model leaves whose logits of these ids are the original's, with a
plan that says which ids stayed. May import everything but loops of training and the command line.
"""

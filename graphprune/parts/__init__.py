"""Whole parts of a model that can leave: branches that are added to a stream, and blocks.

A recorded graph with the calls of its modules enters; what is found there, scored and chosen leaves
as a plan. Imports planning and what lies below it.
"""

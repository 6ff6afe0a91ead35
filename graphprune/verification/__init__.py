"""A plan carried out by masking, and both models side by side.

An original, a plan and inputs enter; the masked reference and a report leave. Imports ``channels``
and ``execute``.
"""

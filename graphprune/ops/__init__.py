"""What each ATen op means, declared once and read by everything else.

An op of a recorded graph enters; what leaves is knowledge about it: which channels it ties, the
sizes it was given, what it costs, what it makes of constants, its shapes. Imports ``errors`` and
``text`` alone: no model, no record, no plan.
"""

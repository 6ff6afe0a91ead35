"""The plan as plain data: the waist of the hourglass.

Everything before decides what a plan says; everything behind executes it. A plan prints, composes
and is read back from JSON. Imports ``record``.
"""

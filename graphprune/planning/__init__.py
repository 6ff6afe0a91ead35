"""From a request to a plan.

An analysis, a request (ratio, targets, constraints) and scores enter; a plan leaves. Here is found
out which sizes in the code can follow, what a plan costs, and which channels go. Imports
``channels``, ``criteria`` and ``execute``.
"""

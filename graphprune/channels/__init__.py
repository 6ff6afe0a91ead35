"""From ties between channel ids to units and groups.

Records enter and are walked with the rules of ``ops``; an ``Analysis`` leaves, which knows which
channels live and die together and every shape after pruning. Imports ``record`` and ``plan``.
"""

"""Plans from masks: which channels of a masked model do nothing.

A channel graph and a masked model enter; a plan that changes nothing leaves. Recorded ops are
interpreted with the real weights, to see what is constant. Imports ``planning``.
"""

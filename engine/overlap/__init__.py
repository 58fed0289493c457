"""The overlap scheduler: which batch each side of a job works on, how far ahead, and what waits for what.

It knows nothing of models. One side prepares work, such as the target's forward or the reading of a
store, and the other side consumes it in the same order, such as the draft's training step.
"""

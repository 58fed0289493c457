"""Checks that tell whether a machine or cluster is ready to train: measurements, and judgements of what was measured."""

"""Speculative decoding, the measurement of acceptance, and the report of a run."""

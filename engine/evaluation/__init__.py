"""Speculative decoding, the acceptance measured with it, and the report of a run."""

"""EAGLE-3: the draft model, training-time test, cost model and export for servers."""

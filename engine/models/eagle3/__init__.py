"""EAGLE-3: the draft, its training-time test, its costs and the folder that servers load."""

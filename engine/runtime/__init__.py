"""Services around the training steps: overlap, checkpoints, metrics and the detection of faults."""

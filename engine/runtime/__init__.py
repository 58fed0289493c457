"""What runs around the training steps: overlap, checkpoints, metrics and the watch for faults."""

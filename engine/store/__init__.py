"""Hidden states of a target on disk: what a draft is trained from when the target is not loaded."""

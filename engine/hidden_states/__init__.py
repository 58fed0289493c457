"""Hidden states of the target: computed by the running target, or read from a store on disk."""

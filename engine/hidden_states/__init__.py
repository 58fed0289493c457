"""The target's hidden states: computed by the running target, or captured to disk and read again."""

"""Reading and storage of the target's weights: quantised or not, whole or one rank's part."""

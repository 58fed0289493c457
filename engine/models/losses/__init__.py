"""Distillation losses between the draft's and the target's distribution. One file per loss."""

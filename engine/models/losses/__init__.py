"""Distillation losses: how the draft's distribution of a row is compared with the target's. One file per loss."""

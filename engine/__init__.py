"""DraftSpeed: a training engine for EAGLE-3 draft models."""

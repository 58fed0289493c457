"""Utilities for the host: files, memory and the terminal."""

"""The machine that a process runs on: its files, its memory and its terminal."""

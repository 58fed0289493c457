"""Processes and how work is divided between them. Models know nothing of it."""

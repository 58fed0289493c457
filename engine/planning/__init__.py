"""Estimates of a job's memory, FLOPs and traffic before it starts, from configurations alone."""

"""Tells what a run does: metrics, progress, memory, environment, and a report at the end."""

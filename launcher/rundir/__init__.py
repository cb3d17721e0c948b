"""Looks after a run's directory: who is at work in it, what is kept of earlier attempts, what a resume is to use."""

"""Ranks as processes: who starts and ends them, how they find one another, and that they are ranks of one run."""

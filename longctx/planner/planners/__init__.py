"""Holds one file per planner; each decides which rank computes which rows of attention."""

"""Strategies of softmax attention, one file each, readable beside its paper's pseudocode."""

"""Trains decoder language models at any context length, on any cluster."""

__version__ = "0.1.0"

"""Holds one file per strategy that moves the states of linear layers between ranks."""

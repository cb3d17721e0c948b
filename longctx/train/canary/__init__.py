"""Checks a shrunken run on its mesh against one dense device: the start-up canary and the parity check."""

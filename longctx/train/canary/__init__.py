"""The start-up canary and parity checks: a shrunken run on its mesh against one dense device."""

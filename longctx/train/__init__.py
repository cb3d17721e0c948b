"""The training loop and what it needs: the step, the optimizer, state on disk, metrics, the canary."""

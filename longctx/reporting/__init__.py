"""What a run says of itself: metrics, progress line, report, memory by category, wandb."""

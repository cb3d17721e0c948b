"""What ``longctx bench`` measures on the user's own mesh: attention strategies, and the step of a configuration."""

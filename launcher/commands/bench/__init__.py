"""``longctx bench`` measures what the user's own configuration costs on the user's own mesh."""

"""One module per subcommand of ``longctx``."""

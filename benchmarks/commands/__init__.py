"""One benchmark per module: its options, its processes and the table that it prints."""

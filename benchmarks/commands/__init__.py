"""Each module here holds one benchmark: its options, its processes and the table that it prints."""

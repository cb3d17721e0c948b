"""What compares, proves and shapes links: run from a checkout with ``python -m benchmarks NAME``."""

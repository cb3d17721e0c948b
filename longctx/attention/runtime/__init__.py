"""What strategies run on: operators, the registry, ring and all-to-all transport, partial results, local kernels."""

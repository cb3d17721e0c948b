"""What carries strategies: operators, the registry, ring and all-to-all transport, partial results, local kernels."""

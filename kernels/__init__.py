"""Local attention kernels; each fills ``longctx.attention.runtime.local_kernel`` and is loaded by name."""

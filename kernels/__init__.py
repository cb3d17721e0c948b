"""Local attention kernels; each fills the contract of ``longctx.attention.contract`` and is loaded by name."""

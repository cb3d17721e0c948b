"""Holds the local attention kernels, which are loaded by name.

Each implements ``longctx.attention.runtime.local_kernel``.
"""

"""Compares longctx with other systems, proves its claims and shapes links.

Run from a checkout: ``python -m benchmarks NAME``.
"""

"""Computes linear attention under sequence parallelism: mixers, their core, and the strategies that join ranks."""

from longctx.linear.core import LinearAttention
from longctx.linear.mixer import HeadDims, Inputs, LinearCore, Mixer, get_mixer
from longctx.linear.registry import LinearCase, LinearStrategy, get_linear, refusal, require_linear

__all__ = [
    "HeadDims",
    "Inputs",
    "LinearAttention",
    "LinearCase",
    "LinearCore",
    "LinearStrategy",
    "Mixer",
    "get_linear",
    "get_mixer",
    "refusal",
    "require_linear",
]

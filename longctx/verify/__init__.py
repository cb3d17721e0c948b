"""Checks attention strategies against the dense reference; behind ``longctx verify``."""

from longctx.verify.case import RankResult, Verdict, VerifyCase
from longctx.verify.run import judge, refusal_of, refused, run_rank

__all__ = ["RankResult", "Verdict", "VerifyCase", "judge", "refusal_of", "refused", "run_rank"]

"""Exactness of attention strategies against the dense reference; behind ``longctx verify``."""

from longctx.verify.case import RankResult, Verdict, VerifyCase
from longctx.verify.run import judge, refused, run_rank

__all__ = ["RankResult", "Verdict", "VerifyCase", "judge", "refused", "run_rank"]

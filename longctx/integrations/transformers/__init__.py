"""Makes ``attn_implementation="longctx"`` work in ``transformers``' models under a sequence group.

``register`` comes first and returns a ``SharedSequence``; ``SequenceTrainer`` goes before ``transformers.Trainer``.
"""

from longctx.integrations.transformers.cut import CutBatch
from longctx.integrations.transformers.sharing import SharedSequence, register
from longctx.integrations.transformers.trainer import SequenceTrainer

__all__ = ["CutBatch", "SequenceTrainer", "SharedSequence", "register"]

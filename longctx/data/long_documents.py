"""Says what becomes of documents that no sequence holds whole, and counts them.

``split``: nothing is left out. A document goes on in the next sequence, where positions begin again and no token sees
what came before the cut. ``truncate``: its first ``seq_len`` tokens are a document, and the rest is not trained on.
``skip``: it is not trained on at all. Whatever is left may still be cut where a sequence ends.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from longctx.config import DataConfig
from longctx.data.corpus import CHUNK, Corpus, Int64
from longctx.data.packing import used


def count_long(config: DataConfig, corpus: Corpus, chosen: Int64 | None) -> dict[str, Any]:
    """Returns what becomes of how many documents that are trained on, and the tokens left out, as JSON values.

    ``chosen``: numbers of the documents that are trained on, None for all.
    """
    documents = left = 0
    for start in range(0, len(corpus) if chosen is None else len(chosen), CHUNK):
        if chosen is None:
            lengths = np.diff(corpus.bounds[start : start + CHUNK + 1])
        else:
            lengths = corpus.lengths_of(chosen[start : start + CHUNK])
        documents += int(np.count_nonzero(lengths > config.seq_len))
        left += int((lengths - used(config.long_documents, lengths, config.seq_len)).sum())
    return {"policy": config.long_documents, "documents": documents, "tokens_left_out": left}

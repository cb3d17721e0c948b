"""A dense numpy executor: runs a plan rank by rank, and dense attention to compare it with."""

import numpy as np


def dense(mask, q, k, v):
    """Outputs ``[S, H, D]`` and log-sum-exps ``[S, H]`` of whole documents, one after another."""
    out, lse, at = np.zeros_like(q), np.zeros(q.shape[:2]), 0
    for doc, length in enumerate(mask.lengths.tolist()):
        i, j = np.arange(length)[:, None], np.arange(length)[None]
        seen = np.zeros((length, length), dtype=bool)
        for s in mask.of(doc):
            inside = (s.q0 <= i) & (i < s.q1) & (s.k0 <= j) & (j < s.k1) & (s.lo <= j - i) & (j - i <= s.hi)
            assert not (seen & inside).any() and inside.sum() == s.area
            seen |= inside
        rows = slice(at, at + length)
        out[rows], lse[rows] = attend(q[rows], k[rows], v[rows], seen)
        at += length
    return out, lse


def attend(q, k, v, seen):
    share = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, share, axis=1), np.repeat(v, share, axis=1)
    scores = np.einsum("ihd,jhd->hij", q, k) / np.sqrt(q.shape[2])
    scores = np.where(seen, scores, -np.inf)
    top = scores.max(axis=2, keepdims=True)
    top = np.where(np.isfinite(top), top, 0)
    weights = np.exp(scores - top)
    total = weights.sum(axis=2, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = np.log(total[..., 0]) + top[..., 0]
    out = np.einsum("hij,jhd->ihd", weights / np.where(total > 0, total, 1), v)
    return out, lse.T


def merge(out, lse, rows, more_out, more_lse):
    """Adds partials of distinct ``rows``; none of a row is lse = -inf, out = 0."""
    total = np.logaddexp(lse[rows], more_lse)
    safe = np.where(np.isfinite(total), total, 0)
    old, new = np.exp(lse[rows] - safe), np.exp(more_lse - safe)
    out[rows] = out[rows] * old[..., None] + more_out * new[..., None]
    lse[rows] = total


def execute(plan, q, k, v):
    """Every rank sends, computes and returns as its ``RankPlan`` says; global ``[S, H, D]`` in and out."""
    ranks = [plan.rank(rank) for rank in range(plan.servers)]
    where = [resident(plan.home, rank) for rank in range(plan.servers)]
    groups = plan.groups
    got_q = exchange([one.q for one in ranks], [by_group(q[w], one.q, groups) for w, one in zip(where, ranks)])
    kv = np.concatenate([k, v], axis=2)
    got_kv = exchange([one.kv for one in ranks], [by_group(kv[w], one.kv, groups) for w, one in zip(where, ranks)])
    served = [serve(one, a, b) for one, a, b in zip(ranks, got_q, got_kv, strict=True)]
    out, lse = np.zeros_like(q), np.full(q.shape[:2], -np.inf)
    share, kv_share = q.shape[1] // groups, k.shape[1] // groups
    for rank, one in enumerate(ranks):
        own, own_out, own_lse = where[rank], out[where[rank]], lse[where[rank]]
        for group in range(groups):
            heads, kv_heads = slice(group * share, (group + 1) * share), slice(group * kv_share, (group + 1) * kv_share)
            tensors = q[own][:, heads], k[own][:, kv_heads], v[own][:, kv_heads]
            compute(one.local, np.flatnonzero(one.local.group == group), *tensors, own_out[:, heads], own_lse[:, heads])
        out[own], lse[own] = own_out, own_lse
        # What each server returns of this rank's rows, in the order in which they were sent.
        at = 0
        for server, count in enumerate(one.q.send_counts.tolist()):
            low = int(ranks[server].q.recv_counts[:rank].sum())
            back_out, back_lse = (part[low : low + count] for part in served[server])
            rows = where[rank][one.q.send[at : at + count]]
            for group in range(groups):
                mine = one.q.send_group[at : at + count] == group
                heads = slice(group * share, (group + 1) * share)
                part_out, part_lse = out[:, heads], lse[:, heads]
                merge(part_out, part_lse, rows[mine], back_out[mine], back_lse[mine])
            at += count
    return out, lse


def resident(home, rank):
    """Global places (documents one after another) of a rank's tokens, in its order."""
    before = np.cumsum(home.lengths) - home.lengths
    parts = [before[s.doc] + np.arange(s.start, s.stop) for s in home.spans(rank)]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


def by_group(tokens, exchange, groups):
    """Rows to send: each with the heads of its group only."""
    share = tokens.shape[1] // groups
    heads = exchange.send_group[:, None] * share + np.arange(share)
    return tokens[exchange.send[:, None], heads]


def exchange(sides, sent):
    """All-to-all by split lists."""
    for rank, side in enumerate(sides):
        assert side.send_counts.sum() == len(sent[rank])
        assert all(side.send_counts[other] == sides[other].recv_counts[rank] for other in range(len(sides)))
    cuts = [np.split(part, np.cumsum(side.send_counts)[:-1]) for part, side in zip(sent, sides, strict=True)]
    return [np.concatenate([cut[rank] for cut in cuts]) for rank in range(len(sides))]


def serve(one, q, kv):
    """Partials of all received rows, in the order in which they came."""
    q, kv = q[one.q.order], kv[one.kv.order]
    k, v = np.split(kv, 2, axis=2)
    out, lse = np.zeros_like(q), np.full(q.shape[:2], -np.inf)
    compute(one.remote, range(len(one.remote.group)), q, k, v, out, lse)
    back_out, back_lse = np.empty_like(out), np.empty_like(lse)
    back_out[one.q.order], back_lse[one.q.order] = out, lse
    return back_out, back_lse


def compute(tasks, which, q, k, v, out, lse):
    """Adds those tasks' partials, in place."""
    for task in which:
        rows, keys = slice(tasks.q_start[task], tasks.q_stop[task]), slice(tasks.k_start[task], tasks.k_stop[task])
        i = np.arange(rows.stop - rows.start)[:, None]
        j = np.arange(keys.stop - keys.start)[None]
        seen = (tasks.lo[task] <= j - i) & (j - i <= tasks.hi[task])
        assert seen.any(axis=1).all() and seen[:, [0, -1]].any(axis=0).all(), "a row or an outer key without cells"
        merge(out, lse, rows, *attend(q[rows], k[keys], v[keys], seen))

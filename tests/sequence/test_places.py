"""Places of several ranks' tokens in one buffer: what is put there is found there, by runs or by index."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from longctx.sequence import Places


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(1, 4), st.booleans())
def test_put_and_pick_are_inverse(owners, world, strided):
    owners = np.array([owner % world for owner in owners], dtype=np.int64)
    held = [np.flatnonzero(owners == rank) * 3 for rank in range(world)]
    places = Places(held)
    assert places.counts == tuple(map(len, held))
    whole = torch.full((2, len(owners), 5), -1.0)
    for rank, positions in enumerate(held):
        places.put(rank, torch.from_numpy(positions).float()[None, :, None].expand(2, -1, 5).contiguous(), whole)
    assert torch.equal(whole[0, :, 0], torch.arange(len(owners)) * 3.0)
    for rank, positions in enumerate(held):
        room = torch.zeros(2, len(positions), 10)[:, :, 5:] if strided else torch.zeros(2, len(positions), 5)
        places.pick(rank, whole, room)
        assert torch.equal(room[1, :, 4], torch.from_numpy(positions).float())

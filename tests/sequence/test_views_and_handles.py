"""What is worked out from a plan is made once; what operators take by name is found as long as it lives."""

import gc

import pytest
import torch

from longctx.sequence import Documents, Mask, SequencePlan, Zigzag, handles, key_ring, query_ring, view


def plan() -> SequencePlan:
    return SequencePlan((Documents.single(12),), Mask(), Zigzag(), 12, 2)


def test_a_view_is_made_once_for_each_plan_and_argument():
    made = []

    @view
    def doubled(of: SequencePlan, number: int) -> int:
        made.append((of.id, number))
        return 2 * number

    one, other = plan(), plan()
    assert [doubled(one, 3), doubled(one, 3), doubled(one, 4), doubled(other, 3)] == [6, 6, 8, 6]
    assert made == [(one.id, 3), (one.id, 4), (other.id, 3)]
    with pytest.raises(AssertionError, match="doubled takes its arguments by position"):
        doubled(one, number=3)


def test_rings_of_keys_and_of_queries_are_views_of_their_own():
    one = plan()
    assert key_ring(one) is key_ring(one, 2) and query_ring(one) is query_ring(one, 2)
    assert key_ring(one) is not query_ring(one)


def test_a_handle_names_what_its_owner_keeps():
    one = plan()
    assert handles.named(one.handle) is one and handles.named(torch.tensor(one.id)) is one
    handle = one.handle
    del one
    gc.collect()
    assert handles.named(handle) is None


def test_a_run_is_kept_from_its_beginning_to_its_end():
    handle, run = handles.new_handle(), object()
    handles.begin(handle, run)
    with pytest.raises(AssertionError, match=f"run {int(handle)} is still under way"):
        handles.begin(handle, object())
    assert handles.running(handle) is run and handles.end(handle) is run
    handles.begin(handle, run)
    assert handles.end(handle) is run


def test_what_is_shared_is_made_anew_once_nobody_holds_it():
    class Thing:
        pass

    first = handles.shared(("a key", 1), Thing)
    assert handles.shared(("a key", 1), Thing) is first and handles.shared(("a key", 2), Thing) is not first
    kept = id(first)
    del first
    gc.collect()
    assert handles.shared(("a key", 1), Thing) is not None and kept

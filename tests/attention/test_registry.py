"""What strategies declare they execute, and the nearest valid choice where they do not."""

import pytest

from longctx import catalog
from longctx.attention import AttentionCase, get_strategy, refusal, require
from longctx.catalog import LAYOUTS
from longctx.errors import ConfigError
from longctx.sequence import Mask


def case(**changes) -> AttentionCase:
    fields = {"world": 4, "heads": 8, "kv_heads": 2, "layout": "zigzag", "mask": Mask()}
    return AttentionCase(**{**fields, **changes})


@pytest.mark.parametrize("layout", [*LAYOUTS, "explicit"])
@pytest.mark.parametrize("mask", [Mask(), Mask(False), Mask(window=3), Mask(False, 3)])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_the_ring_executes_every_layout_mask_and_world(layout, mask, world):
    assert refusal(get_strategy("ring"), case(layout=layout, mask=mask, world=world)) is None


def test_striped_wants_its_layout():
    striped = get_strategy("striped")
    assert refusal(striped, case(layout="striped")) is None
    for layout in ("contiguous", "zigzag", "explicit"):
        assert refusal(striped, case(layout=layout)) == (
            f"layout '{layout}': it is the ring over the striped layout; use attention.layout=striped, or ring"
        )


def test_local_wants_the_whole_sequence():
    local = get_strategy("local")
    assert refusal(local, case(world=1)) is None
    reason = refusal(local, case(world=3))
    assert reason is not None
    assert reason.startswith("3 ranks share the sequence; it computes on one") and "parallel.sp=1" in reason


@pytest.mark.parametrize("strategy", catalog.STRATEGIES)
@pytest.mark.parametrize(("heads", "kv_heads", "nearest"), [(8, 3, 2), (6, 4, 3), (4, 8, 4), (7, 2, 1)])
def test_heads_that_do_not_divide_are_told_the_nearest(strategy, heads, kv_heads, nearest):
    reason = refusal(get_strategy(strategy), case(world=1, layout="striped", heads=heads, kv_heads=kv_heads))
    assert reason == (
        f"{heads} query heads do not divide over {kv_heads} key/value heads; nearest valid: kv_heads={nearest}"
    )


def test_an_unknown_layout_is_told_the_valid_ones():
    reason = refusal(get_strategy("ring"), case(layout="spiral"))
    assert reason == f"layout 'spiral' is unknown; valid layouts: {', '.join(LAYOUTS)}"


def test_require_raises_what_refusal_says():
    require(get_strategy("ring"), case())
    with pytest.raises(ConfigError, match=r"attention\.strategy=striped refuses: layout 'zigzag'"):
        require(get_strategy("striped"), case())


def test_an_unknown_strategy_is_told_which_exist():
    with pytest.raises(ConfigError, match=r"=rign is not known; did you mean ring.*valid: local, ring, striped"):
        get_strategy("rign")


@pytest.mark.parametrize("name", catalog.STRATEGIES)
def test_every_registered_name_is_its_strategy(name):
    strategy = get_strategy(name)
    assert strategy.name == name and strategy.layout in LAYOUTS

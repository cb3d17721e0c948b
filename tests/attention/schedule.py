"""Reading the traces of sim: which transfer was under way while what was computed."""

from __future__ import annotations

from longctx.sim import Event

FLASH = "aten._scaled_dot_product_flash_attention_for_cpu"


def spans(events: list[Event], dtype: str) -> list[tuple[int, int]]:
    """(post, wait) places of every transfer of a dtype; each is awaited exactly once."""
    found = []
    for place, event in enumerate(events):
        if event.phase == "post" and event.dtype == dtype:
            [wait] = [i for i, other in enumerate(events) if (other.phase, other.id) == ("wait", event.id)]
            found.append((place, wait))
    return found


def places(events: list[Event], *operations: str) -> list[int]:
    return [i for i, event in enumerate(events) if event.operation in operations]


def hidden(span: tuple[int, int], computing: list[int]) -> bool:
    """Something is computed between the post and the wait of a transfer."""
    return any(span[0] < at < span[1] for at in computing)

"""Views: what is worked out from a plan, made at first use and kept as long as the plan."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from longctx.ambient import lasting


class Viewed(Protocol):
    """Has views: a plan."""

    views: dict[Any, Any]


P = ParamSpec("P")
Plan = TypeVar("Plan", bound=Viewed)
T = TypeVar("T")


def view(make: Callable[Concatenate[Plan, P], T]) -> Callable[Concatenate[Plan, P], T]:
    """Makes a function of a plan and of hashable arguments, given by position, run once for each of them."""

    make_lasting = lasting(make)

    @wraps(make)
    def of(plan: Plan, *key: P.args, **named: P.kwargs) -> T:
        assert not named, f"{make.__name__} takes its arguments by position"
        known = (make, *key)
        if known not in plan.views:
            # Two threads may make one at the same time; both then have the one that was first.
            plan.views.setdefault(known, make_lasting(plan, *key, **named))
        found: T = plan.views[known]
        return found

    return of

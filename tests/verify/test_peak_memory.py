"""Peak memory: storages that operators bring to life, at their full size, until they die."""

import torch

from longctx.operators import IMPLEMENTATIONS
from longctx.verify.memory import PeakMemory


def test_what_is_alive_at_once_counts_once():
    given = torch.ones(100)
    with PeakMemory({}) as memory:
        first = given + 1
        view = first[10:20].view(2, 5)
        del first
        second = view + given[:5]
        del view, second
        third = torch.empty(50)
    assert memory.peak == 400 + 40
    assert third.numel() == 50


def test_inputs_do_not_count_nor_what_is_written_in_place():
    given = torch.ones(100)
    with PeakMemory({}) as memory:
        given.add_(1)
        given[3:5].mul_(2)
    assert memory.peak == 0


def test_an_input_that_dies_leaves_its_address_to_others():
    given = [torch.ones(1 << 16) for _ in range(50)]
    with PeakMemory({}) as memory:
        while given:
            given.pop().add_(1)
            memory.peak = 0
            made = torch.empty(1 << 16)
            del made
            assert memory.peak == 4 << 16


def test_operators_are_looked_into():
    def inside(a):
        large = a.repeat(8)
        return large[:4] + 1

    operator = torch.library.custom_op("verify_test::inside", inside, mutates_args=(), schema="(Tensor a) -> Tensor")
    for known, peak in (({}, 16), ({operator._opoverload: inside}, 8 * 16 + 16)):
        with PeakMemory(known) as memory:
            operator(torch.ones(4))
        assert memory.peak == peak + 16, "with the argument, made under the mode"


def test_every_strategy_can_be_looked_into():
    from longctx.attention import get_strategy

    for name in ("local", "ring", "ulysses", "usp"):
        get_strategy(name)
        operators = getattr(torch.ops.longctx, name), getattr(torch.ops.longctx, f"{name}_backward")
        assert {operator.default for operator in operators} <= set(IMPLEMENTATIONS)

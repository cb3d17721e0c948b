"""Which kernel runs: automatic, overridable, and each refusal logged."""

import logging

import pytest
import torch

from longctx.attention.runtime import local_kernel as contract
from longctx.attention.runtime.local_kernel import KernelProblem, kernel_for, load_kernel, select_kernel
from longctx.catalog import KERNELS
from longctx.errors import ConfigError


@pytest.fixture(autouse=True)
def fresh_choice():
    """Choices are remembered for the process; a test wants to see one made."""
    select_kernel.cache_clear()
    yield
    select_kernel.cache_clear()


def problem(**changes) -> KernelProblem:
    fields = {"device": "cpu", "dtype": torch.float32, "heads": 8, "kv_heads": 2, "head_dim": 64}
    return KernelProblem(**{**fields, **changes})


def test_auto_takes_the_first_that_does_not_refuse_and_says_why(caplog):
    caplog.set_level(logging.INFO, contract.__name__)
    assert select_kernel("auto", problem()).name == "flash_cpu"
    assert [record.getMessage() for record in caplog.records] == [
        "attention kernel flash_cuda refused: device cpu: it runs on cuda",
        f"attention kernel flash_cpu chosen for {problem()}",
    ]
    caplog.clear()
    assert select_kernel("auto", problem()).name == "flash_cpu"
    assert not caplog.records, "a choice is logged once"


@pytest.mark.parametrize(
    ("changes", "chosen"),
    [
        ({"dtype": torch.float64}, "flash_cpu"),
        ({"dtype": torch.bfloat16}, "flash_cpu"),
        ({"dtype": torch.float16}, "flash_cpu"),
        ({"device": "cuda", "dtype": torch.float32}, "dense"),
        ({"device": "mps"}, "dense"),
    ],
)
def test_order_of_preference(changes, chosen):
    assert list(KERNELS) == ["flash_cuda", "flash_cpu", "dense"]
    assert select_kernel("auto", problem(**changes)).name == chosen


def test_cuda_is_preferred_where_it_runs(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert select_kernel("auto", problem(device="cuda", dtype=torch.bfloat16)).name == "flash_cuda"


def test_a_named_kernel_is_taken_or_refused_with_its_reason():
    assert select_kernel("dense", problem()).name == "dense"
    with pytest.raises(ConfigError, match=r"'flash_cuda' refuses .*device cpu: it runs on cuda; use .*=auto"):
        select_kernel("flash_cuda", problem())
    with pytest.raises(ConfigError, match=r"'flash_cpu' refuses .*torch\.int32: it takes float32, float64"):
        select_kernel("flash_cpu", problem(dtype=torch.int32))


def test_an_unknown_kernel_is_told_which_exist():
    with pytest.raises(ConfigError, match=r"=flsh is not known; .*valid: auto, flash_cuda, flash_cpu, dense"):
        select_kernel("flsh", problem())


def test_a_kernel_is_made_once_and_chosen_by_tensors():
    assert load_kernel("dense") is load_kernel("dense")
    q, k = torch.zeros(1, 4, 8, 16), torch.zeros(1, 4, 2, 16)
    assert kernel_for("auto", q, k) is load_kernel("flash_cpu")
    assert kernel_for("dense", q, k) is load_kernel("dense")

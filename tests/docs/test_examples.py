"""The Python that the pages show runs as it stands, and gives what they promise."""

import copy
import itertools
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
import torch.distributed as dist

from longctx.attention import dense_attention
from longctx.catalog import LAYOUTS, STRATEGIES
from longctx.config import DataConfig
from longctx.data import open_corpus
from longctx.launcher import cli
from longctx.sequence import Documents, Mask, SequencePlan, unshard
from longctx.sim import Cluster

ROOT = Path(__file__).parents[2]
HEADS, DIM, LENGTHS = 4, 8, [700, 324]


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


def embedding(count: int) -> torch.Tensor:
    return torch.randn(1024, count, HEADS, DIM, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def in_a_model(code: str) -> tuple[torch.Tensor, SequencePlan]:
    """The example on one rank of a cluster, which has joined its process group already: its output, and the plan."""
    tokens = torch.arange(1024)[None]
    table = embedding(3)
    names = {"tokens": tokens, "labels": tokens, "project": lambda ids, positions: table[ids].unbind(2)}
    exec(code.replace('dist.init_process_group("gloo")', "pass"), names)
    return names["out"], names["local"].plan


@pytest.mark.parametrize("page", ["README.md", "docs/howto/own-model.md"])
def test_attention_in_ones_own_model(page):
    ranks = Cluster(4).run(in_a_model, blocks(page)[0])
    q, k, v = embedding(3)[None].unbind(2)
    expected = dense_attention(q, k, v, (Documents.from_lengths(LENGTHS),), Mask())
    torch.testing.assert_close(unshard([out for out, _ in ranks], ranks[0][1]), expected, atol=1e-12, rtol=1e-12)


def train_as_the_page_does(folder: Path) -> tuple[list[float], int, torch.dtype]:
    """All that the page about own models shows, one after the other, on one rank of a cluster."""
    tokens = torch.arange(1024)[None] % 256
    table = embedding(3)
    rows = [(torch.randint(256, (96,), generator=torch.Generator().manual_seed(n)), [n, 96 - n]) for n in (7, 40, 95)]
    names = {"tokens": tokens, "labels": tokens, "rows": rows, "folder": folder}
    names["project"] = lambda ids, positions: table[ids].unbind(2)
    *code, cluster = blocks("docs/howto/own-model.md")
    assert "Cluster(4).run(train_on_rank, batch)" in cluster
    for one in code:
        one = one.replace('dist.init_process_group("gloo")', "pass").replace("num_workers=2", "num_workers=0")
        exec(one, names)
    return [float(loss) for loss in names["losses"]], names["step"], names["logits"].dtype


def test_a_whole_model_of_ones_own_trains_alike_on_any_number_of_ranks(tmp_path):
    found = {world: Cluster(world).run(train_as_the_page_does, tmp_path / str(world)) for world in (1, 4)}
    [(expected, _, _)] = found[1]
    assert len(expected) == 3 and all(loss > 4 for loss in expected)
    for losses, step, dtype in found[4]:
        assert losses == pytest.approx(expected, rel=1e-5) and step == 10 and dtype == torch.bfloat16


def in_a_model_of_transformers(page: str, number: int, directory: Path) -> float:
    tokens = torch.randint(96, (1, 64), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(24), torch.arange(40)])[None]
    names: dict[str, Any] = {"dist": dist, "directory": directory, "input_ids": tokens, "position_ids": positions}
    names["batches"], names["optimizer"] = [(tokens, positions)], MagicMock()
    exec(blocks(page)[number].replace('dist.init_process_group("gloo")', "pass"), names)
    return float(names["loss"])


@pytest.mark.parametrize("page, number", [("README.md", 1), ("docs/howto/transformers.md", 0)])
def test_a_model_of_transformers(page, number, tmp_path):
    pytest.importorskip("transformers", reason="needs the extra hf")
    from tests.huggingface.small_models import saved

    directory = saved("olmo3", tmp_path)
    losses = [Cluster(world).run(in_a_model_of_transformers, page, number, directory) for world in (1, 4)]
    assert losses[1] == pytest.approx(losses[0] * 4, rel=1e-5)


def test_trainer_of_transformers(tmp_path):
    pytest.importorskip("accelerate", reason="Trainer needs accelerate, of the extra hf")
    from tests.huggingface.small_models import published

    rows = [{"input_ids": torch.arange(40) % 7, "labels": torch.arange(40) % 7} for _ in range(16)]
    names: dict[str, Any] = {"group": None, "folder": str(tmp_path), "steps": 2, "rows": rows}
    names["model"] = copy.deepcopy(published("qwen3"))
    exec(blocks("docs/howto/transformers.md")[1], names)
    assert names["trainer"].state.global_step == 2


def test_a_plan():
    names: dict[str, object] = {}
    exec(blocks("docs/concepts/plan.md")[0], names)
    assert names["plan"].balance() >= 1


def test_a_token_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(blocks("docs/data.md")[0], {})
    corpus = open_corpus(DataConfig(source="tokens", path="corpus.bin"), 256)
    assert [bytes(corpus.tokens[:5].tolist()), len(corpus)] == [b"Hello", 2]


def test_planned_attention():
    names: dict[str, object] = {}
    exec(blocks("docs/planner.md")[0], names)
    assert names["made"].cost.imbalance <= 1.02 and names["mine"]


def test_a_simulated_cluster():
    names = {"function": lambda argument: argument + dist.get_rank(), "argument": 1}
    exec(blocks("docs/concepts/simulation.md")[0], names)
    assert names["results"] == list(range(1, 9))


@pytest.fixture
def added(monkeypatch):
    """The strategy and the layout of the page about them, in the catalog as modules of their own."""
    for number, code in enumerate(blocks("docs/howto/add-strategy.md")):
        module = ModuleType(f"added_by_a_page_{number}")
        monkeypatch.setitem(sys.modules, module.__name__, module)
        exec(code, vars(module))
    monkeypatch.setitem(STRATEGIES, "direct", "added_by_a_page_0:DIRECT")
    monkeypatch.setitem(LAYOUTS, "backwards", "added_by_a_page_1:Backwards")


def test_a_strategy_and_a_layout_of_ones_own(added):
    masks = (["--documents", "10,30,23"], ["--window", "9"], ["--non-causal", "--batch", "2"])
    for layout, words in itertools.product(LAYOUTS, masks):
        chosen = ["--strategy", "direct", "--layout", layout, "--world", "3", "--seq", "63", *words]
        assert cli.main(["verify", *chosen, "--heads", "4", "--kv-heads", "2", "--head-dim", "8"]) == 0, chosen

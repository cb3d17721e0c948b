"""What came in goes out: the same bytes under the same names, from the checkpoint of any mesh."""

from __future__ import annotations

import json
import struct
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from longctx.checkpoint.checkpointer import Checkpointer, TrainState
from longctx.config import Config, simulated_world_size
from longctx.huggingface.writing.source import keep_source
from longctx.launcher import build
from longctx.launcher.cli import main
from longctx.launcher.model_directory import with_directory_model
from longctx.mesh import build_mesh
from longctx.sim import Cluster
from tests.huggingface.small_models import CASES, SIZES, published, saved, transformers
from tests.train.small_run import CPU, small_config

SEQ = 64
MESHES: dict[str, dict[str, Any]] = {
    "one": {},
    "tensors": {"parallel": {"sp": 2, "tp": 2}},
    "shards": {"parallel": {"dp_shard": 2, "sp": 2}},
    "stages": {"parallel": {"pp": 2, "sp": 2, "pp_schedule": "gpipe"}, "attention": {"strategy": "gather"}},
}


def raw(directory: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Dtype, shape and bytes of each tensor of a directory, read by nothing of ours."""
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        data = path.read_bytes()
        length = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + length])
        assert header.pop("__metadata__") == {"format": "pt"}
        for name, one in header.items():
            first, last = one["data_offsets"]
            found[name] = (one["dtype"], tuple(one["shape"]), data[8 + length + first : 8 + length + last])
    return found


def configured(directory: Path, tmp_path: Path, mesh: str, **rope: Any) -> Config:
    """The configuration of a run that begins with the directory's weights."""
    section = {**Config().to_dict()["model"], "name": "hf", "path": str(directory)}
    section["rope"] |= rope
    filled = with_directory_model(section, [f"model.rope.{key}" for key in rope])
    config = small_config(
        tmp_path / "run", **{**MESHES[mesh], "train": {"dtype": "float32", "global_batch": 2}, "data": {"seq_len": SEQ}}
    )
    model = Config.from_dict({"model": filled, "data": {"source": "tokens", "path": "none"}}).model
    return replace(config, model=model)


def save(config: Config, step: int) -> None:
    """One rank's part of a checkpoint of the directory's weights."""
    model = build.build_model(config, build_mesh(config.parallel, "cpu"), CPU)
    state = TrainState(model, build.build_optimizer(model, config.optim), None, None, step)
    root = Path(config.run.dir or "") / "checkpoints"
    Checkpointer(root, layout=asdict(config.parallel), config=config.to_dict()).save(step, state)


def checkpointed(config: Config) -> Path:
    """The run's directory, with a checkpoint."""
    run = Path(config.run.dir or "")
    run.mkdir(parents=True, exist_ok=True)
    keep_source(Path(config.model.path or ""), run / "model_source")
    Cluster(simulated_world_size(config)).run(build.run_with_nodes, config, save, config, 3)
    return run


def logits(directory: Path, tokens: torch.Tensor) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(tokens).logits


def test_what_came_in_goes_out_byte_for_byte_from_any_mesh(tmp_path: Path) -> None:
    tokens = torch.randint(SIZES["vocab_size"], (1, SEQ), generator=torch.Generator().manual_seed(3))
    for number, name in enumerate(CASES):
        own = tmp_path / name
        directory = saved(name, own)
        run = checkpointed(configured(directory, own, list(MESHES)[number % len(MESHES)]))
        assert main(["export", "--run", str(run), "--to", str(own / "out"), "--shard-size", "60KB"]) == 0
        assert raw(own / "out") == raw(directory), name
        found = logits(own / "out", tokens)
        with torch.no_grad():
            assert torch.equal(found, published(name)(tokens).logits), name

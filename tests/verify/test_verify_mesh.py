"""``longctx verify --mesh``: what is right passes, a planted mistake fails and is named, misuse is refused."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import Partial

from longctx.config import resolve, simulated_world_size
from longctx.launcher import build, cli, env
from longctx.launcher.compose import compose
from longctx.launcher.verify import mesh as verify_mesh
from longctx.launcher.verify import parity_table as parity_page
from longctx.parallel import tensor
from longctx.sequence import cut
from longctx.train import batch_sharder as border
from longctx.train.canary.comparison import TOLERANCES
from longctx.train.canary.parity import shrink_for_parity
from tests.verify.test_verify_command import without_progress

ROOT = Path(__file__).parents[2]
FIELDS = [
    "backend", "mesh", "strategy", "layout", "dtype", "model", "batch", "steps", "gradients", "weights", "worst",
    "difference", "tolerance", "passed",
]  # fmt: skip
STEP = ["step", "loss", "loss_one_rank", "loss_difference", "grad_norm", "grad_norm_one_rank", "grad_norm_difference"]


def verify(capsys, *words):
    status = cli.main(["verify", "--mesh", *words])
    captured = capsys.readouterr()
    return status, captured.out, without_progress(captured.err)


def verify_json(capsys, *words):
    status, out, err = verify(capsys, "--json", *words)
    assert err == ""
    return status, json.loads(out)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_shared_sequences_and_split_tensors_agree_with_one_rank(capsys, dtype):
    words = ["comm=sim", "parallel.sp=2", "parallel.tp=2", "attention.window=200", "train.global_batch=2"]
    status, report = verify_json(capsys, "--steps", "2", "--dtype", dtype, *words)
    assert status == 0 and report["passed"] is True
    assert list(report) == FIELDS
    assert report["mesh"] == {"dp_replicate": 1, "dp_shard": 1, "sp": 2, "tp": 2, "pp": 1}
    assert (report["dtype"], report["backend"], report["tolerance"]) == (dtype, "sim", TOLERANCES[dtype])
    assert [step["step"] for step in report["steps"]] == [1, 2]
    assert all(list(step) == STEP for step in report["steps"])
    assert report["steps"][0]["loss"] != report["steps"][1]["loss"]
    assert len(report["gradients"]) == len(report["weights"]) == 20
    assert 0 < max(report["gradients"].values()) <= report["difference"] <= report["tolerance"] / 10


def test_the_report_for_people_names_the_mesh_and_every_step(capsys):
    status, out, _ = verify(capsys, "comm=sim", "parallel.dp_shard=2", "train.dtype=bfloat16", "--steps", "3")
    assert status == 0
    assert out.startswith("dp_shard 2 on sim: ring on zigzag, bfloat16\n")
    assert [line.split()[0] for line in out.splitlines()[4:7]] == ["1", "2", "3"]
    assert "2 micro-batches of 1 ×" in out and "passed: " in out


@pytest.mark.gloo
def test_two_processes_agree_with_one_rank(capsys):
    status, report = verify_json(capsys, "parallel.sp=2", "attention=striped", "--steps", "2")
    assert status == 0 and report["passed"] is True
    assert (report["backend"], report["layout"], report["dtype"]) == ("gloo", "striped", "float32")


@pytest.mark.gloo
def test_a_process_settles_the_nodes_and_nics_of_its_run(monkeypatch, tmp_path):
    settled = []
    monkeypatch.setattr(build, "register_nodes", lambda *what: settled.append(what))
    words = ["attention=zeppelin", "cluster.devices_per_node=1", "cluster.nics=2"]
    job = {"config": verify_mesh.prepare(compose(words), 1, 1, 1).to_dict(), "steps": 1}
    verify_mesh.worker([json.dumps(job), str(tmp_path), "0", "1"])
    assert [(nodes, links.nics) for nodes, links in settled] == [([0], 2)]
    assert json.loads((tmp_path / "report.json").read_text())["steps"]


STAGES = ["attention=disaggregated", "attention.server_pool=pipeline", "parallel.pp=2", "parallel.pp_schedule=gpipe"]


@pytest.mark.parametrize("sp", [1, 2])
def test_stages_that_serve_one_another_agree_with_one_rank(capsys, sp):
    words = ["comm=sim", *STAGES, f"parallel.sp={sp}", "--dtype", "float64", "--steps", "2"]
    status, report = verify_json(capsys, *words)
    assert status == 0 and report["passed"] is True and report["mesh"]["pp"] == 2


@pytest.mark.gloo
def test_stages_of_two_processes_serve_one_another(capsys):
    status, report = verify_json(capsys, *STAGES, "--dtype", "float64", "--steps", "2")
    assert status == 0 and report["passed"] is True
    assert (report["backend"], report["mesh"]["pp"]) == ("gloo", 2)


def test_a_rank_that_a_launcher_started_joins_its_world(capsys, monkeypatch):
    for name in (env.RANK, env.WORLD_SIZE, env.LOCAL_RANK, env.MASTER_ADDR, env.MASTER_PORT):
        # Set before it is deleted, so that what the command exports is undone afterwards.
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv(env.WORLD_SIZE, "1")
    for name in (env.MASTER_ADDR, env.MASTER_PORT):
        monkeypatch.delenv(name)
    monkeypatch.setattr(verify_mesh, "on_this_machine", lambda *_: pytest.fail("started a world of its own"))
    status, report = verify_json(capsys, "--steps", "1")
    assert status == 0 and report["passed"] is True
    assert not torch.distributed.is_initialized()


def averaged_gradients(patch):
    patch.setattr(FSDPModule, "set_gradient_divide_factor", lambda self, factor: None)


def shifted_positions(patch):
    def shifted(batch, plan, rank):
        local = cut(batch, plan, rank)
        return replace(local, positions=local.positions + 1) if rank == 1 else local

    patch.setattr(border, "cut", shifted)


def forgotten_decay(patch):
    """Only the mesh's optimizer: the gradients of the first step can't show it."""
    from longctx.train.canary import tiny_run

    right = tiny_run.build_optimizer
    patch.setattr(tiny_run, "build_optimizer", lambda model, config: right(model, replace(config, weight_decay=0.0)))


@pytest.mark.parametrize(
    "mistake,named",
    [
        (averaged_gradients, "gradient norm of step"),
        (shifted_positions, "gradient of blocks."),
        (forgotten_decay, "weight "),
    ],
)
def test_planted_mistakes_fail_and_are_named(capsys, monkeypatch, mistake, named):
    mistake(monkeypatch)
    words = ["comm=sim", "parallel.sp=2", "train.global_batch=1", "optim.weight_decay=0.5", "--steps", "2"]
    status, out, err = verify(capsys, *words)
    assert (status, err) == (70, "")
    verdict = out.splitlines()[-1]
    assert verdict.startswith(f"FAILED: {named}") and "tolerance 1e-04" in verdict
    assert "\n  blocks." in out


def test_the_parameter_whose_gradient_is_not_summed_is_named(capsys, monkeypatch):
    def project(module, rows, x):
        return torch.nn.functional.linear(x.to_local(grad_placements=[Partial()]), module.weight.to_local()[rows])

    monkeypatch.setattr(tensor, "_project_rows", project)
    status, report = verify_json(capsys, "comm=sim", "parallel.tp=4", "train.global_batch=1", "--steps", "1")
    assert status == 70 and report["passed"] is False
    assert report["worst"] in {
        f"gradient of blocks.{layer}.{name}.weight in step 1" for layer in (0, 1) for name in "kv"
    }


def test_numbers_that_are_not_finite_fail_and_are_null(capsys, monkeypatch):
    from longctx.train.canary import tiny_run

    right = tiny_run.TinyRun.gradients

    def gradients(self):
        found = right(self)
        found["norm.weight"][0] = float("nan")
        return found

    monkeypatch.setattr(tiny_run.TinyRun, "gradients", gradients)
    status, report = verify_json(capsys, "comm=sim", "train.global_batch=1", "--steps", "1")
    assert status == 70 and report["gradients"]["norm.weight"] is None and report["difference"] is None
    assert report["worst"] == "gradient of norm.weight in step 1"


@pytest.mark.parametrize(
    "words,status,message",
    [
        (["--mesh", "--strategy", "ring"], 2, "--strategy is for one attention case"),
        (["--mesh", "--non-causal"], 2, "--non-causal is for one attention case"),
        (["--mesh", "--dump", "t.safetensors"], 2, "--dump is for one attention case"),
        (["--mesh", "--all", "parallel.sp=2"], 2, "parallel.sp=2: --all has a configuration of its own"),
        (["--mesh", "--table", "t.md"], 2, "add --all"),
        (["--mesh", "--steps", "0"], 78, "--steps 0 must be at least 1"),
        (["--mesh", "--all", "--steps", "-1"], 78, "--steps -1 must be at least 1"),
        (["--mesh", "parallel.sp=2", "attention=local"], 78, "set parallel.sp=1"),
        (["--mesh", "comm=sim", "parallel.dp_shard=3"], 78, "train.global_batch=4 must be a multiple of 3"),
        (["--mesh", "comm=nccl", "parallel.sp=2"], 69, "a CUDA device for each of 2 processes, this machine has 0"),
        (["--steps", "3"], 2, "--steps 3 is for a whole run; add --mesh"),
        (["parallel.sp=2"], 2, "parallel.sp=2 is for a whole run; add --mesh"),
    ],
)
def test_misuse_is_refused_in_one_line(capsys, monkeypatch, words, status, message):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert cli.main(["verify", *words]) == status
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("longctx: ") and captured.err.count("\n") == 1
    assert message in captured.err


def test_the_shrunken_run_keeps_what_decides_correctness():
    words = [
        "model=llama_1b", "attention=striped", "attention.layout_block=64", "attention.window=4096",
        "parallel.sp=4", "parallel.tp=2", "train.recompute=selective", "train.micro_batch=2", "train.global_batch=24",
        "train.loss_chunk=8192", "train.steps=1000", "optim.warmup_steps=100", "data.seq_len=131072", "comm=sim",
    ]  # fmt: skip
    config = compose(words)
    config = resolve(config, simulated_world_size(config))
    tiny = shrink_for_parity(config, 20)
    for section in ("parallel", "comm", "engine"):
        assert getattr(tiny, section) == getattr(config, section)
    for name in ("heads", "kv_heads", "qk_norm", "tie_embeddings", "rope_theta"):
        assert getattr(tiny.model, name) == getattr(config.model, name)
    assert replace(tiny.attention, layout_block=64, window=4096, chunk=64) == config.attention
    assert 1 < tiny.attention.window < tiny.data.seq_len < 200
    assert (tiny.train.recompute, tiny.train.micro_batch, tiny.train.global_batch) == ("selective", 2, 8)
    assert tiny.train.loss_chunk < tiny.data.seq_len // 4 * tiny.train.micro_batch
    assert replace(tiny.optim, warmup_steps=100, decay_steps=1000, eps=config.optim.eps) == config.optim
    assert (tiny.optim.warmup_steps, tiny.optim.decay_steps) == (2, 20)


def test_the_table_has_a_row_for_each_mesh(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(parity_page, "MESHES", ({}, {"pp": 2}))
    file = tmp_path / "parity.md"
    status, out, err = verify(capsys, "--all", "--steps", "1", "--table", str(file))
    assert (status, err) == (0, "")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines()]
    assert rows[0] == ["mesh", "ring, contiguous", "ring, zigzag", "ring, striped"]
    for row, name in zip(rows[2:], ("one rank", "pp 2"), strict=True):
        assert row[0] == name and all(float(cell) < 1e-12 for cell in row[1:])
    assert out.strip() in file.read_text() and "--steps 1 --dtype float64" in file.read_text()


def test_the_committed_page_has_every_mesh_and_no_failure():
    page = (ROOT / "docs/parity.md").read_text(encoding="utf-8")
    for mesh in parity_page.MESHES:
        name = " × ".join(f"{axis} {degree}" for axis, degree in mesh.items()) or "one rank"
        assert f"\n| {name} |" in page
    assert not re.search(r"^\|.*\*\*", page, re.MULTILINE)  # a cell that failed is bold

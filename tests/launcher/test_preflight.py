"""What a run can hardly mean is told, what it cannot mean is refused, and what could fit is never refused."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest

from longctx.config import resolve, simulated_world_size
from longctx.config.sections.linear import LinearConfig
from longctx.data import Corpus
from longctx.errors import ConfigError
from longctx.launcher.compose import compose
from longctx.launcher.preflight import Device, Facts, device_here, device_of_job, look, look_at_rate
from longctx.launcher.preflight.memory import GIB, memory_floor, parameters_of
from longctx.launcher.preflight.rules import RULES
from tests.train.small_run import small_config, train_on_sim


def facts(*words, corpus=None, device=None, resuming=False):
    config = compose(words)
    return Facts(resolve(config, simulated_world_size(config)), corpus, device, resuming)


def documents(*lengths):
    bounds = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Corpus(np.zeros(int(bounds[-1]), dtype=np.uint8), bounds, str, 256, "test")


def found(some):
    return [finding for rule in RULES if (finding := rule(some)) is not None]


JOB = Device(80 * GIB, "assumed")
REFUSED, TOLD = True, False
CASES = {
    "warm-up of all steps": (
        ["train.steps=20", "optim.warmup_steps=20"], {}, REFUSED, ["optim.warmup_steps=20", "step 20", "which is 2"],
    ),
    "warm-up into the decay": (
        ["train.steps=20", "optim.schedule=wsd", "optim.decay_steps=15", "optim.warmup_steps=8"], {}, REFUSED,
        ["optim.warmup_steps=8", "wsd"],
    ),
    "warm-up longer than the run": (
        ["train.steps=20", "optim.schedule=constant", "optim.warmup_steps=30"], {}, REFUSED, ["constant"],
    ),
    "a part of a long schedule": (
        ["train.steps=20", "optim.decay_steps=1000"], {}, TOLD, ["train.steps=20 ends within optim.warmup_steps=100"],
    ),
    "no floor": (["optim.min_lr_ratio=1.0"], {}, TOLD, ["optim.schedule=constant"]),
    "the rate of a small model": (
        ["model=llama_8b", "optim.lr=3e-3", "data=tokens", "data.path=x"], {}, TOLD,
        ["optim.lr=0.003", "8.03B", "0.0006"],
    ),
    "a job without GPUs": (
        ["cluster=slurm"], {}, TOLD, ["comm=gloo", "no GPU", "comm=nccl", "8 on each node"],
    ),
    "a rate of nothing": (["optim.lr=3e-9"], {}, TOLD, ["optim.lr=3e-09"]),
    "bytes into many words": (
        ["model=llama_8b"], {}, TOLD, ["model.vocab_size=128256", "256 ids", "1.05B parameters", "data.tokenizer"],
    ),
    "short data": (
        ["train.steps=1"], {"corpus": documents(900, 100)}, TOLD, ["4,096 tokens a step", "1,000", "4.1 times"],
    ),
    "many epochs": (
        ["train.steps=100", "data.seq_len=64"], {"corpus": documents(*[100] * 20)}, TOLD,
        ["12.8 times", "train.steps=31"],
    ),
    "short documents": (
        ["train.steps=1", "data.seq_len=256"], {"corpus": documents(*[100] * 40)}, TOLD,
        ["longest document has 100", "document_mask", "data.seq_len=128"],
    ),
    "a window over all": (["attention.window=1024"], {}, TOLD, ["attention.window=1024", "attention.window=null"]),
    "a small base": (["data.seq_len=131072"], {}, TOLD, ["model.rope_theta=10000", "131,072", "9e+06"]),
    "saves beyond the end": (["checkpoint.every=500"], {}, TOLD,
        ["checkpoint.every=500", "train.steps=100", "only the end"]),
    "fp32 on GPUs": (
        ["comm=nccl", "train.dtype=float32", "data.seq_len=8192"], {}, TOLD,
        ["dense kernel", "0.2 GiB", "train.dtype=bfloat16"],
    ),
    "an odd head": (["comm=nccl", "model.head_dim=36"], {}, TOLD, ["head_dim 36", "dense kernel", "multiple of 8"]),
    "an odd vocabulary": (
        ["comm=nccl", "model.vocab_size=50257", "data=tokens", "data.path=x"], {}, TOLD, ["model.vocab_size=50304"],
    ),
    "16 bits on a CPU": (["train.dtype=bfloat16"], {}, TOLD, ["comm=gloo", "train.dtype=float32"]),
    "64 bits on a GPU": (["comm=nccl", "train.dtype=float64"], {}, TOLD, ["float64", "train.dtype=bfloat16"]),
    "small shares": (["comm=nccl", "parallel.sp=8"], {}, TOLD, ["parallel.sp=8", "128 tokens", "parallel.sp=1,"]),
    "tensors across nodes": (
        ["parallel.tp=4", "cluster.devices_per_node=2", "model.kv_heads=4", "model.name=x"], {}, TOLD,
        ["parallel.tp=2"],
    ),
    "an idle pipeline": (
        ["parallel.pp=4", "parallel.pp_schedule=gpipe", "train.global_batch=1"], {}, TOLD,
        ["idle for 75%", "train.global_batch=4"],
    ),
    "70B on one node": (
        ["model=llama_70b", "comm=nccl", "parallel.sp=8", "data.seq_len=1048576", "data=tokens", "data.path=x"],
        {"device": JOB}, REFUSED,
        ["model=llama_70b", "each of 8 ranks", "98.6",
         "80.0 GiB (assumed)", "4 times as many ranks with parallel.sp=32 train.recompute_keep=[]"],
    ),
    "a lever is enough": (
        ["model=llama_8b", "comm=nccl", "parallel.sp=8", "data.seq_len=524288", "train.recompute=none"],
        {"device": JOB}, REFUSED, ["nearest: train.recompute=full"],
    ),
    "replicas": (
        ["model=llama_8b", "comm=nccl", "parallel.dp_replicate=8"], {"device": JOB}, REFUSED,
        ["nearest: parallel.dp_replicate=1 parallel.dp_shard=8"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_it_is_found_and_says_value_and_nearest_choice(case):
    words, known, refused, said = CASES[case]
    words = [*words, "train.global_batch=8"] if "parallel.dp_replicate=8" in words else words
    findings = [one for one in found(facts(*words, **known)) if said[0] in one.words]
    assert findings, [one.words for one in found(facts(*words, **known))]
    (finding,) = findings
    assert finding.refused == refused and "nearest: " in finding.words and "\n" not in finding.words
    for word in said:
        assert word in finding.words, finding.words


@pytest.mark.parametrize("words", [
    [],
    ["recipe=demo"],
    ["model=small", "train.steps=2000"],
    ["train.steps=1"],
    ["train.steps=5", "optim.schedule=wsd"],
    ["model=llama_8b", "comm=nccl", "parallel.sp=8", "data.seq_len=8192", "data=tokens", "data.path=x"],
    ["model=llama_70b", "comm=nccl", "parallel.sp=64", "data.seq_len=131072", "data=tokens", "data.path=x",
     "model.rope_theta=8e6"],
])  # fmt: skip
def test_what_people_mean_passes_without_a_word(words):
    assert found(facts(*words, corpus=documents(*[100_000] * 2000), device=JOB)) == []


def test_all_is_told_together_and_a_refusal_names_all_reasons(caplog, capsys):
    look(facts("model=llama_1b", "comm=nccl", "optim.lr=2e-4", "checkpoint.every=500"))
    assert [message[:9] for message in caplog.messages] == ["warning: "] * 2
    told = capsys.readouterr().err.splitlines()
    assert told == [
        "model=llama_1b brings optim.lr=0.0004 (yours: 0.0002), train.recompute=selective",
        "comm=nccl brings train.dtype=bfloat16",
        "lr: warm-up to 0.0002 at step 10, cosine to 2e-05 at step 100",
    ]
    with pytest.raises(ConfigError, match=re.compile("warmup_steps=200.*; and model=llama_70b", re.DOTALL)):
        look(facts("model=llama_70b", "comm=nccl", "optim.warmup_steps=200", device=JOB))


def test_what_was_accepted_once_goes_on():
    some = facts("train.steps=20", "optim.warmup_steps=20", resuming=True)
    (finding,) = [one for one in found(some) if "warmup" in one.words]
    assert not finding.refused


@pytest.mark.parametrize("schedule, words, said", [
    ("cosine", [], None),
    ("cosine", ["optim.decay_steps=48"], r"step 25 has optim.lr 0.00\d+, and had 0.0003"),
    ("wsd", [], "step 25 has optim.lr 0.003, and had 0.0003 .* checkpoint before it, with --step"),
    ("constant", [], None),
])  # fmt: skip
def test_more_steps_never_raise_the_rate_in_silence(caplog, schedule, words, said):
    recorded = facts(f"optim.schedule={schedule}", "train.steps=24").config
    more = replace(recorded, train=replace(recorded.train, steps=48))
    for word in words:
        key, _, value = word.removeprefix("optim.").partition("=")
        more = replace(more, optim=replace(more.optim, **{key: int(value)}))
    look_at_rate(recorded, resolve(more, 1), 24)
    assert (not caplog.messages) if said is None else re.search(said, caplog.text)


MEASURED = {
    "one rank": {},
    "sharded": {"parallel": {"sp": 2}, "train": {"micro_batch": 2}},
    "recompute": {"parallel": {"sp": 2}, "train": {"recompute": "full", "dtype": "float32"}},
    "selective": {"train": {"recompute": "selective", "dtype": "float32"}},
    "tensors": {"parallel": {"tp": 2}, "train": {"dtype": "float32"}, "data": {"seq_len": 256}},
    "hybrid": {
        "model": {
            "pattern": "LS", "mixer": "gated_deltanet",
            "linear": LinearConfig(key_heads=2, value_heads=8, key_head_dim=24, value_head_dim=48),
        },
        "parallel": {"sp": 2}, "attention": {"chunk": 16},
    },
    "stages": {"parallel": {"pp": 2}, "train": {"dtype": "bfloat16"}},
}  # fmt: skip


@pytest.mark.parametrize("case", MEASURED)
def test_the_bound_is_below_what_a_run_takes(case, tmp_path):
    """By category, on the fullest rank: never above, and for what matters not far below."""
    sections = {name: dict(fields) for name, fields in MEASURED[case].items()}
    sections["train"] = {**sections.get("train", {}), "steps": 2}
    config = small_config(tmp_path, **sections, logger={"memory": True})
    floor = memory_floor(config, parameters_of(config.model))
    train_on_sim(config)
    ranks = json.loads((tmp_path / "memory.json").read_text())["ranks"]
    assert floor.total <= max(rank["peak"] for rank in ranks)
    assert floor.weights <= max(rank["parameters"] + rank["optimizer"] for rank in ranks)
    assert floor.weights > 0.6 * max(rank["parameters"] + rank["optimizer"] for rank in ranks)
    assert floor.activations <= max(rank["activations"] for rank in ranks)


def test_memory_is_known_where_it_can_be():
    on_cpu, job = facts("parallel.sp=2", "comm=sim").config, facts("comm=nccl").config
    assert 0 < device_here(on_cpu).memory <= device_here(facts().config).memory
    assert device_here(facts("parallel.sp=2").config) is None
    assert device_of_job(job).memory == 80 * GIB and "cluster.device_memory" in device_of_job(job).known_by
    stated = facts("comm=nccl", "cluster.device_memory=141").config
    assert device_here(stated).memory == device_of_job(stated).memory == 141 * GIB
    assert device_of_job(on_cpu) is None

"""Rules of pipelines: what a schedule wants of stages, micro-batches and levers, and of stages that serve."""

import pytest
import yaml

from longctx.config import Config, resolve
from longctx.errors import ConfigError


@pytest.mark.parametrize(
    ("schedule", "virtual", "words"),
    [
        ("interleaved_1f1b", 1, ["at least 2 stages per rank", "nearest valid value: 2"]),
        ("zbv", 3, ["zbv has 2 stages per rank"]),
        ("dualpipev", 1, ["dualpipev has 2 stages per rank"]),
    ],
)
def test_each_schedule_has_its_number_of_stages(schedule, virtual, words):
    with pytest.raises(ConfigError) as refused:
        Config.from_dict({"parallel": {"pp_schedule": schedule, "pp_virtual": virtual}})
    for word in words:
        assert word in str(refused.value)


def test_stages_count_virtual_ones_against_layers():
    with pytest.raises(
        ConfigError, match=r"parallel\.pp=4 with 2 stages per rank .* 8 stages.*layers=4.*parallel\.pp=2"
    ):
        Config.from_dict({"parallel": {"pp": 4, "pp_schedule": "zbv"}})
    assert Config.from_dict({"parallel": {"pp": 2, "pp_schedule": "zbv"}}).parallel.stages == 4
    assert Config().parallel.stages == 1


SCHEDULES = [
    ("1f1b", None),
    ("gpipe", 1),
    ("interleaved_1f1b", None),
    ("interleaved_1f1b", 3),
    ("zbv", 2),
    ("zbv", None),
]


@pytest.mark.parametrize("layers", range(1, 6))
@pytest.mark.parametrize("pp", [2, 3, 8])
@pytest.mark.parametrize(("schedule", "virtual"), SCHEDULES)
def test_the_pipeline_that_a_refusal_names_is_taken(layers, pp, schedule, virtual):
    given = {"pp": pp, "pp_schedule": schedule, "pp_virtual": virtual}
    try:
        Config.from_dict({"model": {"layers": layers}, "parallel": given})
    except ConfigError as refused:
        advice = str(refused).split("nearest valid: ")[1].replace(" and ", " with ").split(" with ")
        words = dict(word.removeprefix("parallel.").split("=") for word in advice)
        named = {name: yaml.safe_load(value) for name, value in words.items()}
        Config.from_dict({"model": {"layers": layers}, "parallel": given | named})


@pytest.mark.parametrize(
    "given", [{"pp_schedule": "zbv"}, {"pp_schedule": "interleaved_1f1b", "pp_virtual": 3}], ids=str
)
def test_a_schedule_without_a_pipeline_is_refused(given):
    with pytest.raises(ConfigError, match=r"parallel\.pp=1 has none; set parallel\.pp=2"):
        Config.from_dict({"parallel": given})


@pytest.mark.parametrize("schedule", ["zbv", "dualpipev"])
@pytest.mark.parametrize(("name", "value"), [("recompute", "full"), ("mlp_chunk", 64), ("compile", True)])
def test_a_split_backward_takes_no_recompute_tiles_or_compile(schedule, name, value):
    mapping = {"parallel": {"pp": 2, "pp_schedule": schedule}, "train": {name: value}}
    with pytest.raises(
        ConfigError, match=rf"train\.{name}={str(value).lower()} with parallel\.pp_schedule={schedule}.*nearest"
    ):
        Config.from_dict(mapping)
    Config.from_dict({**mapping, "parallel": {"pp": 2, "pp_schedule": "interleaved_1f1b"}})


@pytest.mark.parametrize(
    ("schedule", "batch", "nearest"),
    [("1f1b", 2, 8), ("interleaved_1f1b", 22, 24), ("dualpipev", 14, 16), ("gpipe", 2, None), ("zbv", 2, None)],
)
def test_schedules_need_their_microbatches(schedule, batch, nearest):
    """Four stages' ranks, two data-parallel groups of one sequence per micro-batch."""
    config = Config.from_dict(
        {
            "model": {"layers": 8},
            "parallel": {"pp": 4, "pp_schedule": schedule},
            "train": {"global_batch": batch},
        }
    )
    if nearest is None:
        assert resolve(config, 8).parallel.dp_shard == 2
        return
    with pytest.raises(ConfigError, match=rf"global_batch={batch} is {batch // 2} .*nearest valid value: {nearest}$"):
        resolve(config, 8)
    resolve(Config.from_dict({**config.to_dict(), "train": {"global_batch": nearest}}), 8)


SERVED = {
    "attention": {"strategy": "disaggregated", "server_pool": "pipeline"},
    "parallel": {"pp": 2, "pp_schedule": "gpipe"},
    "train": {"micro_batch": 2, "recompute": "full"},
}


@pytest.mark.parametrize("strategy", ["disaggregated", "zeppelin"])
@pytest.mark.parametrize("kept", [None, ["attention"], ["attention", "products"]])
def test_stages_may_serve_one_another(strategy, kept):
    attention = {**SERVED["attention"], "strategy": strategy}
    train = {**SERVED["train"], "recompute_keep": kept}
    assert Config.from_dict({**SERVED, "attention": attention, "train": train}).attention.server_pool == "pipeline"


@pytest.mark.parametrize(
    ("section", "fields", "told"),
    [
        (
            "attention",
            {"server_pool": "stages"},
            r"server_pool=stages is not known; .*valid: sequence, pipeline",
        ),
        ("attention", {"strategy": "ring"}, "attention.strategy=ring has no servers; nearest valid: attention=disagg"),
        ("attention", {"ping_pong": True}, "a tick has one; nearest valid: attention.ping_pong=false"),
        ("parallel", {"pp": 1, "pp_schedule": "1f1b"}, "no other stages; nearest valid: .*pp=2 with .*=gpipe"),
        ("parallel", {"pp_schedule": "1f1b"}, "pp_schedule=1f1b has stages in both.*nearest valid: .*=gpipe"),
        ("parallel", {"pp_schedule": "interleaved_1f1b"}, "nearest valid: parallel.pp_schedule=gpipe"),
        ("parallel", {"pp_schedule": "zbv"}, "nearest valid: parallel.pp_schedule=gpipe, or attention.server_pool=seq"),
        ("parallel", {"pp_schedule": "dualpipev"}, "nearest valid: parallel.pp_schedule=gpipe"),
        ("train", {"compile": True}, "nearest valid: train.compile=false"),
        ("train", {"recompute_keep": []}, r"recompute_keep=\[\] would run attention again.*keep=\[attention\]"),
        ("train", {"recompute_keep": ["products"]}, r"nearest valid: train\.recompute_keep=\[attention\]"),
        ("train", {"recompute_keep": ["attention_half"]}, r"nearest valid: train\.recompute_keep=\[attention\]"),
    ],
)
def test_stages_that_serve_one_another_go_in_step(section, fields, told):
    with pytest.raises(ConfigError, match=told):
        Config.from_dict({**SERVED, section: {**SERVED[section], **fields}})

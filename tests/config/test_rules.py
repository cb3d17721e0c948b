"""Every rule refuses with the value, the rule and a valid choice; what is not built says so."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longctx.catalog import LAYOUTS, STRATEGIES
from longctx.config import Config, resolve, simulated_world_size
from longctx.config.sections.train import DTYPES
from longctx.errors import ConfigError


def with_value(path: str, value: object) -> Config:
    section, name = path.split(".")
    return Config.from_dict({section: {name: value}})


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("model.kv_heads", 3, ["model.kv_heads=3", "model.heads=4", "2 or 4"]),
        ("model.head_dim", 33, ["model.head_dim=33", "even", "32 or 34"]),
        ("model.head_dim", 1, ["model.head_dim=1", "even", "nearest valid head_dim: 2"]),
        ("model.linear", {"norm": "pre"}, ["model.linear is of linear layers", "model.pattern=S has none"]),
        (
            "model.linear",
            {"conv_taps": 3},
            ["model.linear.conv_taps=3 is not read by model.mixer=null", "gated_deltanet"],
        ),
        ("model.layers", 0, ["model.layers=0", "at least 1"]),
        ("model.vocab_size", 200, ["model.vocab_size=200", "at least 256"]),
        ("model.norm_eps", 0.0, ["model.norm_eps=0.0", "greater than 0"]),
        ("attention.strategy", "stripd", ["attention.strategy=stripd", "did you mean striped?", "ring"]),
        ("attention.layout", "zig-zag", ["did you mean zigzag?", "contiguous"]),
        ("attention.layout_block", 0, ["attention.layout_block=0", "at least 1"]),
        ("attention.window", 0, ["attention.window=0", "at least 1"]),
        ("attention.ulysses_degree", 0, ["attention.ulysses_degree=0", "at least 1", "nearest valid value: null"]),
        ("attention.inner_ring", 0, ["attention.inner_ring=0", "at least 1", "nearest valid value: null"]),
        ("attention.grad_dtype", "bf16", ["attention.grad_dtype=bf16", "valid: fp32, compute"]),
        ("attention.backward_rotates", "kq", ["attention.backward_rotates=kq", "auto, kv, q"]),
        ("attention.server_pool", "all", ["attention.server_pool=all", "sequence, pipeline"]),
        ("attention.chunk", 0, ["attention.chunk=0", "at least 1", "nearest valid value: 64"]),
        ("parallel.sp", 0, ["parallel.sp=0", "at least 1"]),
        ("parallel.dp_shard", 0, ["parallel.dp_shard=0", "-1"]),
        ("parallel.dp_shard", -2, ["parallel.dp_shard=-2", "-1"]),
        ("parallel.pp_schedule", "zb", ["parallel.pp_schedule=zb", "gpipe, 1f1b, interleaved_1f1b, zbv, dualpipev"]),
        ("parallel.pp_virtual", 2, ["parallel.pp_virtual=2", "1f1b has 1 stage per rank", "nearest valid value: 1"]),
        ("parallel.pp", 8, ["parallel.pp=8", "8 stages", "model.layers=4", "nearest valid: parallel.pp=4"]),
        ("comm.backend", "mpi", ["comm.backend=mpi", "nccl, gloo, sim"]),
        ("comm.timeout_seconds", 0, ["comm.timeout_seconds=0.0", "nearest valid value: 0.001"]),
        ("comm.timeout_seconds", 1e14, ["comm.timeout_seconds=100000000000000.0", "nearest valid value: 1000000000.0"]),
        ("comm.shuffle_seed", 1, ["comm.shuffle_seed=1", "comm=sim"]),
        ("data.source", "parqet", ["data.source=parqet", "did you mean parquet?", "tokens"]),
        ("data.source", "text", ["data.path=null", "data=text"]),
        ("data.path", "corpus", ["data.path=corpus", "not read by data=python_stdlib"]),
        ("data.text_key", "body", ["data.text_key=body", "not read by data=python_stdlib", "data=text", "at text"]),
        ("data.token_dtype", "uint32", ["data.token_dtype=uint32", "not read by data=python_stdlib", "data=tokens"]),
        ("attention.kernel", "flash", ["attention.kernel=flash", "auto"]),
        ("data.token_dtype", "int16", ["did you mean uint16?"]),
        ("data.balance", "row", ["data.balance=row", "did you mean rows?", "documents"]),
        ("data.seq_len", 0, ["data.seq_len=0", "nearest valid value: 1"]),
        ("optim.lr", 0.0, ["optim.lr=0.0"]),
        ("optim.lr", -1, ["optim.lr=-1.0"]),
        ("optim.beta2", 1.0, ["optim.beta2=1.0", "[0.0, 1.0)"]),
        ("optim.min_lr_ratio", 2.0, ["optim.min_lr_ratio=2.0", "nearest valid value: 1.0"]),
        ("optim.grad_clip", 0.0, ["optim.grad_clip=0.0"]),
        ("optim.name", "sgd", ["optim.name=sgd", "adamw"]),
        ("train.dtype", "float16", ["train.dtype=float16", "bfloat16"]),
        ("train.recompute", "ful", ["did you mean full?"]),
        ("train.mlp_chunk", 0, ["train.mlp_chunk=0", "at least 1"]),
        ("train.recompute_keep", ["atention"], ["did you mean attention?", "products"]),
        ("train.recompute_keep", [], ["train.recompute_keep=[]", "recompute=none", "set train.recompute=full"]),
        ("train.offload", True, ["train.offload=true", "train.recompute=none", "selective"]),
        ("train.seed", -1, ["train.seed=-1"]),
        ("train.global_batch", 0, ["train.global_batch=0"]),
        ("checkpoint.every", -1, ["checkpoint.every=-1"]),
        ("engine.name", "natve", ["engine=natve", "did you mean native?"]),
        ("cluster.nodes", 0, ["cluster.nodes=0"]),
        ("cluster.devices_per_node", 0, ["cluster.devices_per_node=0"]),
        ("cluster.nics", 0, ["cluster.nics=0", "at least 1"]),
        ("cluster.nics", 4, ["cluster.nics=4", "disaggregated and zeppelin", "strategy=ring", "cluster.nics=1"]),
        ("cluster.nic_bandwidth", 0.0, ["cluster.nic_bandwidth=0.0", "greater than 0"]),
        ("cluster.link_bandwidth", 9e11, ["cluster.link_bandwidth=9", "cluster.nics=1", "leave"]),
        ("cluster.time_limit", "soon", ["cluster.time_limit=soon", "24:00:00"]),
        ("logger.wandb", "on", ["logger.wandb=on", "online"]),
    ],
)
def test_refusal_names_value_rule_and_choice(path, value, words):
    with pytest.raises(ConfigError) as refused:
        with_value(path, value)
    for word in words:
        assert word in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["deepspeed", "megatron"])
def test_engines_that_do_not_exist_are_unknown(name):
    with pytest.raises(ConfigError, match=rf"engine={name} is not known; valid: native"):
        with_value("engine.name", name)


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        ("attention.travel", "narrow", "attention.travel is now attention.grad_dtype; .*narrow is now compute"),
        (
            "attention.backward",
            "keys",
            "attention.backward is now attention.backward_rotates; keys is now kv; queries is",
        ),
        ("attention.inner", 2, "attention.inner is now attention.ulysses_degree or attention.inner_ring"),
        ("attention.servers", "pipeline", "attention.servers is now attention.server_pool"),
        ("attention.grad_dtype", "narrow", "attention.grad_dtype: narrow is now compute"),
        ("attention.backward_rotates", "queries", "attention.backward_rotates: queries is now q"),
        ("train.recompute_keep", ["attention_tail"], "train.recompute_keep: attention_tail is now attention_half"),
        ("logger.trace", True, "logger.trace is gone"),
    ],
)
def test_names_of_earlier_versions_are_refused_with_todays(path, value, told):
    with pytest.raises(ConfigError, match=told):
        with_value(path, value)


def test_a_run_of_an_earlier_version_is_read_in_todays_names():
    old = {"strategy": "usp", "inner": 2, "backward": "auto", "travel": "narrow", "servers": "sequence"}
    train = {"recompute": "full", "recompute_keep": ["attention_tail", "products"]}
    config = Config.from_run({"attention": old, "train": train, "logger": {"trace": False}})
    assert config == Config.from_dict(
        {
            "attention": {"strategy": "usp", "ulysses_degree": 2, "grad_dtype": "compute"},
            "train": {"recompute": "full", "recompute_keep": ["attention_half", "products"]},
        }
    )
    assert Config.from_run({"attention": {"strategy": "burst", "inner": 4}}).attention.inner_ring == 4
    assert Config.from_run({"attention": {"strategy": "ring", "inner": None}}) == Config()
    with pytest.raises(ConfigError, match=r"unknown configuration key attention\.wide"):
        Config.from_run({"attention": {"wide": 1}})
    with pytest.raises(ConfigError, match="must be a mapping"):
        Config.from_run([])


@pytest.mark.parametrize(
    ("path", "values"),
    [
        ("attention.strategy", STRATEGIES),
        ("attention.layout", LAYOUTS),
        ("train.dtype", DTYPES),
        ("data.balance", ("none", "rows", "documents")),
    ],
)
def test_valid_names_are_taken(path, values):
    for value in values:
        with_value(path, value)


def test_an_option_of_another_source_is_refused_and_of_its_own_taken():
    Config.from_dict({"data": {"source": "text", "path": "x", "text_key": "body"}})
    Config.from_dict({"data": {"source": "tokens", "path": "x", "token_dtype": "uint32"}})
    with pytest.raises(ConfigError, match=r"data\.text_key=body is not read by data=tokens"):
        Config.from_dict({"data": {"source": "tokens", "path": "x", "text_key": "body"}})
    with pytest.raises(ConfigError, match=r"data\.token_dtype=uint32 is not read by data=text"):
        Config.from_dict({"data": {"source": "text", "path": "x", "token_dtype": "uint32"}})


@pytest.mark.parametrize(
    ("model", "tp", "words"),
    [
        (
            {},
            3,
            ["parallel.tp=3 must divide model.heads=4", "for this model: 2 or 4"],
        ),
        ({"hidden_dim": 381}, 2, ["model.hidden_dim=381", "model.hidden_dim: 380 or 382", "for this model: 1"]),
        ({"vocab_size": 258}, 4, ["model.vocab_size=258", "model.vocab_size: 256 or 260", "for this model: 1 or 2"]),
        (
            {"heads": 12, "kv_heads": 6, "head_dim": 8},
            4,
            ["parallel.tp=4 must divide model.kv_heads=6, or be a multiple of it", "for this model: 1 or 2"],
        ),
    ],
)
def test_tensor_parallelism_that_leaves_unequal_parts_is_refused(model, tp, words):
    with pytest.raises(ConfigError) as refused:
        Config.from_dict({"model": model, "parallel": {"tp": tp}})
    for word in words:
        assert word in str(refused.value)


@pytest.mark.parametrize(("tp", "heads"), [(1, (4, 2)), (2, (2, 1)), (4, (1, 1))])
def test_fewer_key_value_heads_than_ranks_are_shared(tp, heads):
    assert Config.from_dict({"parallel": {"tp": tp}}).local_heads == heads


@given(st.integers(1, 64), st.sampled_from([-1, 1, 2, 3, 4]), st.integers(1, 8), st.integers(1, 3))
def test_resolved_meshes_fill_the_world_and_divide_the_batch(world, dp_shard, sp, micro_batch):
    mapping = {
        "parallel": {"dp_shard": dp_shard, "sp": sp},
        "train": {"global_batch": 24, "micro_batch": micro_batch},
    }
    config = Config.from_dict(mapping)
    shards = world / sp if dp_shard == -1 else dp_shard
    valid = shards * sp == world and shards == int(shards) and 24 % (int(shards) * micro_batch) == 0
    if not valid:
        with pytest.raises(ConfigError, match="nearest valid"):
            resolve(config, world)
        return
    parallel = resolve(config, world).parallel
    assert parallel.dp_shard == shards
    assert parallel.dp_shard * parallel.sp == world
    # Resolving twice changes nothing: every rank resolves what the launcher has resolved.
    assert resolve(resolve(config, world), world) == resolve(config, world)


def test_impossible_world_names_product_world_and_degrees():
    config = Config.from_dict({"parallel": {"sp": 3}})
    with pytest.raises(ConfigError) as refused:
        resolve(config, 8)
    for word in ("sp 3", "= 3", "8 processes", "parallel.sp=2 or 4"):
        assert word in str(refused.value)


def test_batch_that_does_not_divide_names_its_neighbours():
    config = Config.from_dict({"train": {"global_batch": 7, "micro_batch": 2}})
    with pytest.raises(ConfigError, match=r"train\.global_batch=7 must be a multiple of 4 .*: 4 or 8"):
        resolve(config, 2)


def test_simulated_world_is_the_product_of_the_degrees():
    assert simulated_world_size(Config.from_dict({"parallel": {"sp": 4}})) == 4
    assert simulated_world_size(Config.from_dict({"parallel": {"sp": 4, "dp_shard": 2}})) == 8


@pytest.mark.parametrize("lever", [{"mlp_chunk": 8}, {"offload": True, "recompute": "full"}], ids=str)
def test_levers_that_break_a_graph_are_refused_under_compilation(lever):
    (name, *_) = lever
    with pytest.raises(ConfigError, match=rf"train\.{name}=.*train\.compile=false"):
        Config.from_dict({"train": {"compile": True, **lever}})
    Config.from_dict({"train": lever})


def layered(pattern, mixer=None, **attention):
    return Config.from_dict({"model": {"pattern": pattern, "mixer": mixer}, "attention": attention})


def test_half_of_softmax_attention_is_kept_where_there_is_some():
    train = {"recompute": "full", "recompute_keep": ["attention_half"]}
    model = {"pattern": "L", "mixer": "retnet"}
    with pytest.raises(ConfigError, match=r"pattern=L has none; nearest valid: train\.recompute_keep=\[attention\]"):
        Config.from_dict({"model": model, "attention": {"strategy": "lasp2"}, "train": train})


def test_a_size_that_no_mixer_reads_is_no_number_to_correct():
    with pytest.raises(ConfigError, match=r"mixer_block=0 is not read by .*mixer=moba or rat, .*mixer_block at null"):
        Config.from_dict({"model": {"mixer_block": 0}})


def test_a_pattern_is_repeated_over_the_layers():
    config = Config.from_dict({"model": {"pattern": "LLS", "mixer": "retnet", "layers": 7}})
    assert config.model.kinds == "LLSLLSL"
    assert config.linear_strategy == "lasp2"
    assert layered("L", "gla", strategy="lasp").linear_strategy == "lasp"
    assert layered("LS", "gla", linear="headwise").linear_strategy == "headwise"


@pytest.mark.parametrize(
    ("pattern", "mixer", "attention", "told"),
    [
        ("LX", "retnet", {}, r"model\.pattern=LX must be made of S .* and L .*nearest valid: L$"),
        ("LLLLS", "retnet", {}, r"longer than model\.layers=4; nearest valid: model\.layers=5, or model\.pattern=LLLL"),
        ("LS", None, {}, r"model\.mixer=null: model\.pattern=LS has linear layers.*nearest valid: basic"),
        ("S", "retnet", {}, r"model\.mixer=retnet: model\.pattern=S has no linear layer.*nearest valid: null"),
        ("LS", "retnett", {}, r"model\.mixer=retnett is not known; did you mean retnet"),
        ("LS", "retnet", {"strategy": "lasp2"}, r"strategy=lasp2 .*softmax layers.*ring with attention\.linear=lasp2"),
        ("S", None, {"strategy": "lasp2"}, r"has softmax layers; nearest valid: attention\.strategy=ring"),
        ("L", "retnet", {"strategy": "ring"}, r"is for softmax .*nearest valid: attention=lasp2"),
        ("S", None, {"linear": "lasp"}, r"linear=lasp is for linear layers.*linear at null"),
        ("S", None, {"chunk": 16}, r"attention\.chunk=16 is for linear layers.*at 64"),
        ("L", "gla", {"strategy": "lasp", "window": 4}, r"attention\.window=4 is for softmax layers.*at null"),
        ("L", "gla", {"strategy": "lasp", "linear": "lasp2"}, r"linear=lasp2: .*lasp says already.*linear at null"),
    ],
)  # fmt: skip
def test_layers_of_a_kind_take_what_is_theirs(pattern, mixer, attention, told):
    with pytest.raises(ConfigError, match=told):
        layered(pattern, mixer, **attention)


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"attention": {"document_mask": False}}, r"attention\.document_mask=false all rows have the same work"),
        (
            {"model": {"pattern": "L", "mixer": "gla"}, "attention": {"strategy": "lasp"}},
            r"model\.pattern=L has no softmax layer",
        ),
    ],
)
def test_balance_is_for_rows_of_different_work(sections, told):
    with pytest.raises(ConfigError, match=rf"data\.balance=rows: .*{told}.*nearest valid: data\.balance=none"):
        Config.from_dict({"data": {"balance": "rows"}, **sections})


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (
            {"mixer": "retnet", "mixer_block": 4},
            r"mixer_block=4 is not read by model\.mixer=retnet; set model\.mixer=moba or rat.*mixer_block at null",
        ),
        (
            {"mixer": "rat", "mixer_top_k": 2},
            r"mixer_top_k=2 is not read by .*mixer=rat; .*mixer=moba, .*mixer_top_k at null",
        ),
        ({"mixer": "moba", "mixer_block": 0}, r"model\.mixer_block=0 must be at least 1"),
    ],
)
def test_sizes_of_mixers_are_for_those_that_come_in_sizes(model, told):
    with pytest.raises(ConfigError, match=told):
        Config.from_dict({"model": {"pattern": "LS", **model}})


@pytest.mark.parametrize(
    ("attention", "train", "told"),
    [
        ({"strategy": "ring"}, {"micro_batch": 2}, "takes attention.strategy=disaggregated apart, got ring"),
        ({"strategy": "disaggregated"}, {"micro_batch": 3}, "must be even; nearest valid: 2 or 4"),
        ({"strategy": "disaggregated"}, {"micro_batch": 2, "compile": True}, "set train.compile=false"),
    ],
)
def test_taking_turns_wants_two_halves(attention, train, told):
    with pytest.raises(ConfigError, match=told):
        Config.from_dict({"attention": {"ping_pong": True, **attention}, "train": {"global_batch": 12, **train}})

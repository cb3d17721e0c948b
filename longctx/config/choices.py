"""Every closed list of names that a configuration may hold.

Registries of the code behind them lie with that code, which the configuration must not import to refuse a
name; tests/architecture holds both to the same names.
"""

STRATEGIES = (
    "local",
    "ring",
    "striped",
    "burst",
    "token_ring",
    "ulysses",
    "usp",
    "gather",
    "tree",
    "rsa",
    "disaggregated",
    "zeppelin",
)
LINEAR_STRATEGIES = ("lasp2", "lasp", "headwise")
# Of a layer, in model.pattern: softmax attention, linear attention.
LAYER_KINDS = ("S", "L")
MIXERS = (
    "basic",
    "retnet",
    "lightning",
    "simple_gla",
    "gla",
    "hgrn2",
    "gated_deltanet",
    "based",
    "hedgehog",
    "moba",
    "rat",
)
# Fields of the model -> mixers that read them.
SIZED_MIXERS = {"mixer_block": ("moba", "rat"), "mixer_top_k": ("moba",)}
KERNELS = ("auto", "flash_cuda", "flash_cpu", "dense")
LAYOUTS = ("contiguous", "zigzag", "striped")
BACKWARD_SIDES = ("auto", "keys", "queries")
SERVERS = ("sequence", "pipeline")
# Strategies in which any rank computes attention for any other.
SERVED_STRATEGIES = ("disaggregated", "zeppelin")
GRADIENT_TRAVEL = ("wide", "narrow")
SCHEDULES = ("gpipe", "1f1b", "interleaved_1f1b", "zbv", "dualpipev")
BACKENDS = ("nccl", "gloo", "sim")
SOURCES = ("python_stdlib", "text", "tokens")
BYTE_SOURCES = ("python_stdlib", "text")
TOKEN_DTYPES = ("uint16", "uint32")
BALANCES = ("none", "rows", "documents")
OPTIMIZERS = ("adamw",)
DTYPES = ("float32", "bfloat16", "float64")
RECOMPUTE = ("none", "selective", "full")
KEEPABLE = ("attention", "attention_tail", "products", "collectives")
ENGINES = ("native",)
ENGINES_PLANNED = ("deepspeed", "megatron")
WANDB_MODES = ("offline", "online", "disabled")

"""What would be wrong in silence under a sequence group is refused by name, before any work."""

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="needs the extra hf")

import torch.distributed as dist  # noqa: E402 - after the skip

from longctx.errors import ConfigError, DataError  # noqa: E402
from longctx.integrations.transformers import register  # noqa: E402
from longctx.sim import Cluster  # noqa: E402
from tests.huggingface.small_models import SIZES, published  # noqa: E402

TOKENS = torch.arange(24)[None]


def made(kind, **own):
    config = getattr(transformers, kind)(**{**SIZES, **own})
    config._attn_implementation = "eager"
    return transformers.AutoModelForCausalLM.from_config(config)


def adopted(model=None, **options):
    sequence = register(**options)
    model = copy.deepcopy(published("llama")) if model is None else model
    sequence.adopt(model)
    return sequence, model


GPT_OSS = {"head_dim": 12, "num_local_experts": 2, "num_experts_per_tok": 1}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
REFUSED = {
    "linear layers": ("Qwen3_5TextConfig", {**LINEAR, "head_dim": 16}, "linear_attention"),
    "linear layers of olmo": ("OlmoHybridConfig", {**LINEAR, "num_key_value_heads": 4}, "linear_attention"),
    "state spaces": ("MambaConfig", {"state_size": 4}, "linear_attention"),
    "convolutions": ("Lfm2Config", {"layer_types": ["conv", "full_attention"] * 2}, "layers of kind conv"),
    "sinks": ("GptOssConfig", GPT_OSS, "sinks"),
    "softcap": ("Gemma2Config", {"head_dim": 12}, "attn_logit_softcapping=50"),
    "softcap of a family that has none": ("Gemma3TextConfig", {"attn_logit_softcapping": 30.0}, "softcapping=30"),
    "both ways": ("Gemma3TextConfig", {"use_bidirectional_attention": True}, "bidirectional"),
    "dropout": ("LlamaConfig", {"attention_dropout": 0.1}, "attention_dropout=0.1"),
    "a family that is not tested": ("CohereConfig", {}, "model_type cohere .* tested are gemma3_text"),
    "a table by length": ("LlamaConfig", {"rope_parameters": DYNAMIC},
                          "rope_type dynamic chooses .* declare the length"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_model_that_would_not_be_exact(case):
    kind, own, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        register().adopt(made(kind, **own))


def test_an_encoder_and_a_module_of_ones_own():
    config = transformers.BertConfig(**{k: v for k, v in SIZES.items() if k != "num_key_value_heads"})
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        setattr(config, name, 0.0)
    with pytest.raises(ConfigError, match="model_type bert"):
        register().adopt(transformers.BertModel(config))
    with pytest.raises(ConfigError, match="no model of transformers"):
        register().adopt(torch.nn.Linear(2, 2))
    model = copy.deepcopy(published("llama"))
    model.model.layers = torch.nn.ModuleList()
    with pytest.raises(ConfigError, match="4 layers and 0 of attention"):
        register().adopt(model)


def test_heads_that_do_not_divide():
    def rank():
        with pytest.raises(ConfigError, match="ulysses refuses"):
            register(dist.group.WORLD, "ulysses", "contiguous").adopt(copy.deepcopy(published("llama")))

    Cluster(3, trace=False).run(rank)


def test_one_sequence_in_documents_for_a_strategy_that_takes_whole_ones():
    sequence, _ = adopted(strategy="rsa", layout="contiguous")
    with pytest.raises(ConfigError, match="rsa refuses"):
        sequence.shard(TOKENS, documents=[20, 4])


CALLS = {
    "no cut batch": (lambda c, m: m(TOKENS), "without its cut batch"),
    "generation": (lambda c, m: m.generate(TOKENS, max_new_tokens=2, do_sample=False), "Generation is not cut"),
    "a cache": (lambda c, m: m(**{**c.inputs, "use_cache": True}), "use_cache=True"),
    "a mask": (lambda c, m: m(**c.inputs, attention_mask=torch.ones(1, 24)), "give it to sequence.shard"),
    "a mask of four dims": (lambda c, m: m(**c.inputs, attention_mask=torch.zeros(1, 1, 24, 24)), "mask of its own"),
    "no positions": (lambda c, m: m(**{**c.inputs, "position_ids": None}), "pass position_ids on"),
    "weights": (lambda c, m: m(**c.inputs, output_attentions=True), "output_attentions"),
    "bounds of flash": (lambda c, m: m(**c.inputs, cu_seq_lens_q=torch.tensor([0, 24])), "cu_seq_lens_q"),
    "some logits": (lambda c, m: c.sequence.loss(m(**c.inputs, logits_to_keep=1).logits, c), "logits_to_keep"),
    "another model": (lambda c, m: copy.deepcopy(m)(**c.inputs), "adopted"),
}  # fmt: skip


@pytest.mark.parametrize("case", CALLS)
def test_a_call_that_would_not_be_exact(case):
    call, message = CALLS[case]
    sequence, model = adopted()
    cut = sequence.shard(TOKENS, documents=[10, 14])
    with pytest.raises((ConfigError, DataError), match=message):
        call(cut, model)


def test_dropout_that_was_set_later():
    sequence, model = adopted()
    model.model.layers[1].self_attn.attention_dropout = 0.5
    with pytest.raises(ConfigError, match=r"dropout 0\.5"):
        model.train()(**sequence.shard(TOKENS).inputs)


RESTART = torch.cat([torch.arange(10), torch.arange(14)])[None]
LEFT = (torch.arange(24) >= 5).long()[None]
BATCHES = {
    "no model yet": (lambda s: register().shard(TOKENS), "no model is adopted"),
    "one row without its dim": (lambda s: s.shard(TOKENS[0]), "input_ids"),
    "no token": (lambda s: s.shard(TOKENS[:, :0]), "hold no token"),
    "labels of a part": (lambda s: s.shard(TOKENS, labels=TOKENS[:, 1:]), "labels"),
    "positions of three dims": (lambda s: s.shard(TOKENS, position_ids=RESTART[None]), "position_ids"),
    "a mask of four dims": (lambda s: s.shard(TOKENS, attention_mask=torch.ones(1, 1, 24, 24)), "zeros for padding"),
    "documents by numbers in a mask": (lambda s: s.shard(TOKENS, attention_mask=1 + LEFT), "give documents"),
    "a hole": (lambda s: s.shard(TOKENS, attention_mask=(TOKENS != 7).long()), "hides token 7 between"),
    "a mask and packed positions": (
        lambda s: s.shard(TOKENS, position_ids=RESTART, attention_mask=torch.ones_like(TOKENS)), "see each other"),
    "a mask and documents": (lambda s: s.shard(TOKENS, attention_mask=LEFT, documents=[24]), "leave out the mask"),
    "positions against documents": (lambda s: s.shard(TOKENS, position_ids=RESTART, documents=[12, 12]), "token 10"),
    "documents of other rows": (lambda s: s.shard(TOKENS, documents=[[12], [12]]), "2 rows"),
    "documents too long": (lambda s: s.shard(TOKENS, documents=[12, 13]), "25 tokens"),
    "targets that are padding": (lambda s: s.shard(TOKENS, labels=TOKENS, attention_mask=LEFT), "must be -100"),
    "nothing to predict": (lambda s: s.loss(torch.zeros(1, 24, 96), s.shard(TOKENS, documents=[1] * 24)), "predicts"),
}  # fmt: skip


@pytest.mark.parametrize("case", BATCHES)
def test_a_batch_that_contradicts_itself(case):
    call, message = BATCHES[case]
    sequence, _ = adopted()
    with pytest.raises((ConfigError, DataError), match=message):
        call(sequence)


@pytest.mark.parametrize("other", [TOKENS + 1, TOKENS.flip(-1), TOKENS.view(2, 12)], ids=["ids", "order", "shape"])
def test_ranks_with_batches_of_their_own(other):
    def rank():
        sequence, _ = adopted(group=dist.group.WORLD)
        with pytest.raises(DataError, match="rank 1 of the sequence group was given another batch"):
            sequence.shard(TOKENS if dist.get_rank() == 0 else other)

    Cluster(2, trace=False).run(rank)


@pytest.mark.parametrize("culprit", [0, 1])
@pytest.mark.parametrize("case", ["a hole", "documents too long", "one row without its dim", "packed"])
def test_a_batch_that_one_rank_refuses_is_refused_by_all(case, culprit):
    """Nobody is left waiting for a rank that has raised, and a good batch is cut afterwards."""
    call, message = {**BATCHES, "packed": (lambda s: s.shard(TOKENS, documents=[20, 4]), "rsa refuses")}[case]

    def rank():
        sequence, _ = adopted(group=dist.group.WORLD, strategy="rsa", layout="contiguous")
        words = message if dist.get_rank() == culprit else f"rank {culprit} of the sequence group refuses the batch"
        with pytest.raises((ConfigError, DataError), match=words):
            call(sequence) if dist.get_rank() == culprit else sequence.shard(TOKENS)
        return sequence.shard(TOKENS).count

    assert Cluster(2, trace=False).run(rank) == [23, 23]


def test_ranks_that_differ_in_documents_alone():
    """Positions and labels are the same; what tokens see is not."""
    labels = torch.full_like(TOKENS, -100)

    def rank():
        sequence, _ = adopted(group=dist.group.WORLD)
        given = {"labels": labels, "position_ids": TOKENS}
        with pytest.raises(DataError, match="was given another batch"):
            sequence.shard(TOKENS, documents=[12 + dist.get_rank(), 12 - dist.get_rank()], **given)

    Cluster(2, trace=False).run(rank)

"""Overrides are data: wrong words are refused with the right one, and nothing in them runs or reads."""

import contextlib
import random

import pytest

from longctx.config import Config
from longctx.config.parsing import dotted_paths
from longctx.errors import ConfigError, LongctxError, UsageError
from longctx.launcher.compose import compose


@pytest.mark.parametrize(
    ("override", "error", "words"),
    [
        (
            "attention=stripd",
            ConfigError,
            ["attention=stripd", "did you mean striped?", "valid: ", "local, ring, "],
        ),
        ("model=huge", ConfigError, ["model=huge", "tiny"]),
        ("recipe=dem", ConfigError, ["did you mean demo?"]),
        ("data.seqlen=5", ConfigError, ["did you mean data.seq_len?"]),
        ("+data.seqlen=5", ConfigError, ["did you mean data.seq_len?"]),
        ("dat.seq_len=5", ConfigError, ["did you mean data.seq_len?"]),
        ("seq_len=5", ConfigError, ["did you mean data.seq_len?"]),
        ("modle=tiny", ConfigError, ["did you mean model?"]),
        ("train={steps: 5}", ConfigError, ["train is a section", "train.steps=..."]),
        ("hydra.run.dir=x", ConfigError, ["unknown configuration key hydra.run.dir"]),
        ("hydra/launcher=x", ConfigError, ["unknown configuration key"]),
        ("data.seq_len", UsageError, ["key=value"]),
        ("=5", UsageError, ["key=value"]),
        ("run.name=[1", UsageError, ["cannot be read"]),
        ("~model", ConfigError, ["only be set"]),
        ("~train.steps=3", ConfigError, ["only be set"]),
        ("model@train=tiny", ConfigError, ["only be set"]),
        ("data.seq_len=1,2", ConfigError, ["a sweep"]),
        ("data.seq_len=range(1,5)", ConfigError, ["a sweep"]),
        ("model=tiny,small", ConfigError, ["model=tiny,small"]),
        ("run.name=${oc.env:HOME}", ConfigError, ["interpolation"]),
        ("run.name='a${oc.env:HOME}'", ConfigError, ["interpolation"]),
        ("model=${oc.env:MODEL}", ConfigError, ["interpolation"]),
        ("train.steps=${train.seed}", ConfigError, ["interpolation"]),
        ("train.steps=abc", ConfigError, ["train.steps='abc'", "an integer"]),
        ("train=3", ConfigError, ["train is a section"]),
    ],
)
def test_wrong_words_are_refused_in_one_message(override, error, words):
    with pytest.raises(error) as refused:
        compose([override])
    message = str(refused.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_values_arrive_as_they_were_written():
    config = compose(
        [
            "run.name='$(touch x)'",
            "run.dir=runs/a b".replace(" ", "_"),
            "data=text",
            "data.path='/a dir/with=odd, names'",
            "attention.window=256",
            "optim.grad_clip=null",
            "optim.lr=1e-4",
            "parallel.dp_shard=-1",
            "cluster.time_limit=2-12:00:00",
        ]
    )
    assert config.run.name == "$(touch x)"
    assert config.data.path == "/a dir/with=odd, names"
    assert (config.attention.window, config.optim.grad_clip, config.optim.lr) == (256, None, 1e-4)
    assert config.cluster.time_limit == "2-12:00:00"


def test_a_quoted_resolver_cannot_read_the_environment(monkeypatch):
    monkeypatch.setenv("SECRET", "canary")
    for text in (
        "run.name=${oc.env:SECRET}",
        "+run.name='${oc.env:SECRET}'",
        'run={name: "${oc.env:SECRET}"}',
    ):
        with pytest.raises(LongctxError) as refused:
            compose([text])
        assert "canary" not in str(refused.value)


def test_random_words_never_escape_as_foreign_exceptions():
    rng = random.Random(1)
    alphabet = "abz_.=[]{}()'\"\\,:$ ~@+-0123456789é\n"
    known = dotted_paths(Config)
    for _ in range(300):
        noise = "".join(rng.choices(alphabet, k=rng.randrange(1, 12)))
        text = rng.choice([noise, f"{rng.choice(known)}={noise}", f"{noise}={rng.choice(known)}"])
        with contextlib.suppress(LongctxError):
            assert isinstance(compose([text]), Config)

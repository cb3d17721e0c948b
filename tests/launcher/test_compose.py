"""Overrides are data: wrong words are refused with the right one, and nothing in them runs or reads."""

import contextlib
import os
import random
import shlex
import subprocess
import sys

import hypothesis
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.config import Config
from longctx.config.parsing import dotted_paths
from longctx.errors import ConfigError, LongctxError, UsageError
from longctx.launcher.compose import compose
from longctx.launcher.hydra.groups import CONF
from longctx.launcher.hydra.overrides import quoted, read


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
        ("hydra.run.dir=x", ConfigError, ["hydra.run.dir is Hydra's own", "run.dir=DIR"]),
        ("hydra/launcher=x", ConfigError, ["Hydra's own", "longctx launch"]),
        ("hydra.sweeper.params=x", ConfigError, ["loop over them in the shell"]),
        ("hydra.nothing=x", ConfigError, ["Hydra's own", "hydra.searchpath"]),
        ("attention=flash", ConfigError, ["attention=flash", "it is a kernel", "attention.kernel=auto"]),
        ("attention=context_parallel", ConfigError, ["attention=ring", "parallel.sp=N"]),
        ("attention=zigzag_ring", ConfigError, ["attention=ring attention.layout=zigzag"]),
        ("attention.strategy=all-gather", ConfigError, ["here attention=gather"]),
        ("comm=gpu", ConfigError, ["here comm=nccl"]),
        ("engine=fsdp", ConfigError, ["engine=native is FSDP2"]),
        ("train.dtype=bf16", ConfigError, ["here train.dtype=bfloat16"]),
        ("parallel.cp=4", ConfigError, ["did you mean parallel.sp?"]),
        ("context_parallel_size=4", ConfigError, ["did you mean parallel.sp?"]),
        ("optim.learning_rate=1", ConfigError, ["did you mean optim.lr?"]),
        ("train.max_steps=1", ConfigError, ["did you mean train.steps?"]),
        ("gradient_accumulation_steps=1", ConfigError, ["train.global_batch"]),
        ("train.seq_len=1", ConfigError, ["did you mean data.seq_len?"]),
        ("data.seq_len", UsageError, ["key=value"]),
        ("=5", UsageError, ["key=value"]),
        ("demo", UsageError, ["did you mean recipe=demo?"]),
        ("mine.yaml", UsageError, ["did you mean recipe=mine.yaml?"]),
        ("train.recompute_keep=[1", UsageError, ["cannot be read"]),
        ("train.recompute_keep=attention", ConfigError, ["a list", "write [attention]"]),
        ("~model", ConfigError, ["only be set"]),
        ("~train.steps=3", ConfigError, ["only be set"]),
        ("model@train=tiny", ConfigError, ["model@train=tiny", "group=option"]),
        ("+train.steps=3", ConfigError, ["train.steps is there; write train.steps=3"]),
        ("+recipe=demo", ConfigError, ["write recipe=demo"]),
        ("data.seq_len=1,2", ConfigError, ["a sweep", "for value in 1 2; do longctx ... data.seq_len=$value; done"]),
        ("data.seq_len=range(1,5)", ConfigError, ["a sweep"]),
        ("data.seq_len=1,048,576", ConfigError, ["write data.seq_len=1048576"]),
        ("data.seq_len=128K", ConfigError, ["an integer", "write 131072 or 128000"]),
        ("data.seq_len='1024'", ConfigError, ["write 1024 without quotes"]),
        ("data.seq_len=1e3", ConfigError, ["an integer", "write 1000"]),
        ("optim.lr='1e-3'", ConfigError, ["write 0.001 without quotes"]),
        ("train.compile=yes", ConfigError, ["true or false", "write true"]),
        ("train.compile='false'", ConfigError, ["write false without quotes"]),
        ("attention.window=None", ConfigError, ["write attention.window=null"]),
        ("run.dir=None", ConfigError, ["write run.dir=null"]),
        ("run.dir=~/runs/a b", ConfigError, ["run.dir=\"$HOME\"/'runs/a b'"]),
        ("run.dir=", ConfigError, ["run.dir=''", "empty"]),
        ("model=", ConfigError, ["model= is empty", "tiny"]),
        ("train.steps=", ConfigError, ["train.steps=''", "an integer"]),
        ("model=tiny,small", ConfigError, ["model=tiny,small"]),
        ("run.name=${oc.env:HOME}", ConfigError, ["interpolation", '"run.dir=$HOME/runs/a"']),
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


def test_nothing_is_suggested_that_is_not_near():
    for word in ("attention=flsh", "model=enormous", "model.foo=1", "zzz=1"):
        with pytest.raises(ConfigError) as refused:
            compose([word])
        assert "did you mean" not in str(refused.value), word


def test_values_arrive_as_they_were_written():
    config = compose(
        [
            "run.name='$(touch x)'",
            "++attention.window=256",
            "optim.grad_clip=null",
            "optim.lr=1e-4",
            "parallel.dp_shard=-1",
            "cluster.time_limit=2-12:00:00",
        ]
    )
    assert config.run.name == "$(touch x)"
    assert (config.attention.window, config.optim.grad_clip, config.optim.lr) == (256, None, 1e-4)
    assert config.cluster.time_limit == "2-12:00:00"


def test_of_a_value_that_is_given_twice_the_last_counts_and_a_group_is_chosen_once(caplog):
    assert compose(["train.steps=5", "train.seed=1", "train.steps=6"]).train.steps == 6
    assert caplog.messages == ["train.steps is given twice, 5 and then 6: the last one counts"]
    assert compose(["model=small", "model=small"]).model.name == "small"
    with pytest.raises(ConfigError, match="model=small and model=tiny: a group is chosen once"):
        compose(["model=small", "model=tiny"])


# What a shell may pass as a path, each in bash's own quotes, and the name of the file that is meant.
IN_BASH = {
    "'data.path=/a dir/with=odd, names'": "/a dir/with=odd, names",
    "data.path=a,b.txt": "a,b.txt",
    "data.path=a=b=c": "a=b=c",
    "data.path=[draft]": "[draft]",
    "'data.path=[1'": "[1",
    "'data.path={a: 1}'": "{a: 1}",
    '"data.path=it\'s (new)"': "it's (new)",
    '\'data.path="a" and "b"\'': '"a" and "b"',
    "'data.path=$HOME'": "$HOME",
    "data.path=a#b": "a#b",
    "data.path='# x'": "# x",
    "data.path=100%": "100%",
    "data.path=données/日本語.txt": "données/日本語.txt",
    "data.path=-x": "-x",
    "data.path=--resume": "--resume",
    "data.path=true": "true",
    "data.path=2024": "2024",
    "data.path=1e3": "1e3",
    "data.path=0x1f": "0x1f",
    "data.path=./null": "./null",
    "data.path=a:b": "a:b",
    "'data.path= two  spaces '": " two  spaces ",
    "'data.path=a;b&c|d>e<f'": "a;b&c|d>e<f",
    "'data.path=`id`'": "`id`",
    "'data.path=*.txt?'": "*.txt?",
    "'data.path=a@b!c^d'": "a@b!c^d",
    "'data.path=str(5)'": "str(5)",
    "'data.path=choice(a,b)'": "choice(a,b)",
    "data.path='\"/quoted for Hydra\"'": "/quoted for Hydra",
    "data.path='a\\,b'": "a,b",  # Hydra's own way to write a comma
}


def test_keys_of_ones_own_take_any_text_too():
    config = compose(
        ["cluster.sbatch.exclude=node[1-3],node7", "cluster.sbatch.mem=0", "+cluster.sbatch.comment='a, b'"]
    )
    assert config.cluster.sbatch == {"exclude": "node[1-3],node7", "mem": 0, "comment": "a, b"}


def test_odd_paths_arrive_through_a_shell():
    probe = "import sys; from longctx.launcher.compose import compose; print(sys.argv[1:]); "
    probe += "[print(repr(compose(['data=text', word]).data.path)) for word in sys.argv[1:]]"
    line = f"{shlex.quote(sys.executable)} -c {shlex.quote(probe)} {' '.join(IN_BASH)}"
    environment = {**os.environ, "PYTHONPATH": str(CONF.parents[1]), "PYTHONUTF8": "1", "LC_ALL": "C.UTF-8"}
    done = subprocess.run(["bash", "-c", line], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1:] == [repr(path) for path in IN_BASH.values()]


def test_the_parts_of_a_path_that_the_shell_cut_are_told_with_the_quotes_that_work():
    with pytest.raises(UsageError) as refused:
        compose(["data=text", "data.path=/my", "files"])
    assert str(refused.value).endswith("quote both: 'data.path=/my files'")


@settings(max_examples=150)
@given(st.text(st.characters(exclude_categories=("C", "Zl", "Zp")), min_size=1, max_size=12))
def test_any_text_is_itself(text):
    """Quotes around it, backslashes and words with a meaning are Hydra's; all else arrives letter by letter."""
    special = text.lower() == "null" or text == "None" or text[0] in "~'\"" or "\\" in text or "${" in text
    hypothesis.assume(not special)
    (word,) = read([f"run.name={text}"]).words
    assert OverridesParser.create().parse_override(word).value() == text
    assert OverridesParser.create().parse_override(f"run.name={quoted(text)}").value() == text


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
    for _ in range(150):
        noise = "".join(rng.choices(alphabet, k=rng.randrange(1, 12)))
        text = rng.choice([noise, f"{rng.choice(known)}={noise}", f"{noise}={rng.choice(known)}"])
        with contextlib.suppress(LongctxError):
            assert isinstance(compose([text]), Config)

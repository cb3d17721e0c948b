"""Reading a configuration is strict at every depth and says what would have been right."""

import copy
import random
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longctx.config import Config
from longctx.config.parsing import dotted_paths
from longctx.errors import ConfigError, NotAvailableError


def nested(path: str, value: object) -> dict:
    """``a.b=value`` as a mapping."""
    for key in reversed(path.split(".")):
        value = {key: value}
    return value


def leaves() -> list[str]:
    sections = Config().to_dict()
    return [f"{section}.{name}" for section, fields in sections.items() for name in fields]


def mutate(key: str, rng: random.Random) -> str:
    """``key`` with one slip of the fingers: a letter lost, doubled, swapped, wrong or added."""
    at = rng.randrange(len(key))
    letter = rng.choice(string.ascii_lowercase)
    slips = [
        key[:at] + key[at + 1 :],
        key[:at] + key[at] + key[at:],
        key[: at + 1][:-1] + key[at + 1 : at + 2] + key[at] + key[at + 2 :],
        key[:at] + letter + key[at + 1 :],
        key[:at] + letter + key[at:],
    ]
    return rng.choice(slips)


def test_dictionary_and_back_is_the_identity():
    config = Config()
    assert Config.from_dict(config.to_dict()) == config
    assert Config.from_dict({}) == config


def test_input_is_not_changed():
    mapping = Config().to_dict()
    before = copy.deepcopy(mapping)
    Config.from_dict(mapping)
    assert mapping == before


def test_misspelt_keys_are_refused_with_the_right_suggestion():
    rng = random.Random(0)
    known = set(dotted_paths(Config))
    tried = right = 0
    while tried < 400:
        path = rng.choice(leaves())
        section, _, name = path.rpartition(".")
        wrong = f"{section}.{mutate(name, rng)}" if rng.random() < 0.8 else f"{mutate(section, rng)}.{name}"
        if wrong in known or wrong.endswith(".") or wrong.startswith("."):
            continue
        tried += 1
        value = Config().to_dict()[section][name]
        with pytest.raises(ConfigError) as refused:
            Config.from_dict(nested(wrong, value))
        message = str(refused.value)
        expected = path if wrong.startswith(f"{section}.") else section
        right += f"did you mean {expected}?" in message
    assert right >= 0.95 * tried, f"{right} of {tried} suggestions were right"


@given(st.sampled_from(leaves()), st.text(min_size=1, max_size=12))
def test_no_foreign_key_is_accepted(path, extra):
    section = path.partition(".")[0]
    if f"{section}.{extra}" in dotted_paths(Config):
        return
    with pytest.raises(ConfigError, match="unknown configuration key"):
        Config.from_dict({section: {extra: 1}})


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 5),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers(), max_size=2),
)


@given(st.sampled_from(leaves()), scalars)
def test_a_value_of_any_type_is_taken_as_it_is_or_refused(path, value):
    """No conversion but integer to real number, and no exception that is not ours."""
    section, _, name = path.partition(".")
    try:
        taken = Config.from_dict({section: {name: value}}).to_dict()[section][name]
    except (ConfigError, NotAvailableError):
        return
    assert taken == value
    assert type(taken) is type(value) or (type(value) is int and type(taken) is float)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("train.steps", "100", ["train.steps='100'", "a string", "an integer"]),
        ("train.steps", 1.5, ["train.steps=1.5", "a number", "an integer"]),
        ("train.steps", True, ["train.steps=true", "true or false", "an integer"]),
        ("train.steps", None, ["train.steps is null, expected an integer"]),
        ("train.compile", 1, ["train.compile=1", "true or false"]),
        ("run.name", 2026, ["run.name=2026", "quote it"]),
        ("run.name", "a\nb", ["run.name='a\\nb'", "control characters"]),
        ("run.dir", "", ["run.dir=''", "empty"]),
        ("data.path", "a\0b", ["control characters"]),
        ("optim.lr", float("nan"), ["optim.lr=nan", "finite"]),
        ("optim.lr", float("inf"), ["optim.lr=inf", "finite"]),
        ("optim.lr", [1], ["optim.lr=[1]", "a list", "a number"]),
        ("train.seed", 10**30, ["64 bits"]),
        ("attention.window", "all", ["an integer or null"]),
        ("model", 3, ["model=3", "mapping"]),
        ("model.dim", {"a": 1}, ["a dict", "an integer"]),
    ],
)
def test_message_names_value_and_expectation(path, value, words):
    with pytest.raises(ConfigError) as refused:
        Config.from_dict(nested(path, value))
    for word in words:
        assert word in str(refused.value)


def test_integer_stands_for_a_real_number_and_null_where_it_may():
    config = Config.from_dict({"optim": {"lr": 1, "grad_clip": None}, "attention": {"window": None}})
    assert config.optim.lr == 1.0
    assert isinstance(config.optim.lr, float)
    assert config.optim.grad_clip is None


@pytest.mark.parametrize("mapping", [None, [], "model", 3])
def test_something_that_is_no_mapping_is_refused(mapping):
    with pytest.raises(ConfigError, match="the configuration="):
        Config.from_dict(mapping)


def test_field_without_its_section_is_found():
    with pytest.raises(ConfigError, match=r"did you mean data\.seq_len\?"):
        Config.from_dict({"seq_len": 5})


def test_a_list_of_names_is_read_and_written():
    mapping = {"train": {"recompute": "full", "recompute_keep": ["attention", "products"]}}
    config = Config.from_dict(mapping)
    assert config.train.recompute_keep == ("attention", "products")
    assert config.to_dict()["train"]["recompute_keep"] == ["attention", "products"]
    assert Config.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("value", "words"),
    [("attention", "expected a list or null"), ([1], r"recompute_keep\[0\]=1 is an integer, expected a string")],
)
def test_what_is_no_list_of_names_is_refused(value, words):
    with pytest.raises(ConfigError, match=words):
        Config.from_dict({"train": {"recompute_keep": value}})

"""conf/ holds the schema's keys and nothing else, and what it composes by default is the schema's default."""

from dataclasses import fields

import pytest
import yaml

from longctx.config import Config
from longctx.config.choices import BACKENDS, ENGINES, ENGINES_PLANNED, LINEAR_STRATEGIES, SOURCES, STRATEGIES
from longctx.launcher.compose import CONF, compose, groups

SECTIONS = {field.name: set(getattr(Config(), field.name).__dataclass_fields__) for field in fields(Config)}
FILES = sorted(CONF.glob("*/*.yaml"))


def plain(file):
    return yaml.safe_load(file.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "file", [f for f in FILES if f.parent.name != "recipe"], ids=lambda f: f"{f.parent.name}/{f.stem}"
)
def test_an_option_states_every_field_of_its_section(file):
    if file.parent.name == "attention" or file.parent.name in SECTIONS:
        assert set(plain(file)) == SECTIONS[file.parent.name]


@pytest.mark.parametrize("file", sorted(CONF.glob("recipe/*.yaml")), ids=lambda f: f.stem)
def test_a_recipe_sets_known_keys_only(file):
    for section, values in plain(file).items():
        if section != "defaults":
            assert set(values) <= SECTIONS[section]
    assert file.read_text(encoding="utf-8").startswith("# @package _global_")


def test_the_defaults_list_covers_the_schema():
    train = plain(CONF / "train.yaml")
    listed = [next(iter(entry)) for entry in train["defaults"] if isinstance(entry, dict)]
    in_place = [key for key in train if key != "defaults"]
    assert sorted([*listed, *in_place]) == sorted([*SECTIONS, "recipe"])
    assert sorted(listed) == sorted(groups())
    for section in in_place:
        assert set(train[section]) == SECTIONS[section]


def test_the_default_composition_is_the_default_configuration():
    assert compose([]) == Config()


def test_groups_offer_what_the_schema_knows():
    assert set(groups()["comm"]) == set(BACKENDS)
    assert set(groups()["data"]) == set(SOURCES)
    assert set(groups()["attention"]) == {*STRATEGIES, *LINEAR_STRATEGIES, "lasp2h"}
    assert set(groups()["engine"]) == {*ENGINES, *ENGINES_PLANNED}


# Options that need another one beside them.
COMPANIONS = {
    "data=text": ["data.path=corpus"],
    "data=tokens": ["data.path=corpus"],
    "attention=lasp2h": ["model=hybrid_gdn"],
    **{f"attention={strategy}": ["model=linear_retnet"] for strategy in LINEAR_STRATEGIES},
    **{f"model={model}": ["attention=lasp2"] for model in ("linear_retnet", "linear_llama_1b")},
}


@pytest.mark.parametrize(
    "choice",
    [
        f"{group}={option}"
        for group, options in groups().items()
        for option in options
        if f"{group}={option}" not in ("engine=deepspeed", "engine=megatron")
    ],
)
def test_every_option_composes(choice):
    compose([choice, *COMPANIONS.get(choice, [])]).check()


def test_the_demo_recipe_is_sequence_parallel_over_real_text():
    config = compose(["recipe=demo"])
    assert (config.data.source, config.attention.strategy, config.parallel.sp) == (
        "python_stdlib",
        "striped",
        2,
    )
    assert config.comm.backend == "gloo"
    assert compose(["recipe=demo", "attention=ring", "train.steps=3"]).train.steps == 3
    assert compose(["recipe=demo", "attention=ring"]).attention.strategy == "ring"

"""conf/ says only what differs from the schema, whose defaults are what is composed by default."""

from dataclasses import fields

import pytest
import yaml

from longctx.catalog import ENGINES, LINEAR_STRATEGIES, OPTIMIZERS, SOURCES, STRATEGIES
from longctx.config import Config
from longctx.config.sections.parallel import BACKENDS
from longctx.launcher.compose import CONF, NAMED, compose, groups

DEFAULTS = Config().to_dict()
FILES = sorted(CONF.glob("*/*.yaml"))


def plain(file):
    return yaml.safe_load(file.read_text(encoding="utf-8")) or {}


@pytest.mark.parametrize(
    "file", [f for f in FILES if f.parent.name != "recipe"], ids=lambda f: f"{f.parent.name}/{f.stem}"
)
def test_an_option_states_what_differs_from_the_schema_and_says_what_it_is(file):
    section, said = DEFAULTS[file.parent.name], plain(file)
    assert set(said) <= set(section)
    # What names the option may be a default.
    assert [key for key, value in said.items() if section[key] == value] == []
    assert file.read_text(encoding="utf-8").startswith("# ")


def test_a_name_alone_has_no_file():
    alone = [file for file in FILES if file.parent.name in NAMED and len(plain(file)) < 2]
    assert not alone


@pytest.mark.parametrize("file", sorted(CONF.glob("recipe/*.yaml")), ids=lambda f: f.stem)
def test_a_recipe_sets_known_keys_only(file):
    for section, values in plain(file).items():
        if section != "defaults":
            assert set(values) <= set(DEFAULTS[section])
    assert file.read_text(encoding="utf-8").startswith("# @package _global_")


def test_the_defaults_list_names_every_group_and_the_schema_first():
    train = plain(CONF / "train.yaml")
    assert list(train) == ["defaults"] and train["defaults"][0] == "schema"
    listed = [next(iter(entry)) for entry in train["defaults"] if isinstance(entry, dict)]
    assert sorted(listed) == sorted(groups())
    assert set(listed) - {"recipe"} == {one.name for one in fields(Config)} - {"train", "run"}


def test_the_default_composition_is_the_default_configuration():
    assert compose([]) == Config()


def test_groups_offer_what_the_catalog_knows():
    assert set(groups()["comm"]) == set(BACKENDS)
    assert set(groups()["data"]) == set(SOURCES)
    assert set(groups()["attention"]) == {*STRATEGIES, *LINEAR_STRATEGIES, "lasp2h"}
    assert set(groups()["engine"]) == set(ENGINES)
    assert set(groups()["optim"]) == set(OPTIMIZERS)


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
    [f"{group}={option}" for group, options in groups().items() for option in options],
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

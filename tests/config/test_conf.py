"""conf/ says only what differs from the schema, whose defaults are what is composed by default."""

from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from longctx.catalog import ENGINES, LINEAR_STRATEGIES, OPTIMIZERS, SOURCES, STRATEGIES
from longctx.config import Config
from longctx.config.sections.parallel import BACKENDS
from longctx.launcher.compose import compose
from longctx.launcher.hydra.groups import CONF, NAMED, groups

DEFAULTS = Config().to_dict()
FILES = sorted(CONF.glob("*/*.yaml"))
# Options that need another one beside them.
DIRECTORY = Path(__file__).parent.parent / "huggingface" / "fixtures" / "llama-tiny"
COMPANIONS = {
    "model=hf": [f"model.path={DIRECTORY}"],
    **{f"data={source}": ["data.path=corpus"] for source in SOURCES if source not in ("python_stdlib", "mixture")},
    "data=mixture": ["data.mixture.code.path=corpus"],
    "attention=lasp2h": ["model=hybrid_gdn"],
    **{f"attention={strategy}": ["model=linear_retnet"] for strategy in LINEAR_STRATEGIES},
    **{f"model={model}": ["attention=lasp2"] for model in ("linear_retnet", "linear_llama_1b")},
}


def plain(file):
    return yaml.safe_load(file.read_text(encoding="utf-8")) or {}


def said_by(file):
    """What a file sets, by section; one that begins with ``# @package _global_`` may set others than its own."""
    said = plain(file)
    return said if file.read_text(encoding="utf-8").startswith("# @package _global_\n# ") else {file.parent.name: said}


@pytest.mark.parametrize(
    "file", [f for f in FILES if f.parent.name != "recipe"], ids=lambda f: f"{f.parent.name}/{f.stem}"
)
def test_an_option_states_what_differs_from_the_schema_and_says_what_it_is(file):
    said = said_by(file)
    assert file.parent.name in said
    for section, values in said.items():
        assert set(values) <= set(DEFAULTS[section])
        # What names the option may be a default.
        assert [key for key, value in values.items() if DEFAULTS[section][key] == value] == []
    assert file.read_text(encoding="utf-8").startswith("# ")


@pytest.mark.parametrize("file", sorted(CONF.glob("model/*.yaml")), ids=lambda f: f.stem)
def test_a_model_is_trained_as_its_size_is(file):
    """Models of a billion parameters and more say how; what a user sets wins, whatever the order of words."""
    words = ["model=" + file.stem, *COMPANIONS.get(f"model={file.stem}", [])]
    config = compose(words)
    large = config.model.dim >= 2048
    assert config.optim.lr <= 4e-4 if large else config.optim.lr == DEFAULTS["optim"]["lr"]
    assert (config.train.recompute != "none") == large
    own = ["optim.lr=1e-5", "train.recompute=none"]
    for mixed in (own + words, words + own):
        assert (compose(mixed).optim.lr, compose(mixed).train.recompute) == (1e-5, "none")


def test_nccl_computes_in_16_bits_unless_told_otherwise():
    assert compose(["comm=nccl"]).train.dtype == "bfloat16" and compose([]).train.dtype == "float32"
    assert compose(["train.dtype=float32", "comm=nccl"]).train.dtype == "float32"


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
    assert set(listed) - {"recipe"} == {one.name for one in fields(Config)} - {"train", "run", "init"}


def test_the_default_composition_is_the_default_configuration():
    assert compose([]) == Config()


def test_groups_offer_what_the_catalog_knows():
    assert set(groups()["comm"]) == set(BACKENDS)
    assert set(groups()["data"]) == set(SOURCES)
    assert set(groups()["attention"]) == {*STRATEGIES, *LINEAR_STRATEGIES, "lasp2h"}
    assert set(groups()["engine"]) == set(ENGINES)
    assert set(groups()["optim"]) == set(OPTIMIZERS)


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

"""Applies all rules to a run and tells what they found, together, before anything starts."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from typing import Any

import yaml

from longctx.catalog import SCHEDULES
from longctx.config import Config
from longctx.errors import ConfigError
from longctx.launcher.hydra.groups import CONF
from longctx.launcher.preflight.facts import Facts
from longctx.launcher.preflight.rules import RULES
from longctx.reporting.teller import Teller
from longctx.rules import as_word
from longctx.train.learning_rate import LearningRate, told

_log = logging.getLogger(__name__)


def look(facts: Facts) -> None:
    """Tells what is hardly meant, and what was not chosen by hand. Raises ``ConfigError`` for what cannot be meant."""
    findings = [finding for rule in RULES if (finding := rule(facts)) is not None]
    refused = [finding.words for finding in findings if finding.refused]
    if refused:
        raise ConfigError("; and ".join(refused))
    for finding in findings:
        _log.warning("warning: %s", finding.words)
    # On standard error: standard output may be a job's script.
    teller = Teller(silent=not facts.config.logger.progress, stream=sys.stderr)
    for line in (*brought(facts.config), told(facts.config.optim, facts.config.train.steps)):
        teller.say(line)


def brought(config: Config) -> Iterator[str]:
    """Says which keys of other sections the files of the chosen model and backend have set."""
    for group, option in (("model", config.model.name), ("comm", config.comm.backend)):
        file = CONF / group / f"{option}.yaml"
        said = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else None
        others = {name: keys for name, keys in (said or {}).items() if isinstance(keys, dict) and name != group}
        words = [_word(config, section, key, value) for section, keys in others.items() for key, value in keys.items()]
        if words:
            yield f"{group}={option} brings {', '.join(words)}"


def _word(config: Config, section: str, key: str, value: Any) -> str:
    own = getattr(getattr(config, section), key)
    return f"{section}.{key}={as_word(value)}" + ("" if own == value else f" (yours: {as_word(own)})")


def look_at_rate(recorded: Config, config: Config, step: int) -> None:
    """Warns when the next step after ``step`` has another rate than the run was going to have."""
    optim, steps = recorded.optim, recorded.train.steps
    planned = LearningRate(optim, steps).rate(step + 1)
    now = LearningRate(config.optim, config.train.steps).rate(step + 1)
    if abs(now - planned) <= 0.01 * max(now, planned):
        return
    extends = SCHEDULES.load(config.optim.schedule).extends
    _log.warning(
        "warning: step %d has optim.lr %.3g, and had %.3g as the run was recorded: with optim.schedule=%s and "
        "more steps %s",
        *(step + 1, now, planned, config.optim.schedule, extends),
    )

"""Configs as Hydra composes them, once per choice, and what `validate` says to them, in milliseconds."""

import functools
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from gptlab import cli, config
from gptlab.errors import UserError


def compose_entry(entry: str, *overrides: str) -> DictConfig:
    cli.register_resolvers()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config.CONF), version_base="1.3"):
        return compose(entry, overrides=list(overrides))


@functools.cache
def composed(entry: str, *choices: str) -> tuple[dict[str, Any], frozenset[str]]:
    """Resolved plain values, which nobody may change, and the keys whose value is a reference."""
    cfg = compose_entry(entry, *choices)
    return OmegaConf.to_container(cfg, resolve=True), frozenset(cli._references(cfg))


def leaf_keys(values: dict[str, Any], at: str = "") -> list[str]:
    keys = []
    for name, value in values.items():
        keys += leaf_keys(value, f"{at}{name}.") if isinstance(value, dict) and value else [f"{at}{name}"]
    return keys


def errors(entry: str, choices: tuple[str, ...] = (), changes: dict[str, Any] | None = None) -> list[str]:
    """The lines of the error for a config with these values changed; references follow their keys."""
    values, references = composed(entry, *choices)
    for key, value in (changes or {}).items():
        values = config.with_value(values, key, value)
    try:
        config.validate(values, entry, references - set(changes or ()))
    except UserError as error:
        return str(error).split("\n")
    return []

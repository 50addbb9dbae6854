"""Classes that a config names by `_target_`: which of them are foreign, and how one is built."""

import importlib
import inspect
from collections.abc import Collection
from pathlib import Path
from typing import Any

from gptlab.errors import UserError


def foreign_targets(config: Any, known: Collection[str]) -> list[str]:
    """Every `_target_` in nested dicts and lists that is not one of `known`, which are full names: `gptlab.x.os.system`
    would be foreign code too. Visits each container once, as a file can nest them a billionfold."""
    foreign, stack, seen = [], [config], set()
    while stack:
        node = stack.pop()
        if id(node) in seen or not isinstance(node, (dict, list, tuple)):
            continue
        seen.add(id(node))
        if isinstance(node, dict) and "_target_" in node:
            target = node["_target_"]
            if not isinstance(target, str) or target not in known:
                foreign.append(target[:100] if isinstance(target, str) else "a _target_ that is not a name")
        stack.extend(node.values() if isinstance(node, dict) else node)
    return sorted(set(foreign))


def require_trust(source: Path | str, foreign: list[str], trust: bool) -> None:
    """Raises UserError if a file from outside names anything foreign, and no `trust` is given."""
    if foreign and not trust:
        raise UserError(
            f"{source} needs {', '.join(foreign[:5])}, which gptlab does not define: loading it runs code or downloads; add "
            "trust=true if you trust its author"
        )


def instantiate(key: str, node: dict[str, Any], **arguments: Any) -> Any:
    """Build a node of the config, after the nodes nested in it that have a `_target_`, as Hydra's instantiate does."""

    def resolve(value: Any) -> Any:
        if isinstance(value, dict):
            value = {name: resolve(item) for name, item in value.items()}
            return instantiate(key, value) if "_target_" in value else value
        return [resolve(item) for item in value] if isinstance(value, list) else value

    values = {name: resolve(value) for name, value in node.items() if name != "_target_"}
    return build(key, node["_target_"], {**values, **arguments})


def build(key: str, target: Any, arguments: dict[str, Any]) -> Any:
    """Call a class; raises UserError, about the config's `key`, if it does not exist or does not take these arguments."""
    if not isinstance(target, str):
        raise UserError(f"{key}._target_ must be the name of a class, PACKAGE.CLASS")
    module, _, name = target.rpartition(".")
    try:
        wanted = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise UserError(
            f"{key}._target_={target}: cannot import it ({error}); install it or run in its folder"
        ) from error
    signature = inspect.signature(wanted)
    try:
        signature.bind(**arguments)
    except TypeError as error:
        takes = ", ".join(signature.parameters)
        raise UserError(f"{key}: {target} does not fit its keys: {error}; it takes {takes}") from None
    return wanted(**arguments)

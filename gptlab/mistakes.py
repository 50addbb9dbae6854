"""A user's mistake in a config, as a few lines: which key, what it was given, what it may be, and what was meant.

Hydra, OmegaConf and PyYAML find the mistakes; here their exceptions are read, and put into the words of our config.
"""

import difflib
import traceback
import types
import typing
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from gptlab import config


def explain(error: BaseException, composing: bool) -> str | None:
    """The text for a mistake; None if the exception is no user's mistake but a fault in a program.

    Mistakes are the ValueErrors and FileNotFoundErrors that gptlab's own code raises, and classes that Hydra cannot
    build; while composing, whatever is raised: all that is worked on then is the user's.
    """
    from hydra.errors import HydraException, InstantiationException
    from omegaconf.errors import OmegaConfBaseException

    chain = list(_chain(error))
    ours = next((e for e in chain if _is_ours(e)), None)
    if ours is not None and (ours is error or isinstance(error, HydraException)):
        return str(ours)
    if not (composing or isinstance(error, HydraException)):
        return None
    if isinstance(error, InstantiationException):
        what, *lines = str(error).split("\n")
        key = "".join(f"{line.strip().removeprefix('full_key: ')}: " for line in lines if "full_key: " in line)
        cause = f" {type(chain[1]).__name__}: {' '.join(str(chain[1]).splitlines()[:2])}" if len(chain) > 1 else ""
        text = f"{key}{what.partition(', set env var')[0].removesuffix(':')}:{cause}"
    else:
        detail = next((e for e in chain if isinstance(e, OmegaConfBaseException)), None)
        text = _of_hydra(error) or (_of_key(detail) if detail else None) or "\n".join(str(error).split("\n")[:4])
        file = _yaml_file(error)
        if file and detail is not None and detail.full_key == file.partition("/")[0]:
            text = "its first line must be `# @package _global_`, or its keys are looked for below that of its folder"
        text = f"in {file}: {text}" if file else text
    return f"{text}\n(HYDRA_FULL_ERROR=1 shows where it comes from)"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_ours(error: BaseException) -> bool:
    if not isinstance(error, (ValueError, FileNotFoundError)) or not error.__traceback__:
        return False
    raised = traceback.extract_tb(error.__traceback__)[-1]
    on_purpose = (raised.line or "").startswith("raise ")  # not, say, a tuple of another length than was unpacked
    package = Path(config.__file__).parent
    return on_purpose and not {package, package.parent / "scripts"}.isdisjoint(Path(raised.filename).parents)


def _yaml_file(error: BaseException) -> str | None:
    """The config that Hydra was merging, as in "In 'experiment/mine': ..."."""
    text = str(error)
    return text.split("'")[1] + ".yaml" if text.startswith("In '") and "raised while composing" in text else None


def _of_hydra(error: BaseException) -> str | None:
    from hydra.errors import MissingConfigException, OverrideParseException

    text = str(error)
    if isinstance(error, MissingConfigException) and "/" in (error.missing_cfg_file or ""):
        group, _, name = error.missing_cfg_file.rpartition("/")
        if "/" in group and group.partition("/")[0] in ("experiment", "debug"):
            return f"{group}: {name}: a defaults list says `override /{group.partition('/')[2]}: {name}`"
        own = f" (of your own: --config-dir FOLDER, with FOLDER/{group}/{name}.yaml)"
        return f"{group}={name}: there is no such choice{_meant(name, options(group, error))}{own}"
    if isinstance(error, OverrideParseException):
        given = error.override
        key, is_setting, value = given.partition("=")
        if is_setting:
            return (
                f"{given}: cannot be read as KEY=VALUE; lists have no spaces, [a,b], and a text with other characters "
                f"than those of file names is quoted for the shell and for Hydra: \"{key}='{value}'\""
            )
        if given and Path(given).exists():
            return f"{given}: settings are given as KEY=VALUE; did you mean resume={given} (train) or ckpt={given} (sample)?"
        found = [f"{path.parent.name}={given}" for path in sorted(config.CONF.glob(f"*/{given}.yaml"))]
        return f"{given}: settings are given as KEY=VALUE" + (f"; did you mean {' or '.join(found)}?" if found else "")
    if "Ambiguous value" in text:
        given = text.split("'")[1]
        return f"{given}: several values are a sweep (of new runs), which needs -m; a list is written [a,b], a text with a comma in quotes"
    if "Could not override '" in text and "@" in text.partition("Could not override")[2]:
        return (
            f"{text.split(':')[0]}: its first line must be `# @package _global_`, its defaults `override /model: NAME`"
        )
    if text.endswith("No match in the defaults list."):
        group = text.split("'")[-2]
        groups = sorted(path.name for path in config.CONF.iterdir() if path.is_dir())
        return f"{text.split(':')[0]}: there is no group {group}{_meant(group, groups)}"
    if isinstance(error, PermissionError):
        return f"{text}; runs are written below the working directory: go where you may write, or give hydra.run.dir=FOLDER (with -m: hydra.sweep.dir=FOLDER)"
    if text.startswith("Could not delete"):
        key = text.split("'")[1]
        return f"~{key}: there is nothing of that name to leave out"
    return None


def options(group: str, error: Any = None) -> list[str]:
    """The choices of a config group: those that Hydra found, else those of conf/."""
    return list(getattr(error, "options", None) or sorted(path.stem for path in (config.CONF / group).glob("*.yaml")))


def _meant(given: str, known: list[str]) -> str:
    near = difflib.get_close_matches(given, known, n=1)
    return (f"; did you mean {near[0]}?" if near else ".") + f" It may be: {', '.join(known)}"


def _of_key(error: Any) -> str | None:
    """What is wrong with one key of a composed config; `error` is OmegaConf's."""
    from omegaconf import errors

    root = error.parent_node._get_root() if error.parent_node is not None else None
    reason = str(error).split("\n")[0]
    if isinstance(error, errors.MissingMandatoryValue):
        key = error.full_key or reason.rpartition(" ")[2]
        return f"{key} is missing: give {key}=VALUE"
    if isinstance(error, errors.InterpolationResolutionError):
        if "'data.name'" in reason:
            return "data.name is missing: the YAML of a data set says `name: NAME`"
        return f"{error.full_key}: {reason}"
    if isinstance(error, (errors.ConfigKeyError, errors.ConfigAttributeError)):
        return f"there is no key {error.full_key}{_nearest(error, root)}"
    if isinstance(error, errors.ValidationError):
        if " is not a subclass of " in reason:  # a value where a whole node belongs; OmegaConf does not say which
            schema, _, value = reason.partition(" is not a subclass of ")[2].partition(". value: ")
            keys = [key for key, node in _nodes(root) if _type_name(node) == schema]
            group = next((key for key in keys if (config.CONF / key).is_dir()), None)
            choose = f"; to choose one, its defaults list says `override /{group}: {value}`" if group else ""
            return f"{' or '.join(keys)}={value}: it must be a mapping of keys to values{choose}"
        if error.full_key:
            allowed = _allowed(error)
            return f"{error.full_key}={_shown(error.value)}: it must be {allowed}" if allowed else reason
    return None


def _nodes(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of a composed config, with what is there (None for values)."""
    from omegaconf import DictConfig

    for key in node:
        if prefix or key != "hydra":
            child = node._get_node(key)
            inner = isinstance(child, DictConfig) and not child._is_none() and not child._is_missing()
            yield f"{prefix}{key}", child if inner else None
            if inner and not child._is_interpolation():
                yield from _nodes(child, f"{prefix}{key}.")


def _type_name(node: Any) -> str | None:
    return node._metadata.object_type.__name__ if node is not None and node._metadata.object_type else None


def _nearest(error: Any, root: Any) -> str:
    """The right key that was probably meant: of the same node, else the same or a near name elsewhere."""
    node, name = error.parent_node, str(error.key)
    siblings = [str(key) for key in node if str(key) != "hydra"]
    place = error.full_key.removesuffix(name)
    near = difflib.get_close_matches(name, siblings, n=1)
    if near:
        return f"; did you mean {place}{near[0]}?"
    elsewhere = [key for key, _ in _nodes(root)]
    leaves = {key.rpartition(".")[2]: key for key in reversed(elsewhere)}
    near = difflib.get_close_matches(name, leaves, n=1, cutoff=0.75)
    if near:
        return f"; did you mean {leaves[near[0]]}?"
    known = f"; known here: {', '.join(siblings)}" if siblings else ""
    if place and not is_dataclass(node._metadata.object_type):
        known += f"; what its class takes beyond its YAML: +{error.full_key}=VALUE"
    return known + (f"; for Lightning's Trainer: trainer.extra.{name}=VALUE" if place == "trainer." else "")


def _allowed(error: Any) -> str | None:
    """What the schema allows for the key that the error is about, in words; None where there is no schema."""
    node, key = error.parent_node, error.key
    while node is not None and not is_dataclass(node._metadata.object_type):
        node, key = node._get_parent(), node._key()
    if node is None:
        return None
    return _in_words(typing.get_type_hints(node._metadata.object_type).get(key))


def _in_words(kind: Any) -> str | None:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", types.NoneType: "null"}
    arguments = typing.get_args(kind)
    if kind in names:
        return names[kind]
    if isinstance(kind, types.UnionType):
        return " or ".join(_in_words(part) or "anything" for part in arguments)
    origin = typing.get_origin(kind)
    if origin is tuple:
        return f"a list of {len(arguments)} values, each {_in_words(arguments[0])}"
    if origin is list:
        return f"a list of values, each {_in_words(arguments[0])}"
    return "a mapping, {key: value}" if origin is dict else None


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = str(value)
    return text if len(text) < 80 else text[:77] + "..."

"""What is said about mistakes in the settings: the value, the rule and the way out."""

import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipetrain.config import DeviceConfig
from pipetrain.help import GROUPS, KEYS, Setting, choices, fields_of, settings
from pipetrain.suggest import did_you_mean, one_of


def explain(error: BaseException, overrides: Sequence[str], folders: Sequence[Path]) -> str:
    """What the user can do about an error of Hydra or OmegaConf.

    Args:
        error: the exception. Told apart by what it carries and says, so that Hydra need not be imported here.
        overrides: the words of the command line.
        folders: where YAML files are looked for.
    """
    if isinstance(error, OSError) and error.strerror is not None:  # Hydra's own for a missing file is one too
        return f"the run folder cannot be written: {error.strerror} ({error.filename}); choose another hydra.run.dir"
    message = str(error).partition("\nConfig search path")[0].strip()
    if word := getattr(error, "override", None):
        return bad_syntax(word)
    if missing := getattr(error, "missing_cfg_file", None):
        group, _, given = missing.partition("/")
        return unknown_choice(group, given, folders) or message
    if several := _found(r"Ambiguous value for argument '(.*)'", message):
        return several_values(several)
    if missing := _found(r"Interpolation key '(.*)' not found", message):
        return f"${{{missing}}}: {unknown_key(missing)}"
    if "group override must be a string" in message:
        key, _, given = next((word for word in overrides if key_of(word) in GROUPS), "").partition("=")
        return unknown_choice(key, given, folders) or message
    return _explain_value(message, error, overrides)


def _explain_value(message: str, error: BaseException, overrides: Sequence[str]) -> str:
    """The errors about one key and its value; OmegaConf's own error stands behind Hydra's, or in its text."""
    cause = error.__cause__ or error
    both = message if cause is error else f"{message}\n{cause}"
    in_file = f" (in {file}.yaml)" if (file := _found(r"^In '(.+?)': ", message)) else ""
    key = re.sub(r"\[\d+\]$", "", _found(r"full_key: (\S+)", both))
    if key and re.search(r"^Key '.*' (is )?not in ", both, re.MULTILINE):
        return unknown_key(key) + in_file
    if key and "missing mandatory value" in both:
        return _missing(key) + in_file
    if key and re.search(r"could not be converted|not a valid bool|assigned|not Optional", both):
        words = [word.partition("=")[2] for word in overrides if key_of(word) == key]
        given = _found(r"Value '(.*?)' (?:of type|is not)", both)
        is_list = words and words[-1].startswith("[")
        return wrong_value(key, words[-1] if is_list or (words and not given) else given) + in_file
    return both


def key_of(word: str) -> str:
    """`model.layers` of `+model.layers=3`."""
    return word.lstrip("+~").partition("=")[0].partition("@")[0]


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    return match[1] if match else ""


def unknown_key(key: str) -> str:
    """What is said about a key that no setting has, or that belongs to another choice of its group."""
    known = settings() | _of_a_device()
    if key in known and known[key].owners:
        return f"'{key}' is a setting of {' and '.join(known[key].owners)}, which is not what this command uses"
    meant = did_you_mean(key, [*known, *GROUPS])
    return f"unknown key '{key}'{'.' if meant else ''}{meant} (pipetrain --help lists every key)"


def unknown_choice(group: str, given: str, folders: Sequence[Path]) -> str:
    """What is said about `model=transformr`; nothing if `group` is none of pipetrain's."""
    names = choices(folders).get(group)
    return f"{KEYS.get(group, group)}={given}: no such {group}. {one_of(given, names)}" if names else ""


def _of_a_device() -> dict[str, Setting]:
    """The keys of a description in conf/device; without one there are none."""
    return {setting.key: setting for setting in fields_of(DeviceConfig, "plan.device.")}


def _missing(key: str) -> str:
    described = _of_a_device()
    if key not in described:
        return f"{key} has no value"
    every = ", ".join(other.rpartition(".")[2] for other in described)
    return f"{key} is missing ({described[key].help}); the description of a device needs all of {every}"


def wrong_value(key: str, given: str) -> str:
    """What is said about a value of the wrong type."""
    setting = (settings() | _of_a_device()).get(key)
    if setting is None:
        inner = next((name for name in settings() if name.startswith(f"{key}.")), "those of pipetrain --help")
        return f"{key}={given} cannot be: {key} holds several settings, such as {inner}"
    wanted, optional = _describe(setting.type)
    if optional and given.lower() in ("none", "off", "no", "false", "nil", ""):
        return f"{setting.key}={given} must be {wanted}; use null to switch it off"
    return f"{setting.key}={given} must be {wanted}" + (", or null" if optional else "")


def _describe(type_: Any) -> tuple[str, bool]:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    if isinstance(type_, types.UnionType):
        inner = next(arg for arg in typing.get_args(type_) if arg is not type(None))
        return names.get(inner, str(inner)), True
    if typing.get_origin(type_) is list and typing.get_args(type_) == (int,):
        return "a list of whole numbers in brackets, such as [2,3]", False
    if _takes_list(type_):
        return "a list of numbers in brackets, such as [0.9,0.95]", False
    return names.get(type_, "a value"), False


def _takes_list(type_: Any) -> bool:
    return type_ is Any or typing.get_origin(type_) is list


def bad_syntax(word: str) -> str:
    """What is said about an argument that cannot be read as key=value."""
    if "=" not in word:
        return f"'{word}' is not key=value (pipetrain --help lists every key)"
    key, _, value = word.partition("=")
    if value.count("[") != value.count("]") or value.count("{") != value.count("}"):
        return f"'{word}' has a bracket without its partner; in most shells a list needs quotes: '{key}=[2,3]'"
    return (
        f"'{word}' cannot be read. A value with spaces, quotes, brackets, = # ~ ; ! & < > ( ) or letters that are not "
        f"ASCII needs two pairs of quotes: '{key}=\"{value}\"'"
    )


def several_values(word: str) -> str:
    """What is said about `devices=1,2` without -m."""
    key, _, value = word.partition("=")
    setting = settings().get(key)
    a_list = f", or brackets for one list ({key}=[{value}])" if setting and _takes_list(setting.type) else ""
    return f"{word} holds several values: add -m to run one after the other (pipetrain -m {word}){a_list}"


def needless_plus(word: str) -> str:
    """What is said about `+steps=3`; nothing if the key is not one of pipetrain's."""
    plain = word.removeprefix("+")
    known = plain.partition("=")[0] in (*settings(), *GROUPS)
    return f"{word}: the key exists already; leave the + out: {plain}" if known else ""

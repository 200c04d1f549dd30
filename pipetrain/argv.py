"""What is done to the words of the command line before Hydra reads them.

`pipetrain my.yaml`, `resume=RUN`, `key=~/x` and torchrun's environment are turned into plain `key=value`
words and a configuration file; mistakes that Hydra would answer badly are answered here. Text only: no Hydra.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pipetrain import mistakes
from pipetrain.errors import ConfigError
from pipetrain.paths import RunPaths

BUILT_IN = "config"
_START_OF_A_FILE = "defaults:\n  - config\n  - _self_"


@dataclass
class Words:
    """The rewritten command line: settings, and the file that they start from."""

    overrides: list[str] = field(default_factory=list)
    config_dir: str | None = None
    config_name: str | None = None
    resume: Path | None = None


def rewrite(words: Sequence[str], rank: int | None) -> Words:
    """Turns what the user typed into what Hydra understands.

    Args:
        words: the arguments that are no flags.
        rank: this process's rank under torchrun, else None. Only rank 0 writes files.

    Raises:
        ConfigError: if a word is not key=value, or a file or run folder is not there.
    """
    result = Words()
    for word in map(_expand_home, words):
        if "=" not in word and word.endswith((".yaml", ".yml")):
            _use_file(Path(word), result)
        elif word.startswith("~"):
            raise ConfigError(f"{word}: a setting cannot be taken away; give it another value, or null")
        elif "=" not in word:
            raise ConfigError(mistakes.bad_syntax(word))
        elif word.startswith("+") and (answer := mistakes.needless_plus(word)):
            raise ConfigError(answer)
        elif word.startswith("resume=") and word not in ("resume=null", "resume="):
            result.resume = _run_folder(_unquoted(word.removeprefix("resume=")))
        elif word.startswith("plan.device="):  # a file of conf/device
            result.overrides.append(word.replace("plan.device=", "device@plan.device=", 1))
        else:
            result.overrides.append(word)
    _check_described(result)
    if result.resume is not None:
        _replay(result.resume, result)
    if result.resume is not None and any(w.startswith("action=") and w != "action=train" for w in words):
        # The run stays what it is: what is asked of it now is not written down as its settings.
        result.overrides += ["hydra.output_subdir=null", "hydra/job_logging=none"]
    if rank:
        result.overrides += ["hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=none"]
    return result


def _check_described(words: Words) -> None:
    """A number of a device's description needs the description."""
    numbers = [word for word in words.overrides if word.startswith("plan.device.")]
    is_named = any(word.startswith("device@plan.device=") for word in words.overrides)
    if numbers and not is_named and words.config_name is None:
        raise ConfigError(f"{numbers[0]} changes the description of a device: say of which one, as plan.device=h200")


def refuse_flags(unknown: Sequence[str], words: Sequence[str]) -> None:
    """Answers `--devices=4` and `--devices 4`.

    Raises:
        ConfigError: if there is any unknown flag.
    """
    if unknown:
        name = unknown[0].lstrip("-")
        value = next((word for word in words if "=" not in word), "VALUE")
        wanted = name if "=" in name else f"{name}={value}"
        raise ConfigError(f"{unknown[0]}: settings are key=value without dashes: try '{wanted}'")


def quoted(text: str) -> str:
    """`text` as a value that Hydra's grammar reads back unchanged."""
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", text)
    trailing = len(escaped) - len(escaped.rstrip("\\"))
    return f"'{escaped}{chr(92) * trailing}'"


def _expand_home(word: str) -> str:
    key, equals, value = word.partition("=")
    if equals and (value == "~" or value.startswith("~/")):
        return f"{key}={quoted(str(Path(value).expanduser()))}"
    return word


def _unquoted(value: str) -> str:
    if len(value) >= 2 and value[0] == value[-1] and value[0] in "'\"":
        return value[1:-1].replace(f"\\{value[0]}", value[0])
    return value


def _use_file(path: Path, result: Words) -> None:
    if result.config_name is not None:
        raise ConfigError(f"{path}: one file of settings at a time; {result.config_name}.yaml was given before")
    if not path.is_file():
        raise ConfigError(f"{path}: no such file (looked in {Path.cwd()})")
    if path.suffix != ".yaml":
        raise ConfigError(f"{path}: the name must end in .yaml; rename it to {path.with_suffix('.yaml')}")
    if path.stem == BUILT_IN:
        raise ConfigError(f"{path}: this name belongs to pipetrain's own file; rename yours, for example to my.yaml")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {error}") from None
    defaults = content.get("defaults") if isinstance(content, dict) else None
    if not isinstance(defaults, list) or BUILT_IN not in defaults:
        raise ConfigError(f"{path} must start from pipetrain's settings. Put this at its top:\n{_START_OF_A_FILE}")
    result.config_dir, result.config_name = str(path.resolve().parent), path.stem


def _run_folder(given: str) -> Path:
    run = Path(given).expanduser()
    if RunPaths(run).overrides.is_file():
        return run.resolve()
    what = "is no run folder" if run.is_dir() else "does not exist"
    newest = sorted(Path("runs").glob("*/*/.hydra/overrides.yaml"), key=lambda path: path.stat().st_mtime, reverse=True)
    there = "".join(f"\n  resume={path.parent.parent}" for path in newest[:5])
    raise ConfigError(
        f"resume={given} {what}. A run folder is what an earlier `pipetrain` made, such as runs/NAME/TIME-ID: it holds "
        f".hydra/overrides.yaml and status.json." + (f" The newest ones here:{there}" if there else "")
    )


def _replay(run: Path, result: Words) -> None:
    """Puts the words of the earlier run before the new ones, and its file back."""
    if result.config_name is not None:
        raise ConfigError(f"resume takes its settings from the run; leave {result.config_name}.yaml out")
    typed = {mistakes.key_of(word) for word in result.overrides}
    if "init_from" in typed:
        raise ConfigError(f"resume={run} goes on with a run, init_from=RUN starts a new one: leave one of them out")
    saved: list[str] = _load(RunPaths(run).overrides) or []
    old = [word for word in saved if mistakes.key_of(word) not in {*typed, "resume"}]
    folder = [f"resume={quoted(str(run))}", f"hydra.run.dir={quoted(str(run))}", "hydra.mode=RUN"]
    result.overrides = [*old, *result.overrides, *folder]
    hydra = _load(RunPaths(run).overrides.with_name("hydra.yaml"))["hydra"]
    name = hydra["job"]["config_name"]
    if name == BUILT_IN:
        return
    sources = [source["path"] for source in hydra["runtime"]["config_sources"] if source["provider"] == "command-line"]
    if not sources or not (Path(sources[0]) / f"{name}.yaml").is_file():
        lost = Path(*sources[:1], f"{name}.yaml")
        raise ConfigError(f"resume={run}: it was started from {lost}, which is not there any more")
    result.config_dir, result.config_name = sources[0], name


def _load(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read, so the run cannot go on: {error}") from None

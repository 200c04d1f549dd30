"""What `pipetrain --help` prints: every key from the dataclasses of `config`, every choice from the YAML files."""

import dataclasses
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pipetrain
from pipetrain.config import SCHEMAS, Config

GROUPS = (*SCHEMAS, "lr_rule", "experiment", "device")  # the folders of conf/
KEYS = {"device": "plan.device"}  # of groups that are typed by another name than their folder's
VERSION = f"pipetrain {pipetrain.__version__}"

_EXAMPLES = (
    ("pipetrain experiment=demo", "a first run: two stages on this machine"),
    ("pipetrain model=transformer_small devices=4", "four GPUs, or four CPU processes where there is no GPU"),
    ("pipetrain data.path=book.txt steps=1000", "your own text"),
    ("pipetrain my.yaml devices=2", "your own settings in a file that starts with: defaults: [config, _self_]"),
    ("pipetrain -m devices=1,2,4", "a sweep: one run after the other, with a table at the end"),
    ("pipetrain action=plan devices=4 schedule=1f1b", "what would happen: the stages, and the schedule as a picture"),
    ("pipetrain action=check devices=2", "do the guarantees hold for these settings? Some steps against plain PyTorch"),
    ("pipetrain resume=runs/NAME/RUN steps=600", "go on with a run, in its folder and with its settings"),
    ("pipetrain action=generate resume=runs/NAME/RUN input=lines.txt", "translate, or go on with texts, line by line"),
    ("pipetrain action=evaluate resume=runs/NAME/RUN", "how good is it on data that it has not seen?"),
    ("pipetrain model=transformer_tiny --cfg job", "show the settings and stop"),
    ("tensorboard --logdir runs", "look at the runs"),
)
_FLAGS = (
    ("-m, --multirun", "run every combination of the values that are separated by commas"),
    ("--cfg job", "print the settings of this command and stop (--resolve: with ${...} filled in)"),
    ("--info defaults-tree", "print which file includes which"),
    ("--version", "print the version"),
    ("-sc install=bash", 'print the tab completion (zsh, fish): eval "$(pipetrain -sc install=bash)"'),
    ("--hydra-help", "print the help of Hydra, which reads the settings"),
)
_FOLDERS = (
    ("hydra.run.dir=DIR", "the folder of the run; default runs/<name>/<time>-<id>"),
    ("hydra.sweep.dir=DIR", "the folder of a sweep; given again, its finished runs are skipped"),
    ("PIPETRAIN_CONF=DIR", "environment: a folder of your own YAML files (DIR/model/mine.yaml); it goes first"),
    ("HYDRA_FULL_ERROR=1", "environment: errors about settings with their traceback"),
)
_EXIT_CODES = (
    "Exit codes: 0 done, 1 failed, 2 wrong settings, 3 no usable checkpoint, 5 loss not finite,\n"
    "75 preempted and saved, 130 Ctrl-C, 143 stopped before there was anything to save."
)


@dataclass(frozen=True)
class Setting:
    """One key of the command line; `owners` are the choices that have it, such as `optimizer=sgd`."""

    key: str
    type: Any
    default: Any
    help: str
    owners: tuple[str, ...] = ()


def settings(values: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Setting]:
    """Every key that can be typed, in the order of the schema.

    Where several choices have a key, what it means is what it means to the one that is chosen in `values`.
    """
    found: dict[str, Setting] = {}
    for setting in fields_of(Config, ""):
        if not dataclasses.is_dataclass(setting.type):
            found[setting.key] = setting
            continue
        found.update({inner.key: inner for inner in fields_of(setting.type, f"{setting.key}.")})
        chosen = values.get(f"{setting.key}.name")
        for choice, schema in sorted(SCHEMAS.get(setting.key, {}).items(), key=lambda item: item[0] == chosen):
            for inner in fields_of(schema, f"{setting.key}."):
                if inner.key not in found or found[inner.key].owners:
                    before = found[inner.key].owners if inner.key in found else ()
                    owners = (*before, f"{setting.key}={choice}")
                    found[inner.key] = dataclasses.replace(inner, owners=owners)
    return found


def fields_of(schema: Any, prefix: str) -> Iterable[Setting]:
    """The keys of one dataclass."""
    types_of = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        yield Setting(prefix + field.name, types_of[field.name], default, field.metadata.get("help", ""))


def choices(folders: Sequence[Path]) -> dict[str, list[str]]:
    """What `model=`, `data=` and the other groups can be: the YAML files below `folders`."""
    return {
        group: sorted(
            {
                path.relative_to(folder / group).with_suffix("").as_posix()
                for folder in folders
                for path in (folder / group).rglob("*.yaml")
            }
        )
        for group in GROUPS
    }


def text(values: Mapping[str, Any], folders: Sequence[Path]) -> str:
    """What `pipetrain --help` prints; `values` are the settings that the command would run with."""
    parts = [
        f"{VERSION}: pipeline-parallel training, driven by key=value settings",
        _table(_EXAMPLES),
        "Files to choose from, as in model=transformer_tiny\n"
        + _table([(KEYS.get(group, group), ", ".join(names)) for group, names in choices(folders).items()]),
    ]
    rows: dict[str, list[tuple[str, str, str]]] = {}
    for setting in settings(values).values():
        chosen = not setting.owners or setting.key in values
        title = "Settings and their values here" if chosen else f"Only with {', '.join(setting.owners)}"
        shown = _show(values.get(setting.key, setting.default))
        rows.setdefault(title, []).append((setting.key, shown, setting.help))
    parts += [f"{title}\n{_table(lines)}" for title, lines in rows.items()]
    parts += ["Flags\n" + _table(_FLAGS), "Folders and environment\n" + _table(_FOLDERS), _EXIT_CODES]
    return "\n\n".join(parts)


def _show(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    if isinstance(value, list):
        return "[" + ",".join(map(_show, value)) + "]"
    return "" if value in (dataclasses.MISSING, "???") else str(value)


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    lines = [[*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]] for row in rows]
    return "\n".join("  " + "  ".join(line) for line in lines)

"""The command line: words -> one typed `Config` -> `launch`. The only file that sees Hydra and OmegaConf.

Hydra composes the YAML files of `conf/` and the overrides; `argv` prepares the words before it, `mistakes`
rewrites its errors after it. No torch here: it is imported with `launch`, when a run really starts.
"""

import functools
import os
import secrets
import signal
import sys
import traceback
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import hydra.version
import yaml

# `hydra.main` would read sys.argv by itself; these two, which it calls, take the words as they are.
from hydra import compose, initialize_config_dir
from hydra._internal.utils import _run_hydra, get_args_parser
from hydra.core.config_search_path import ConfigSearchPath, SearchPathQuery
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pipetrain import argv, help, mistakes
from pipetrain.config import SCHEMAS, Config, DeviceConfig
from pipetrain.errors import ConfigError, Exit, PipetrainError
from pipetrain.footprint import Footprint
from pipetrain.paths import RunPaths
from pipetrain.processes import prepare_fork_server
from pipetrain.schedule import is_file
from pipetrain.sweep import Sweep, slug
from pipetrain.torchrun import torchrun_rank

_NO_FOLDER = (PermissionError, NotADirectoryError, FileExistsError, FileNotFoundError)
_FRONT_END_ERRORS = (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError, *_NO_FOLDER)


@dataclass
class _Session:
    """What one call of `main` has done so far: Hydra's callbacks and the job have no other way to tell."""

    rank: int | None = None
    resume: Path | None = None
    config_dir: str | None = None
    footprint: Footprint | None = None
    sweep: Sweep | None = None
    launched: bool = False
    error: Exception | None = None
    code: int = 0


_session = _Session()


class _Refusal(BaseException):
    """Carries an error past Hydra, which turns an Exception of a callback into a warning."""

    def __init__(self, error: ConfigError) -> None:
        super().__init__(str(error))
        self.error = error


class Guard(Callback):
    """Hydra's callback (named in conf/config.yaml): looks at a folder before Hydra writes into it."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        if _session.rank or not _resolves(config, "hydra.run.dir"):
            return
        folder = Path(config.hydra.run.dir).absolute()
        held = RunPaths(folder).status.exists() or RunPaths(folder).overrides.parent.exists()
        if held and _session.resume is None:
            given = config.hydra.run.dir
            text = f"hydra.run.dir={given} already holds a run. Go on with it: resume={given}, or choose another folder"
            raise _Refusal(ConfigError(f"{text}. Nothing was written"))
        _session.footprint = Footprint(folder)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        if _session.rank is not None:
            raise _Refusal(ConfigError("-m cannot run under torchrun: start one torchrun for each job"))
        if not _resolves(config, "hydra.sweep.dir"):
            return
        _session.sweep = Sweep(Path(config.hydra.sweep.dir).absolute())
        _session.footprint = Footprint(_session.sweep.folder)


def _resolves(config: DictConfig, key: str) -> bool:
    """Whether the value can be read; if not, Hydra says so a moment later, before it writes anything."""
    try:
        return bool(OmegaConf.select(config, key))
    except OmegaConfBaseException:
        return False


class _UserConfDir(SearchPathPlugin):
    """Puts the folder named by PIPETRAIN_CONF before the built-in one; behind it, for --help, that of --config-dir."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        if folder := os.environ.get("PIPETRAIN_CONF"):
            path = f"file://{Path(folder).expanduser().absolute()}"
            search_path.prepend("PIPETRAIN_CONF", path, anchor=SearchPathQuery(provider="main"))
        if _session.config_dir is not None:
            search_path.append("command-line", f"file://{Path(_session.config_dir).absolute()}")


def conf_dir() -> Path:
    """The built-in YAML files: beside this file in a wheel, one level up in a checkout."""
    here = Path(__file__).resolve().parent
    for folder in (here / "conf", here.parent / "conf"):
        if (folder / "config.yaml").is_file():
            return folder
    raise FileNotFoundError(f"pipetrain's own conf/config.yaml is missing: looked in {here} and {here.parent}")


@functools.cache
def _register() -> None:
    """Makes the schemas, the resolvers of conf/ and PIPETRAIN_CONF known to Hydra."""
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    for group, schemas in SCHEMAS.items():
        for name, schema in schemas.items():
            node = OmegaConf.structured(schema)
            for field in fields(schema):
                if field.default_factory is dict:  # any key may be typed there, such as model.arguments.width=64
                    OmegaConf.set_struct(node[field.name], False)
            store.store(group=f"schema/{group}", name=name, node=node)
    store.store(group="schema/device", name="device", node=DeviceConfig)
    OmegaConf.register_new_resolver("pipetrain.id", lambda: secrets.token_hex(2), use_cache=True)
    OmegaConf.register_new_resolver("pipetrain.slug", slug)
    Plugins.instance().register(_UserConfDir)


def _help(args: Namespace) -> str:
    """The text of --help, with the values that the command would run with.

    Not by Hydra's own --help: it looks through all groups twice, for a second, and has no texts for keys.
    """
    _session.config_dir = args.config_dir
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        settings = compose(args.config_name or argv.BUILT_IN, args.overrides)
    values = {key: OmegaConf.select(settings, key) for key in help.settings() if _has(settings, key)}
    plain = {key: OmegaConf.to_object(value) if OmegaConf.is_config(value) else value for key, value in values.items()}
    return help.text(plain, _folders(args.config_dir))


def _has(settings: DictConfig, key: str) -> bool:
    parent, _, name = key.rpartition(".")
    node = OmegaConf.select(settings, parent) if parent else settings
    return node is not None and name in node


def _folders(config_dir: str | None = None) -> list[Path]:
    """Where YAML files are looked for, the built-in folder last."""
    user = [Path(folder).expanduser() for folder in (os.environ.get("PIPETRAIN_CONF"), config_dir) if folder]
    return [*user, conf_dir()]


def typed(raw: DictConfig) -> Config:
    """The composed settings as dataclasses.

    Raises:
        ConfigError: if a key is not in the schema (`+key=` gets it past Hydra) or a value is missing.
    """
    try:
        cfg = OmegaConf.to_object(raw)
    except OmegaConfBaseException as error:
        raise ConfigError(mistakes.explain(error, (), _folders())) from error
    if not isinstance(cfg, Config):
        raise ConfigError("the settings do not start from pipetrain's own: put `- config` first in the defaults list")
    if unknown := _keys_outside_schema(cfg, ""):
        raise ConfigError("\n".join(map(mistakes.unknown_key, unknown)))
    return cfg


def _keys_outside_schema(node: Any, prefix: str) -> list[str]:
    known = {field.name for field in fields(node)}
    unknown = [prefix + name for name in vars(node) if name not in known]
    for name in known:
        if is_dataclass(value := getattr(node, name)):
            unknown += _keys_outside_schema(value, f"{prefix}{name}.")
    return unknown


def _job(raw: DictConfig) -> None:
    """What Hydra calls once for each run."""
    settings = HydraConfig.get()
    folder = Path(settings.runtime.output_dir)
    if _session.sweep is not None:
        _session.sweep.run(folder, list(settings.overrides.task), lambda: _launch(raw, folder))
        return
    try:
        _session.code = _launch(raw, folder)
    except Exception as error:  # raised again by main: Hydra would put a line of its own before it
        _session.error = error


def _launch(raw: DictConfig, folder: Path) -> int:
    cfg = typed(raw)
    if cfg.resume is not None and _session.resume is None:
        raise ConfigError("resume=RUN belongs on the command line, not in a file: it decides which files are read")
    if _session.sweep is not None and any(RunPaths(folder).checkpoints.glob("*")):
        cfg.resume = str(folder)
    if is_file(cfg.schedule):
        cfg.schedule = str(Path(cfg.schedule).expanduser().absolute())  # a resume may come from another folder
    prepare_fork_server()  # it imports torch beside us
    if cfg.action == "check":
        from pipetrain.check.run import check

        _session.launched = True
        try:
            return check(cfg, folder)
        finally:
            if _session.sweep is None and _session.footprint is not None:
                _session.footprint.undo()
    if cfg.action == "plan":
        from pipetrain.preview import preview

        return preview(cfg, folder)
    if cfg.action == "generate":
        from pipetrain.inference.generate import generate

        _session.launched = True
        return generate(cfg, folder)
    if cfg.action == "evaluate":
        from pipetrain.inference.evaluate import evaluate

        _session.launched = True
        return evaluate(cfg, folder)
    from pipetrain.launch import launch

    _session.launched = True
    return int(launch(cfg, folder))


def main(words: Sequence[str] | None = None) -> int:
    """Runs one command, `pipetrain WORDS`, and returns its exit code."""
    global _session
    _session = _Session(rank=torchrun_rank(os.environ))
    full_error = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises its errors instead of printing them
    before = {number: signal.signal(number, _stopped) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        code = _main(sys.argv[1:] if words is None else list(words), full_error == "1")
        sys.stdout.flush()
    except BrokenPipeError:  # `pipetrain --help | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = Exit.DONE
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        os.environ.pop("HYDRA_FULL_ERROR")
        if full_error is not None:
            os.environ["HYDRA_FULL_ERROR"] = full_error
    return int(code)


def _stopped(number: int, frame: FrameType | None) -> NoReturn:
    """Ctrl-C or SIGTERM while no worker runs: nothing to save. (An exception amid an import would abort noisily.)"""
    if _session.sweep is None and _session.footprint is not None:
        _session.footprint.undo()
    elif _session.sweep is not None and _session.sweep.jobs:
        _session.sweep.print_table()
    print("interrupted", file=sys.stderr)
    sys.stdout.flush()
    os._exit(Exit.INTERRUPTED if number == signal.SIGINT else Exit.TERMINATED)


def _main(words: list[str], show_traceback: bool) -> int:
    args = Namespace(overrides=[], config_dir=None)
    try:
        _register()
        parser = _parser()
        if "--version" in words:
            print(help.VERSION)
            return Exit.DONE
        _prepare(args, parser, words)
        if args.help:
            print(_help(args))
            return Exit.DONE
        hydra.version.setbase("1.3")
        _run_hydra(args, parser, _job, str(conf_dir()), argv.BUILT_IN)
        if _session.error is not None:
            raise _session.error
    except (_Refusal, PipetrainError, *_FRONT_END_ERRORS) as error:
        return _failed(error, args, show_traceback)
    except SystemExit as stop:  # Hydra's after --help and --info, or a sweep that was told to stop
        _session.code = stop.code if isinstance(stop.code, int) else Exit.DONE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        _session.code = Exit.INTERRUPTED
    finally:
        if _session.sweep is not None and _session.sweep.jobs:
            _session.sweep.print_table()
    return _session.code or (_session.sweep.code if _session.sweep is not None else Exit.DONE)


def _failed(error: BaseException, args: Namespace, show_traceback: bool) -> int:
    if isinstance(error, _Refusal):
        error = error.error
    if _session.launched and not isinstance(error, PipetrainError):
        raise error  # not a wrong setting but a fault of the program: with its traceback
    code = error.exit_code if isinstance(error, PipetrainError) else Exit.BAD_SETTINGS
    if code == Exit.BAD_SETTINGS and _session.footprint is not None and not (_session.sweep and _session.sweep.jobs):
        _session.footprint.undo()
    if show_traceback:
        traceback.print_exception(error)
    known = isinstance(error, PipetrainError)
    text = str(error) if known else mistakes.explain(error, args.overrides, _folders(args.config_dir))
    print(f"error: {text}", file=sys.stderr)
    return code


def _parser() -> ArgumentParser:
    """Hydra's own parser, with errors that are raised instead of printed beside a page of usage."""

    def refuse(message: str) -> NoReturn:
        raise ConfigError(f"{message} (pipetrain --help lists the flags)")

    parser: ArgumentParser = get_args_parser()
    parser.error = refuse  # type: ignore[method-assign]
    return parser


def _prepare(args: Namespace, parser: ArgumentParser, words: list[str]) -> None:
    """Fills `args` with Hydra's flags and the rewritten words."""
    parsed, unknown = parser.parse_known_intermixed_args(words)
    vars(args).update(vars(parsed))
    argv.refuse_flags(unknown, args.overrides)
    if args.multirun and (args.cfg or args.info):
        raise ConfigError("--cfg and --info show one run: leave -m out, and give one value for each key")
    for folder in _folders()[:-1]:
        if not folder.is_dir():
            raise ConfigError(f"the environment says PIPETRAIN_CONF={folder}, but there is no such folder")
    if args.shell_completion or args.hydra_help:
        return
    rewritten = argv.rewrite(args.overrides, _session.rank)
    _session.resume = rewritten.resume
    if _session.resume and args.multirun:
        raise ConfigError("resume=RUN goes on with one run: leave -m out")
    args.overrides = rewritten.overrides
    args.config_dir = rewritten.config_dir or args.config_dir
    args.config_name = rewritten.config_name or args.config_name

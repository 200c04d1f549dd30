"""The command line: what every command runs, what every mistake is answered, and which files it leaves."""

import logging
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from launch_stub import Launch, files, launch  # noqa: F401

from pipetrain import argv, cli, help, mistakes, rules
from pipetrain.config import (
    AdamConfig,
    AnythingConfig,
    Config,
    SgdConfig,
    TextConfig,
    TransformerConfig,
    from_json,
    to_json,
)
from pipetrain.errors import CheckpointError, ConfigError, Exit
from pipetrain.suggest import did_you_mean

ROOT = Path(__file__).resolve().parents[1]
CONF = ROOT / "conf"


def run_python(*words: str, stdout: int = subprocess.PIPE) -> "subprocess.CompletedProcess[str]":
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *words]
    return subprocess.run(
        command, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=60, env=environ, check=False
    )


# --- mistakes ---------------------------------------------------------------------------------------------------

MISTAKES = [
    (["modle=x"], "unknown key 'modle'. Did you mean 'model'?"),
    (["layers=3"], "unknown key 'layers'. Did you mean 'model.layers'?"),
    (["eps=1"], "Did you mean 'optimizer.eps'?"),
    (["zzzz=1"], "unknown key 'zzzz' (pipetrain --help lists every key)"),
    (["model.layer=3"], "Did you mean 'model.layers'?"),
    (["hydra.rn.dir=x"], "unknown key 'hydra.rn'"),
    (
        ["optimizer=sgd", "optimizer.betas=[1,2]"],
        "'optimizer.betas' is a setting of optimizer=adamw and optimizer=adam",
    ),
    (["plan.device=h20"], "plan.device=h20: no such device. Did you mean 'h200'? Choose one of: a100, "),
    (
        ["plan.device.memory_gib=3"],
        "plan.device.memory_gib=3 changes the description of a device: say of which one, as",
    ),
    (["model=transformr"], "no such model. Did you mean 'transformer'? Choose one of: amoebanet, "),
    (["model=transformer_tni"], "Did you mean 'transformer_tiny'?"),
    (["model="], "model=: no such model. Choose one of: "),
    (["model=null"], "model=null: no such model. Choose one of: "),
    (
        ["experiment=nope"],
        "experiment=nope: no such experiment. Choose one of: amoebanet_paper, deep, demo, fashion_mnist, libreoffice",
    ),
    (["hydra/launcher=nope"], "Available options in 'hydra/launcher'"),
    (["steps=1.5"], "steps=1.5 must be a whole number"),
    (["model.layers=null"], "model.layers=null must be a whole number"),
    (["model.tied=maybe"], "model.tied=maybe must be true or false"),
    (["optimizer.betas=0.9"], "optimizer.betas=0.9 must be a list of numbers in brackets"),
    (["optimizer.betas=[a,b]"], "optimizer.betas=[a,b] must be a list of numbers"),
    (["eval=3"], "eval=3 cannot be: eval holds several settings, such as eval.every"),
    (["logit_clip=None"], "logit_clip=None must be a number; use null to switch it off"),
    (["logit_clip=off"], "use null to switch it off"),
    (["grad_clip=off"], "use null to switch it off"),
    (["--devices=4"], "--devices=4: settings are key=value without dashes: try 'devices=4'"),
    (["--devices", "4"], "try 'devices=4'"),
    (["--cfg", "nope"], "invalid choice: 'nope'"),
    (["-m", "--cfg", "job"], "--cfg and --info show one run: leave -m out"),
    (["name=a=b"], "needs two pairs of quotes: 'name=\"a=b\"'"),
    (["name=é"], "needs two pairs of quotes: 'name=\"é\"'"),
    (["devices=[0,1"], "'devices=[0,1' has a bracket without its partner"),
    (["train"], "'train' is not key=value"),
    (["devices=1,2"], "add -m to run one after the other (pipetrain -m devices=1,2), or brackets for one list"),
    (["steps=1,2"], "add -m to run one after the other (pipetrain -m steps=1,2)"),
    (["+modle=x"], "unknown key 'modle'. Did you mean 'model'?"),
    (["++modle=x"], "unknown key 'modle'. Did you mean 'model'?"),
    (["++model.layer=3"], "unknown key 'model.layer'. Did you mean 'model.layers'?"),
    (["+steps=3"], "+steps=3: the key exists already; leave the + out: steps=3"),
    (["+experiment=demo"], "leave the + out: experiment=demo"),
    (["~model.layers"], "~model.layers: a setting cannot be taken away"),
    (["name=${foo}"], "${foo}: unknown key 'foo'"),
    (["nope.yaml"], "nope.yaml: no such file"),
    (["resume=nope"], "resume=nope does not exist. A run folder is what an earlier `pipetrain` made"),
    (["-m", "devices=1,2", "model.layers=2,x"], "model.layers=x must be a whole number"),
    (["-m", "modle=1,2"], "unknown key 'modle'"),
]


@pytest.mark.parametrize(
    ("words", "text"), MISTAKES, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_mistake_is_answered(
    words: list[str], text: str, launch: Launch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words) == Exit.BAD_SETTINGS
    out, err = capsys.readouterr()
    assert err.startswith("error: ")
    assert text in err
    assert "Traceback" not in err
    assert "Error executing job" not in err
    assert out == ""
    assert not launch.calls
    assert list(tmp_path.iterdir()) == []


def test_brackets_are_not_offered_for_a_number(launch: Launch, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["steps=1,2"])
    assert "brackets" not in capsys.readouterr().err


def test_full_error_shows_the_traceback(
    launch: Launch, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    assert cli.main(["modle=x"]) == Exit.BAD_SETTINGS
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "error: unknown key 'modle'" in err
    assert os.environ["HYDRA_FULL_ERROR"] == "1"


@pytest.mark.parametrize(
    ("given", "meant"),
    [("layers", "model.layers"), ("eps", "optimizer.eps"), ("lr", "optimizer.lr"), ("batch", "batch_size")],
)
def test_suggestions(given: str, meant: str) -> None:
    assert did_you_mean(given, list(help.settings())) == f" Did you mean '{meant}'?"


# --- a run ------------------------------------------------------------------------------------------------------


def test_defaults_reach_launch_as_dataclasses(launch: Launch, tmp_path: Path) -> None:
    assert cli.main([]) == 0
    cfg = launch.cfg
    assert (cfg.name, cfg.steps, cfg.eval.every, cfg.checkpoint.every) == ("transformer", 300, 50, 100)
    assert (cfg.model, cfg.data) == (TransformerConfig(), TextConfig())
    assert cfg.optimizer == AdamConfig(name="adamw", lr=1e-3, weight_decay=0.1, betas=[0.9, 0.95])
    assert (cfg.lr_rule.name, cfg.lr_rule.warmup_steps, cfg.lr_rule.decay_steps) == ("constant", 20, None)
    assert launch.folder.parent == tmp_path / "runs" / "transformer"
    assert sorted(files(launch.folder)) == [".hydra/config.yaml", ".hydra/hydra.yaml", ".hydra/overrides.yaml"]


def test_values_of_the_command_line(launch: Launch) -> None:
    words = [
        "model=transformer_tiny",
        "devices=[0,1]",
        "balance=[3,1]",
        "logit_clip=5",
        "optimizer=sgd",
        "grad_clip=null",
    ]
    assert cli.main(words) == 0
    cfg = launch.cfg
    assert isinstance(cfg.model, TransformerConfig)
    assert (cfg.model.layers, cfg.model.d_model) == (2, 32)
    assert (cfg.devices, cfg.balance, cfg.logit_clip, cfg.grad_clip) == ([0, 1], [3, 1], 5.0, None)
    assert type(cfg.devices) is list
    assert isinstance(cfg.optimizer, SgdConfig)
    assert from_json(to_json(cfg)) == cfg


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        ([], {}),
        (["model.arguments.width=8", "model.arguments.names=[a,b]"], {"width": 8, "names": ["a", "b"]}),
        (["model.arguments={width: 8, inner: {depth: 2}}"], {"width": 8, "inner": {"depth": 2}}),
    ],
)
def test_any_key_may_be_an_argument_of_a_factory(words: list[str], arguments: dict[str, Any], launch: Launch) -> None:
    assert cli.main(["model=anything", "model.factory=my:build", *words]) == 0
    assert launch.cfg.model == AnythingConfig(factory="my:build", arguments=arguments)
    assert from_json(to_json(launch.cfg)) == launch.cfg


@pytest.mark.parametrize("code", [1, 75, 130])
def test_exit_code_is_the_one_of_launch(code: int, launch: Launch) -> None:
    launch.result = code
    assert cli.main([]) == code


def test_error_of_launch_keeps_its_code_and_folder(launch: Launch, capsys: pytest.CaptureFixture[str]) -> None:
    launch.result = CheckpointError("no checkpoint here")
    assert cli.main([]) == Exit.NO_CHECKPOINT
    assert capsys.readouterr().err == "error: no checkpoint here\n"
    assert launch.folder.is_dir()


def test_fault_of_the_program_is_not_called_a_wrong_setting(launch: Launch) -> None:
    launch.result = ValueError("a bug")
    with pytest.raises(ValueError, match="a bug"):
        cli.main([])


def test_refused_settings_leave_no_folder(launch: Launch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    launch.result = ConfigError("balance=[2,3] is wrong")
    assert cli.main(["name=x"]) == Exit.BAD_SETTINGS
    assert capsys.readouterr().err == "error: balance=[2,3] is wrong\n"
    assert list(tmp_path.iterdir()) == []


def test_refused_settings_keep_what_was_there(launch: Launch, tmp_path: Path) -> None:
    launch.result = ConfigError("no")
    (tmp_path / "runs").mkdir()
    (tmp_path / "mine").mkdir()
    cli.main([])
    cli.main(["hydra.run.dir=mine"])
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["mine", "runs"]

    def leaves_something(cfg: Config, folder: Path) -> int:
        (folder / "notes.txt").write_text("x")
        raise ConfigError("no")

    launch.result = leaves_something
    cli.main([])
    assert "notes.txt" in files(launch.folder)
    assert ".hydra/overrides.yaml" in files(launch.folder)


def test_two_starts_in_one_second_get_two_folders(launch: Launch) -> None:
    for _ in range(3):
        assert cli.main([]) == 0
    assert len({folder for _, folder in launch.calls}) == 3


def test_log_of_the_run(launch: Launch, capsys: pytest.CaptureFixture[str]) -> None:
    def talk(cfg: Config, folder: Path) -> int:
        logging.getLogger("pipetrain.launch").info("hello")
        return 0

    launch.result = talk
    cli.main([])
    assert "hello" in (launch.folder / "pipetrain.log").read_text()
    assert capsys.readouterr() == ("", "")


def test_home_is_expanded(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/a b='c")
    assert cli.main(["data.path=~/x"]) == 0
    assert launch.cfg.data.path == "/home/a b='c/x"  # type: ignore[attr-defined]


# --- files of settings ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [path for path in sorted(CONF.glob("*/**/*.yaml")) if path.relative_to(CONF).parts[0] != "hydra"],
    ids=lambda path: path.relative_to(CONF).as_posix(),
)
def test_every_shipped_file_composes(path: Path, launch: Launch) -> None:
    group, _, choice = path.relative_to(CONF).with_suffix("").as_posix().partition("/")
    key = "plan.device" if group == "device" else group
    assert cli.main([f"{key}={choice}"]) == 0
    if group != "experiment":
        part = launch.cfg.plan.device if group == "device" else getattr(launch.cfg, group)
        values = yaml.safe_load(path.read_text())
        if path.read_text().startswith("# @package _global_"):  # it sets something outside its group, too
            values |= values.pop(group)
        for key, value in values.items():
            if key != "defaults" and not str(value).startswith("${"):
                found = getattr(part if hasattr(part, key) else launch.cfg, key)
                assert found == pytest.approx(float(value) if key == "lr" else value)


def test_experiment_wins_over_the_defaults(launch: Launch) -> None:
    assert cli.main(["experiment=demo"]) == 0
    cfg = launch.cfg
    assert (cfg.name, cfg.devices, cfg.steps, cfg.log_every) == ("demo", 2, 120, 5)
    assert (cfg.eval.every, cfg.checkpoint.every) == (20, 60)
    assert cli.main(["experiment=demo", "steps=7"]) == 0
    assert launch.cfg.steps == 7


@pytest.mark.parametrize("experiment", ["amoebanet_paper", "fashion_mnist"])
def test_experiments_on_images_need_nothing_but_their_path(experiment: str, launch: Launch) -> None:
    assert cli.main([f"experiment={experiment}", "data.path=photos"]) == 0
    rules.check(launch.cfg, num_gpus=0)
    launch.cfg.data.path = None  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"needs data\.path, the folder that holds it"):
        rules.check(launch.cfg, num_gpus=0)


def test_experiments_name_their_command() -> None:
    for path in (CONF / "experiment").glob("*.yaml"):
        assert path.read_text().splitlines()[:2] == ["# @package _global_", f"# pipetrain experiment={path.stem}"]


@pytest.mark.parametrize("rule", ["linear", "cosine"])
def test_decay_ends_at_the_last_step(rule: str, launch: Launch) -> None:
    assert cli.main([f"lr_rule={rule}", "steps=500"]) == 0
    assert launch.cfg.lr_rule.decay_steps == 500


def test_own_file(launch: Launch, tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text(
        "defaults: [config, override model: transformer_tiny, _self_]\nsteps: 9\nmodel:\n  layers: 4\n"
    )
    assert cli.main(["my.yaml", "devices=3"]) == 0
    cfg = launch.cfg
    assert isinstance(cfg.model, TransformerConfig)
    assert (cfg.steps, cfg.devices, cfg.model.layers, cfg.model.d_model) == (9, 3, 4, 32)


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("my.yaml", "defaults: [config, _self_]\nmodle: 3\n", "unknown key 'modle'. Did you mean 'model'? (pip"),
        ("my.yaml", "defaults: [config, _self_]\nmodel:\n  layer: 3\n", "unknown key 'model.layer'. Did you mean"),
        (
            "my.yaml",
            "defaults: [config, _self_]\nsteps: many\n",
            "steps=many must be a whole number, or null (in my.yaml)",
        ),
        ("my.yaml", "defaults: [config, override model: nope, _self_]\n", "model=nope: no such model. Choose one of"),
        ("my.yaml", "steps: 3\n", "must start from pipetrain's settings. Put this at its top:\ndefaults:\n  - config"),
        ("my.yaml", "steps: [3\n", "my.yaml is not YAML"),
        ("my.yaml", "", "must start from pipetrain's settings"),
        ("my.yml", "steps: 3\n", "rename it to my.yaml"),
        ("config.yaml", "steps: 3\n", "this name belongs to pipetrain's own file"),
        ("my.yaml", "defaults: [config, _self_]\nresume: x\n", "resume=RUN belongs on the command line"),
    ],
)
def test_mistake_in_own_file(
    name: str, content: str, text: str, launch: Launch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text(content)
    assert cli.main([name]) == Exit.BAD_SETTINGS
    assert text in capsys.readouterr().err
    assert not launch.calls
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_user_folder_goes_before_the_built_in_one(
    launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    start = "defaults: [/schema/model/transformer@_here_, _self_]\n"
    (tmp_path / "mine" / "model").mkdir(parents=True)
    (tmp_path / "mine" / "model" / "transformer.yaml").write_text(f"{start}layers: 77\n")
    (tmp_path / "mine" / "model" / "own.yaml").write_text(f"{start}layers: 5\n")
    monkeypatch.setenv("PIPETRAIN_CONF", "mine")
    assert cli.main([]) == 0
    assert launch.cfg.model.layers == 77  # type: ignore[attr-defined]
    assert cli.main(["model=own"]) == 0
    assert launch.cfg.model.layers == 5  # type: ignore[attr-defined]
    assert cli.main(["model=onw"]) == Exit.BAD_SETTINGS
    assert "Did you mean 'own'? Choose one of: amoebanet, " in capsys.readouterr().err
    monkeypatch.setenv("PIPETRAIN_CONF", "gone")
    assert cli.main([]) == Exit.BAD_SETTINGS
    assert "PIPETRAIN_CONF=gone, but there is no such folder" in capsys.readouterr().err


# --- folders and resume -----------------------------------------------------------------------------------------


def test_folder_of_a_run_is_never_overwritten(
    launch: Launch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my.yaml").write_text("defaults: [config, _self_]\nhydra:\n  run:\n    dir: x/${name}\n")
    assert cli.main(["hydra.run.dir=x/a"]) == 0
    (tmp_path / "x" / "a" / "status.json").write_text("{}")
    before = files(tmp_path)
    for words in (["hydra.run.dir=x/a"], ["hydra.run.dir=x/${name}", "name=a"], ["my.yaml", "name=a"]):
        assert cli.main([*words, "devices=2"]) == Exit.BAD_SETTINGS
        assert "already holds a run. Go on with it: resume=x/a" in (err := capsys.readouterr().err)
        assert "Nothing was written" in err
        assert files(tmp_path) == before
    assert len(launch.calls) == 1
    (tmp_path / "x" / "b").mkdir()
    assert cli.main(["hydra.run.dir=x/b"]) == 0


def test_resume_replays_the_run_in_its_folder(launch: Launch, tmp_path: Path) -> None:
    folder = tmp_path / "it's a=run"
    assert cli.main(["model=transformer_tiny", "devices=2", f"hydra.run.dir={argv.quoted(str(folder))}"]) == 0
    for words in (["devices=3"], ["steps=600"]):
        assert cli.main([f"resume={folder}", *words]) == 0
        assert launch.folder == folder
        assert launch.cfg.resume == str(folder)
    cfg = launch.cfg
    assert (cfg.devices, cfg.steps, cfg.model.layers) == (3, 600, 2)  # type: ignore[attr-defined]
    saved = yaml.safe_load((folder / ".hydra" / "overrides.yaml").read_text())
    assert [mistakes.key_of(word) for word in saved] == ["model", "devices", "steps", "resume"]


def test_resume_keeps_where_the_run_started_from_and_takes_no_new_one(
    launch: Launch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["init_from=runs/old", "hydra.run.dir=x"]) == 0
    assert cli.main(["resume=x", "steps=7"]) == 0
    assert launch.cfg.init_from == "runs/old"
    assert cli.main(["resume=x", "init_from=runs/other"]) == Exit.BAD_SETTINGS
    assert "goes on with a run, init_from=RUN starts a new one: leave one of them out" in capsys.readouterr().err


def test_refused_resume_leaves_the_folder_as_it_was(launch: Launch, tmp_path: Path) -> None:
    assert cli.main(["hydra.run.dir=x"]) == 0
    before = files(tmp_path)
    launch.result = ConfigError("the model is another one")
    assert cli.main(["resume=x", "model.layers=9"]) == Exit.BAD_SETTINGS
    assert cli.main(["resume=x", "++modle=9"]) == Exit.BAD_SETTINGS
    assert files(tmp_path) == before
    launch.result = 0
    assert cli.main(["resume=x"]) == 0
    assert launch.cfg.model.layers == 6  # type: ignore[attr-defined]


def test_resume_of_own_file(launch: Launch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = tmp_path / "my.yaml"
    own.write_text("defaults: [config, _self_]\nsteps: 9\n")
    assert cli.main(["my.yaml", "hydra.run.dir=x"]) == 0
    assert cli.main(["resume=x"]) == 0
    assert launch.cfg.steps == 9
    assert cli.main(["my.yaml", "resume=x"]) == Exit.BAD_SETTINGS
    assert "leave my.yaml out" in capsys.readouterr().err
    own.unlink()
    assert cli.main(["resume=x"]) == Exit.BAD_SETTINGS
    assert f"started from {own}, which is not there any more" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["-m", "devices=1,2"], ["experiment=scaling", "devices=1,2"]])
def test_resume_of_a_job_of_a_sweep(words: list[str], launch: Launch, tmp_path: Path) -> None:
    assert cli.main([*words, "hydra.sweep.dir=s"]) == 0
    job = sorted((tmp_path / "s").glob("1_*"))[0]
    calls = len(launch.calls)
    assert cli.main([f"resume={job}", "steps=70"]) == 0
    assert len(launch.calls) == calls + 1
    assert launch.folder == job
    assert (launch.cfg.devices, launch.cfg.steps) == (2, 70)


def test_resume_of_no_run_folder_lists_the_newest(
    launch: Launch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    for age, name in enumerate(["c", "b", "a"]):
        assert cli.main([f"name={name}"]) == 0
        os.utime(launch.folder / ".hydra" / "overrides.yaml", (10**9 - age, 10**9 - age))
    assert cli.main(["resume=empty"]) == Exit.BAD_SETTINGS
    err = capsys.readouterr().err
    assert "resume=empty is no run folder" in err
    listed = [line.split("/")[1] for line in err.splitlines() if line.startswith("  resume=runs/")]
    assert listed == ["c", "b", "a"]


def test_resume_and_sweep_exclude_each_other(launch: Launch, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["hydra.run.dir=x"]) == 0
    assert cli.main(["-m", "resume=x", "devices=1,2"]) == Exit.BAD_SETTINGS
    assert "resume=RUN goes on with one run: leave -m out" in capsys.readouterr().err
    assert cli.main(["resume=null", "devices=1"]) == 0


@pytest.mark.parametrize("text", ["plain", "a b", "it's", "a\\'b", "end\\", "[x],{y}=#~é", "\\\\'"])
def test_quoted_values_come_back_unchanged(text: str) -> None:
    assert OverridesParser.create().parse_override(f"x={argv.quoted(text)}").value() == text


# --- torchrun ---------------------------------------------------------------------------------------------------


def test_only_rank_0_writes_under_torchrun(
    launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert cli.main(["hydra.run.dir=x"]) == 0
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("RANK", "0")
    assert cli.main(["hydra.run.dir=x"]) == 0
    assert ".hydra/config.yaml" in files(tmp_path / "x")
    before = files(tmp_path)
    monkeypatch.setenv("RANK", "1")
    assert cli.main(["resume=x"]) == 0
    assert launch.cfg.resume == str(tmp_path / "x")
    for words in (["-m", "devices=1,2"], ["experiment=scaling"]):
        assert cli.main(words) == Exit.BAD_SETTINGS
        assert "-m cannot run under torchrun" in capsys.readouterr().err
    assert files(tmp_path) == before


# --- showing ----------------------------------------------------------------------------------------------------


def test_help_explains_every_key(launch: Launch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    rows = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    for setting in help.settings({"model.name": "transformer", "data.name": "text"}).values():
        assert setting.help, setting.key
        assert setting.help in rows[setting.key]
    assert rows["steps"].split()[1] == "300"
    for path in CONF.glob("*/**/*.yaml"):
        group, _, choice = path.relative_to(CONF).with_suffix("").as_posix().partition("/")
        choices = f"  {help.KEYS.get(group, group)} "  # the line of the files to choose from
        lines = [line.replace(",", "").split() for line in text.splitlines() if line.startswith(choices)]
        assert group == "hydra" or any(choice in line for line in lines)
    assert text.index("pipetrain experiment=demo") < text.index("model.layers")
    assert 'eval "$(pipetrain -sc install=bash)"' in text
    assert list(tmp_path.iterdir()) == []


def test_help_shows_the_values_of_its_command(launch: Launch, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help", "model=transformer_tiny", "optimizer=sgd"]) == 0
    rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert rows["model.layers"][1] == "2"
    assert rows["optimizer.lr"][1] == "0.1"


@pytest.mark.parametrize(("model", "meaning"), [("transformer", "Transformer blocks"), ("amoebanet", "normal cells")])
def test_help_says_what_a_key_means_to_the_chosen_model(
    launch: Launch, capsys: pytest.CaptureFixture[str], model: str, meaning: str
) -> None:
    assert cli.main(["--help", f"model={model}"]) == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert meaning in rows["model.layers"]


def test_version(launch: Launch, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == "pipetrain 0.1.0\n"


def test_cfg_job(launch: Launch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--cfg", "job", "model=transformer_tiny", "--resolve"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["name"], shown["model"]["layers"]) == ("transformer", 2)
    assert list(tmp_path.iterdir()) == []
    assert not launch.calls


def test_flags_may_stand_between_settings(launch: Launch) -> None:
    assert cli.main(["steps=5", "-m", "devices=1,2"]) == 0
    assert [cfg.devices for cfg, _ in launch.calls] == [1, 2]


def test_help_and_mistakes_need_no_torch(tmp_path: Path) -> None:
    code = "import sys, pipetrain.cli as c; c.main(['--help']); c.main(['modle=x']); assert 'torch' not in sys.modules"
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr


def test_module_is_the_command() -> None:
    done = run_python("-m", "pipetrain", "layers=3")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: unknown key 'layers'. Did you mean 'model.layers'? (pipetrain --help lists every key)\n"
    )


def test_closed_pipe_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = run_python("-m", "pipetrain", "--help", stdout=writer)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("pipetrain model=tr", "model=transformer"),
        ("pipetrain optimizer=ada", "optimizer=adafactor"),
        ("pipetrain batch", "batch_size="),
        ("pipetrain model.lay", "model.layers="),
    ],
)
def test_tab_completion(
    line: str, answer: str, launch: Launch, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("COMP_LINE", line), ("COMP_POINT", str(len(line))), ("COMP_CWORD", "1")):
        monkeypatch.setenv(name, value)
    assert cli.main(["-sc", "query=bash"]) == 0
    assert answer in capsys.readouterr().out.split()


def test_completion_script(launch: Launch, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["-sc", "install=bash"]) == 0
    assert "complete -o nospace" in capsys.readouterr().out


# --- the wheel --------------------------------------------------------------------------------------------------


def test_wheel_holds_every_file_of_conf(tmp_path: Path) -> None:
    for name in ("pipetrain", "conf", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "README.md").write_text("")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / "dist")]
    subprocess.run(build, cwd=tmp_path, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if name.startswith("pipetrain/conf/")}
        entry_points = next(name for name in archive.namelist() if name.endswith("entry_points.txt"))
        assert "pipetrain = pipetrain.cli:main" in archive.read(entry_points).decode()
    assert names == {f"pipetrain/conf/{path.relative_to(CONF)}" for path in CONF.rglob("*.yaml")}


_DEVICE = "defaults: [/schema/device/device@_here_, _self_]\nname: X\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("memory_gib: 3\n", "plan.device.fp32_tflops is missing (multiplications and additions of matrices a second"),
        ("memory_gib: lots\n", "plan.device.memory_gib=lots must be a number (in device/x.yaml)"),
        ("memory_gb: 3\n", "unknown key 'plan.device.memory_gb'. Did you mean 'plan.device.memory_gib'?"),
    ],
)
def test_a_device_that_is_badly_described_is_named(
    text: str,
    said: str,
    launch: Launch,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "mine" / "device").mkdir(parents=True)
    (tmp_path / "mine" / "device" / "x.yaml").write_text(_DEVICE + text)
    monkeypatch.setenv("PIPETRAIN_CONF", str(tmp_path / "mine"))
    assert cli.main(["plan.device=x"]) == Exit.BAD_SETTINGS
    assert said in capsys.readouterr().err
    assert not launch.calls

"""Sweeps: jobs in order, failures named at once, the table, finished runs skipped, a stop that stops."""

import json
import logging
from pathlib import Path

import pytest
from launch_stub import Launch, files, launch  # noqa: F401

from pipetrain import cli
from pipetrain.config import Config
from pipetrain.errors import ConfigError, Exit
from pipetrain.sweep import Job, Sweep, slug

METRICS = {"loss/train": 2.5, "loss/val": 2.75, "speed/tokens_per_s": 12345.6}


def ends(state: str, code: int, **more: object) -> dict[str, object]:
    return {"state": state, "step": 300, "exit_code": code, "error": None, "metrics": METRICS, **more}


def finishes(cfg: Config, folder: Path) -> int:
    (folder / "status.json").write_text(json.dumps(ends("finished", 0)))
    return 0


def second_fails(cfg: Config, folder: Path) -> int:
    if cfg.devices != 2:
        return finishes(cfg, folder)
    (folder / "status.json").write_text(json.dumps(ends("failed", 1, step=17, error="stage 1 failed", metrics={})))
    return 1


@pytest.fixture
def run(launch: Launch) -> Launch:
    launch.result = finishes
    return launch


def test_jobs_run_in_order_in_named_folders(run: Launch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["-m", "devices=1,2,4"]) == 0
    assert [cfg.devices for cfg, _ in run.calls] == [1, 2, 4]
    (sweep,) = (tmp_path / "sweeps").iterdir()
    assert [folder.parent for _, folder in run.calls] == [sweep] * 3
    assert [folder.name for _, folder in run.calls] == ["0_devices-1", "1_devices-2", "2_devices-4"]
    out, err = capsys.readouterr()
    assert err == ""
    assert f"job 0: devices=1 -> {(sweep / '0_devices-1').relative_to(tmp_path)}\njob 0: devices=1: finished\n" in out
    assert "HYDRA" not in out
    assert "jobs: 3, failed: 0" in out
    assert f"tensorboard --logdir {sweep.relative_to(tmp_path)}\n" in out
    row = next(line for line in out.splitlines() if line.startswith("2 "))
    assert row.split() == ["2", "devices=4", "finished", "300", "2.5000", "2.7500", "12,346"]


def test_table_shows_what_differs(run: Launch, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["-m", f"data.path={'x' * 200}", "devices=[cpu],[cpu,cpu]"]) == 0
    out = capsys.readouterr().out
    rows = [line.split()[:3] for line in out[out.index("overrides") :].splitlines() if line[:1].isdigit()]
    assert rows == [["0", "devices=[cpu]", "finished"], ["1", "devices=[cpu,cpu]", "finished"]]


def test_every_job_has_its_own_log(run: Launch) -> None:
    def talk(cfg: Config, folder: Path) -> int:
        logging.getLogger("pipetrain").info("job with devices=%s", cfg.devices)
        return finishes(cfg, folder)

    run.result = talk
    assert cli.main(["-m", "devices=1,2"]) == 0
    for cfg, folder in run.calls:
        (line,) = (folder / "pipetrain.log").read_text().splitlines()
        assert line.endswith(f"job with devices={cfg.devices}")


def test_sweep_in_a_file(run: Launch) -> None:
    assert cli.main(["experiment=scaling"]) == 0
    assert [cfg.devices for cfg, _ in run.calls] == [1, 2, 4]


def test_failed_job_is_named_and_the_sweep_goes_on(run: Launch, capsys: pytest.CaptureFixture[str]) -> None:
    run.result = second_fails
    assert cli.main(["-m", "devices=1,2,4"]) == Exit.FAILED
    assert len(run.calls) == 3
    out = capsys.readouterr().out
    failed = out.index("job 1: devices=2: failed (exit code 1): stage 1 failed")
    assert failed < out.index("job 2: devices=4 ->")
    row = next(line for line in out.splitlines() if line.startswith("1 "))
    assert row.split() == ["1", "devices=2", "failed", "17", "-", "-", "-"]
    assert "jobs: 3, failed: 1" in out


@pytest.mark.parametrize("error", [ConfigError("balance is wrong"), KeyError("a bug")])
def test_error_of_a_job_does_not_kill_the_table(
    error: Exception, run: Launch, capsys: pytest.CaptureFixture[str]
) -> None:
    def breaks(cfg: Config, folder: Path) -> int:
        if cfg.devices == 4:
            raise error
        return finishes(cfg, folder)

    run.result = breaks
    assert cli.main(["-m", "devices=1,4,2"]) == Exit.FAILED
    out, err = capsys.readouterr()
    assert len(run.calls) == 3
    assert "jobs: 3, failed: 1" in out
    assert ("Traceback" in err) == isinstance(error, KeyError)
    state = "refused" if isinstance(error, ConfigError) else "crashed"
    assert f"job 1: devices=4: {state}" in out
    assert str(error) in out
    assert str(error) in (run.calls[1][1] / "pipetrain.log").read_text()


def test_unknown_key_of_one_job(run: Launch, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["-m", "++modle=1,2"]) == Exit.FAILED
    assert capsys.readouterr().out.count("unknown key 'modle'. Did you mean 'model'?") == 2
    assert not run.calls


@pytest.mark.parametrize("code", [130, 75, 143])
def test_stop_ends_the_sweep(code: int, run: Launch, capsys: pytest.CaptureFixture[str]) -> None:
    run.result = lambda cfg, folder: code if cfg.devices == 2 else finishes(cfg, folder)
    assert cli.main(["-m", "devices=1,2,4"]) == code
    assert len(run.calls) == 2
    assert "jobs: 2, failed: 1" in capsys.readouterr().out


def test_ctrl_c_between_jobs(run: Launch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(cfg: Config, folder: Path) -> int:
        raise KeyboardInterrupt

    run.result = interrupt
    assert cli.main(["-m", "devices=1,2"]) == Exit.INTERRUPTED
    assert len(run.calls) == 1
    out, err = capsys.readouterr()
    assert err == "interrupted\n"
    assert "tensorboard --logdir" in out


def test_second_time_only_unfinished_jobs_run(run: Launch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run.result = second_fails
    words = ["-m", "devices=1,2,4", "hydra.sweep.dir=s"]
    assert cli.main(words) == Exit.FAILED
    run.calls.clear()
    run.result = finishes
    assert cli.main(words) == 0
    assert [cfg.devices for cfg, _ in run.calls] == [2]
    assert run.cfg.resume is None
    out = capsys.readouterr().out
    assert "job 0: devices=1: finished before, skipped (s/0_devices-1)" in out
    assert "jobs: 3, failed: 0" in out


def test_interrupted_job_goes_on_from_its_checkpoint(run: Launch, tmp_path: Path) -> None:
    (tmp_path / "s" / "0_devices-1" / "checkpoints" / "step_5").mkdir(parents=True)
    assert cli.main(["-m", "devices=1,2", "hydra.sweep.dir=s"]) == 0
    assert [cfg.resume for cfg, _ in run.calls] == [str(tmp_path / "s" / "0_devices-1"), None]


def test_another_experiment_is_another_job(run: Launch) -> None:
    assert cli.main(["-m", "experiment=demo,scaling", "devices=1", "hydra.sweep.dir=s"]) == 0
    assert cli.main(["-m", "experiment=scaling,demo", "devices=1", "hydra.sweep.dir=s"]) == 0
    assert [cfg.name for cfg, _ in run.calls] == ["demo", "scaling", "scaling", "demo"]


def test_refused_sweep_keeps_the_earlier_one(run: Launch, tmp_path: Path) -> None:
    assert cli.main(["-m", "devices=1", "hydra.sweep.dir=s"]) == 0
    before = files(tmp_path)
    assert cli.main(["-m", "devices=1,2", "model.layers=x", "hydra.sweep.dir=s"]) == Exit.BAD_SETTINGS
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ("devices=1", "devices-1"),
        ("balance=[3,3],devices=[cuda\\:0,cuda\\:1],model=a/b", "balance-3-3-devices-cuda0-cuda1-model-a-b"),
        ("name='ä x'", "name-x"),
        ("optimizer.lr=1e-3", "optimizer.lr-1e-3"),
        ("", "defaults"),
    ],
)
def test_slug(overrides: str, name: str) -> None:
    assert slug(overrides) == name


def test_long_slugs_stay_short_and_different() -> None:
    one, two = slug("data.path=" + "x" * 300), slug("data.path=" + "x" * 301)
    assert len(one) == len(two) == 80
    assert one != two


def test_table_without_any_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "status.json").write_text("not JSON")
    Sweep(tmp_path, [Job(tmp_path, ["a=1"], "failed", 1)]).print_table()
    assert "jobs: 1, failed: 1" in capsys.readouterr().out

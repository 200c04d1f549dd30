"""`action=plan`: nothing runs, and what is said is what would run."""

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from runs import metrics, run, settings

from pipetrain.config import AmoebaNetConfig, AnythingConfig, Config, ImagesConfig, SyntheticConfig
from pipetrain.errors import ConfigError
from pipetrain.preview import preview


@pytest.mark.parametrize(
    "changes", [{}, {"schedule": "zb_v", "tied": True}, {"schedule": "1f1b", "recompute": "never"}]
)
def test_a_plan_is_that_of_the_run(
    tmp_path: Path, changes: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = settings(devices=2, **changes)
    assert preview(cfg, tmp_path / "plan") == 0
    assert "the schedule as a picture: " in capsys.readouterr().out
    run(tmp_path, "run", 2, cfg)
    planned, ran = (json.loads((tmp_path / folder / "plan.json").read_text()) for folder in ("plan", "run"))
    assert planned == ran
    assert metrics(tmp_path, "run")
    picture = ElementTree.parse(tmp_path / "plan" / "schedule.svg").getroot()
    assert len([e for e in picture.iter() if e.tag.endswith("title")]) > 4 * len(planned["stages"])
    assert sorted(p.name for p in (tmp_path / "plan").iterdir()) == ["plan.json", "schedule.svg"]


@pytest.mark.parametrize(
    "cfg",
    [
        settings(model=AmoebaNetConfig(filters=8), data=ImagesConfig(), devices=2),
        settings(model=AnythingConfig(factory="resnet18"), data=SyntheticConfig(shape=[3, 64, 64]), devices=3),
    ],
    ids=["amoebanet", "anything"],
)
def test_all_models_have_plans(tmp_path: Path, cfg: Config) -> None:
    assert preview(cfg, tmp_path) == 0
    planned = json.loads((tmp_path / "plan.json").read_text())
    assert all(stage["parameters"] for stage in planned["stages"])


def test_mistakes_leave_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="sums to 5"):
        preview(settings(devices=2, balance=[2, 3]), tmp_path / "run")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    with pytest.raises(ConfigError, match="run it without torchrun"):
        preview(settings(devices=2), tmp_path / "run")
    assert not (tmp_path / "run").exists()

"""Profiles as files."""

import dataclasses
from pathlib import Path

from pipetrain.costs import LayerCost, Link, ModelCost, ValueCost
from pipetrain.profile.store import Profile, load, save

ABOUT = {"layers": "abc", "devices": "cpu"}
PROFILE = Profile(
    about=ABOUT,
    memory_bytes={"cpu": 1e9},
    slowness={"cpu": 1.0},
    link=Link(1e-5, 1e9),
    sums=Link(1e-4, 1e9),
    engine_s=1e-4,
    crowding=2.0,
    disturbed=True,
    process_bytes=5,
    costs={
        4: ModelCost(
            4,
            (LayerCost("a", 0.1, 0.2, 0.1, 0.1, 0.01, 1, 4, 8, 16, 3, 32, 64),),
            (ValueCost(-1, 8, (0,), (), has_gradient=False),),
        )
    },
)


def test_a_profile_is_read_back(tmp_path: Path) -> None:
    save(tmp_path, PROFILE)
    assert load(tmp_path, ABOUT) == PROFILE
    assert len(list(tmp_path.iterdir())) == 1


def test_a_profile_of_something_else_is_none(tmp_path: Path) -> None:
    save(tmp_path, PROFILE)
    assert load(tmp_path, ABOUT | {"devices": "gpu"}) is None
    (path,) = tmp_path.iterdir()
    path.write_text(dataclasses.replace(PROFILE, about={"layers": "other"}).to_json())
    assert load(tmp_path, ABOUT) is None
    path.write_text("{")
    assert load(tmp_path, ABOUT) is None

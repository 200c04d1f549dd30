"""A profile as a file: measured once, and taken again for the same layers on the same device."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipetrain.costs import LayerCost, Link, ModelCost, ValueCost


@dataclass(frozen=True)
class Profile:
    """What a model costs on the devices of a run.

    Attributes:
        about: what it depends on: the layers, the shapes, the devices, the versions, see `planning.profiles.about_of`.
        memory_bytes: of each device, by what it is called.
        slowness: of each kind of device, where the first one has 1.
        sums: adding up a message of two ranks.
        engine_s: what every action takes beside its layers.
        crowding: threads for each core while it was measured, at least 1.
        disturbed: whether other processes took a good part of the cores meanwhile.
        process_bytes: what a rank holds before its stage is built.
        costs: by the samples in a micro-batch; None where not even a layer of so many fits a device.
    """

    about: Mapping[str, str]
    memory_bytes: Mapping[str, float]
    slowness: Mapping[str, float]
    link: Link
    sums: Link
    engine_s: float
    crowding: float
    disturbed: bool
    process_bytes: int
    costs: Mapping[int, ModelCost | None]

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> "Profile":
        """The inverse of `to_json`.

        Raises:
            ValueError, KeyError, TypeError: if it is none.
        """
        raw = json.loads(text)
        return Profile(
            about=raw["about"],
            memory_bytes=raw["memory_bytes"],
            slowness=raw["slowness"],
            link=Link(**raw["link"]),
            sums=Link(**raw["sums"]),
            engine_s=raw["engine_s"],
            crowding=raw["crowding"],
            disturbed=raw["disturbed"],
            process_bytes=raw["process_bytes"],
            costs={int(rows): cost and _model_cost(cost) for rows, cost in raw["costs"].items()},
        )


def _model_cost(raw: Mapping[str, Any]) -> ModelCost:
    values = [ValueCost(**{**value, **{k: tuple(value[k]) for k in ("users", "keepers")}}) for value in raw["values"]]
    return ModelCost(raw["rows"], tuple(LayerCost(**layer) for layer in raw["layers"]), tuple(values))


def hashed(parts: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def load(folder: Path, about: Mapping[str, str]) -> Profile | None:
    """The profile of exactly this, if there is one; a file that cannot be read counts as none."""
    try:
        found = Profile.from_json(_path(folder, about).read_text())
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if found.about == dict(about) else None


def save(folder: Path, profile: Profile) -> None:
    """Whole or not at all, whoever else writes there."""
    folder.mkdir(parents=True, exist_ok=True)
    path = _path(folder, profile.about)
    aside = path.with_suffix(f".{os.getpid()}")
    aside.write_text(profile.to_json())
    os.replace(aside, path)


def _path(folder: Path, about: Mapping[str, str]) -> Path:
    return folder / f"{hashed([f'{key}={value}' for key, value in sorted(about.items())])}.json"

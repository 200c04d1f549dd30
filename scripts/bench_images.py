"""Measures images: two stages against one, and reading them against a plain torchvision DataLoader.

    .venv/bin/python scripts/bench_images.py stages FOLDER   FOLDER/FashionMNIST/raw/*, with the real command
    .venv/bin/python scripts/bench_images.py reading FOLDER  FOLDER/train/CLASS/*, FOLDER/val/CLASS/*

Each prints a line and writes bench/images_*.json. In turns, medians of ROUNDS rounds. Run it on an idle machine.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROUNDS, STEPS, WARM_UP = 3, 24, 4
BATCH_SIZE, BATCHES, SIZE, WORKERS = 32, 30, 64, 1
OUTPUT = Path("bench")


def stages(folder: Path) -> dict[str, Any]:
    """Images a second of the Fashion-MNIST recipe, on one stage and on two, with one thread each."""
    speeds: dict[int, list[float]] = {1: [], 2: []}
    for number in range(ROUNDS):
        for devices in (1, 2) if number % 2 == 0 else (2, 1):
            speeds[devices].append(_speed_of_recipe(folder, devices))
    ratios = [two / one for one, two in zip(speeds[1], speeds[2], strict=True)]
    return {"one stage": speeds[1], "two stages": speeds[2], "ratio": statistics.median(ratios), "wanted": 1.5}


def _speed_of_recipe(folder: Path, devices: int) -> float:
    """Median over the steps behind the first ones."""
    with tempfile.TemporaryDirectory() as run:
        settings = [f"steps={STEPS}", "lr_rule.decay_steps=1000", "eval.every=0", "checkpoint.every=0", "log_every=1"]
        alone = ["balance=even"] if devices == 1 else []
        command = ["experiment=fashion_mnist", f"data.path={folder.absolute()}", f"devices={devices}"]
        subprocess.run(
            [sys.executable, "-m", "pipetrain", *command, *settings, *alone, f"hydra.run.dir={run}"],
            check=True,
            capture_output=True,
        )
        lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(line["speed/samples_per_s"] for line in lines[WARM_UP:])


def reading(folder: Path) -> dict[str, Any]:
    """Images a second, decoded and augmented by as many processes."""
    import torch

    torch.set_num_threads(1)
    contestants = {"pipetrain": _pipetrain_reader, "torchvision": _torchvision_reader}
    speeds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(ROUNDS):
        for name in list(contestants)[:: 1 if number % 2 == 0 else -1]:
            speeds[name].append(_images_per_s(contestants[name], folder))
    ratios = [a / b for a, b in zip(speeds["pipetrain"], speeds["torchvision"], strict=True)]
    return {**speeds, "ratio": statistics.median(ratios), "wanted": 1.0}


def _images_per_s(reader: Callable[[Path], Iterator[Any]], folder: Path) -> float:
    batches = reader(folder)
    next(batches)
    started = time.perf_counter()
    for _ in itertools.islice(batches, BATCHES):
        pass
    return BATCHES * BATCH_SIZE / (time.perf_counter() - started)


def _prepared(folder: Path) -> Any:
    """The set, without the files that cannot be read."""
    from pipetrain.data.images.sets import prepare_images

    return prepare_images(
        "folder",
        str(folder),
        size=SIZE,
        channels=None,
        valid_fraction=0.1,
        on_error="skip",
        cache_dir="~/.cache/pipetrain",
        say=lambda text: None,
    )


def _pipetrain_reader(folder: Path) -> Iterator[Any]:
    from pipetrain.data.images.batches import ImageBatches

    prepared = _prepared(folder)
    batches = ImageBatches(prepared, "train", batch_size=BATCH_SIZE, seed=0, augment=["crop", "flip"], workers=WORKERS)
    return (batches.batch(number) for number in itertools.count())


def _torchvision_reader(folder: Path) -> Iterator[Any]:
    """What the documentation of torchvision shows for training on a folder."""
    import torch
    from torch.utils.data import DataLoader

    from pipetrain.data.images.folder import load
    from pipetrain.data.order import permutation
    from pipetrain.vision import import_torchvision

    v2, datasets = import_torchvision("torchvision.transforms.v2"), import_torchvision("torchvision.datasets")
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(SIZE, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]),
        ]
    )
    files = [str(folder / name) for name, _ in load(Path(_prepared(folder).index)).files["train"]]
    images = datasets.ImageFolder(str(folder / "train"), transform=transform, is_valid_file=set(files).__contains__)
    place = {path: number for number, (path, _) in enumerate(images.samples)}
    order = permutation(0, "train", 0, len(files))  # the same images in the same order: some are a hundred times larger
    sampler = [place[files[number]] for number in order]
    return iter(DataLoader(images, batch_size=BATCH_SIZE, sampler=sampler, num_workers=WORKERS, prefetch_factor=4))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["stages", "reading"])
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    results = {"stages": stages, "reading": reading}[arguments.what](arguments.folder)
    for name, value in results.items():
        print(f"{name}: {[round(v, 1) for v in value] if isinstance(value, list) else round(value, 3)}")
    OUTPUT.mkdir(exist_ok=True)
    (OUTPUT / f"images_{arguments.what}.json").write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()

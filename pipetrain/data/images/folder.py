"""A folder of images for each class: what is in it, and which of its files cannot be read.

photos/train/cat/1.jpg  photos/val/cat/7.jpg      two splits (the second may be called val, valid, validation, test)
photos/cat/1.jpg                                  one, of which some images are held out
"""

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from pipetrain.errors import ConfigError
from pipetrain.seeds import derive_seed

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
_VALID_NAMES = ("val", "valid", "validation", "test")
File = tuple[str, int]  # path below the root, number of the class


@dataclass(frozen=True)
class Listing:
    """The images of a folder, in an order that does not depend on the file system."""

    classes: list[str]
    files: dict[str, list[File]]
    fingerprint: str


def list_images(root: Path, valid_fraction: float) -> Listing:
    """Looks at names and sizes of the files, not into them.

    Raises:
        ConfigError: for a folder with less than two classes, an empty class, or a class that only the validation split
            has.
    """
    if not root.is_dir():
        raise ConfigError(f"data.path={root} is no folder; give one with a folder of images for each class")
    train = root / "train" if (root / "train").is_dir() else root
    valid = next((root / name for name in _VALID_NAMES if (root / name).is_dir()), None) if train != root else None
    classes = _folders(train)
    if not classes:
        raise ConfigError(
            f"{train} holds no folders; data.path needs one for each class with its images in it, or train/ and val/ "
            "with those"
        )
    number = {name: place for place, name in enumerate(classes)}
    files = {"train": _files(root, train, number)}
    _check_no_class_is_empty(train, classes, files["train"])
    if valid is None:
        held = {path for path, _ in files["train"] if _is_held_out(path, valid_fraction)}
        files["valid"] = [file for file in files["train"] if file[0] in held]
        files["train"] = [file for file in files["train"] if file[0] not in held]
    else:
        only_there = [name for name in _folders(valid) if name not in number]
        if only_there:
            raise ConfigError(
                f"{valid} has folders that {train} has not: {_some(only_there)}; both must have the same classes"
            )
        files["valid"] = _files(root, valid, number)
        there = [name for name in classes if (valid / name).is_dir()]
        _check_no_class_is_empty(valid, classes, files["valid"], among=there)
    if len(classes) == 1:
        raise ConfigError(f"{train} holds one class only, {classes[0]}; there must be two to tell apart")
    sizes = [(path, _size(root / path)) for split in files.values() for path, _ in split]
    text = json.dumps([classes, files, sizes])
    return Listing(classes, files, hashlib.sha256(text.encode()).hexdigest()[:16])


def without_broken(listing: Listing, root: Path, cache: Path) -> tuple[Listing, list[tuple[str, str]]]:
    """Reads every image once, and never again for the same files: what cannot be read is left out.

    Returns:
        The rest, and (file, reason) of each that is left out.
    """
    paths = [path for files in listing.files.values() for path, _ in files]
    changed = [(path, os.stat(root / path).st_mtime_ns if (root / path).exists() else None) for path in paths]
    seen = hashlib.sha256(json.dumps([str(root), listing.fingerprint, changed]).encode()).hexdigest()[:16]
    kept = cache / "images" / f"broken-{seen}.json"
    if kept.is_file():
        broken = dict(json.loads(kept.read_text()))
    else:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            reasons = pool.map(lambda path: why_unreadable(root / path), paths)
            broken = {path: why for path, why in zip(paths, reasons, strict=True) if why is not None}
        _write(kept, json.dumps(list(broken.items())))
    files = {split: [file for file in files if file[0] not in broken] for split, files in listing.files.items()}
    _check_no_class_is_empty(root, listing.classes, files["train"])
    fingerprint = hashlib.sha256(json.dumps([listing.fingerprint, *broken]).encode()).hexdigest()[:16]
    return Listing(listing.classes, files, fingerprint), list(broken.items())


def why_unreadable(path: Path) -> str | None:
    """What is wrong with an image file; None if it can be read to its end."""
    try:
        with Image.open(path) as image:
            image.load()
            if image.mode == "F":
                return "floating-point pixels, of which nobody knows what is white; save it with 8 or 16 bits"
    except UnidentifiedImageError:
        return "no image that can be recognised"
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return str(error)
    return None


def save(listing: Listing, cache: Path) -> Path:
    """Writes the listing for the workers, once."""
    path = cache / "images" / f"{listing.fingerprint}.json"
    if not path.is_file():
        _write(path, json.dumps(asdict(listing)))
    return path


def load(path: Path) -> Listing:
    """What `save` wrote."""
    raw = json.loads(path.read_text())
    files = {split: [(file, number) for file, number in files] for split, files in raw["files"].items()}
    return Listing(raw["classes"], files, raw["fingerprint"])


def _write(path: Path, text: str) -> None:
    aside = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(text)
        os.replace(aside, path)
    except OSError as error:
        raise ConfigError(
            f"data.cache_dir={path.parent.parent} cannot be written: {error}; give another one"
        ) from error


def _size(path: Path) -> int | None:
    """None for a link to nothing, which is found broken when it is read."""
    return path.stat().st_size if path.exists() else None


def _folders(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _files(root: Path, split: Path, number: dict[str, int]) -> list[File]:
    return [
        (str(file.relative_to(root)), place)
        for name, place in number.items()
        for file in sorted((split / name).rglob("*"))
        if file.suffix.lower() in EXTENSIONS and not file.name.startswith(".") and not file.is_dir()
    ]


def _check_no_class_is_empty(
    split: Path, classes: Sequence[str], files: Sequence[File], among: Sequence[str] | None = None
) -> None:
    filled = {classes[number] for _, number in files}
    empty = [name for name in (classes if among is None else among) if name not in filled]
    if empty:
        raise ConfigError(
            f"{split} has no readable image in {_some(empty)}; remove the folder or fill it "
            f"(images end in {', '.join(EXTENSIONS)})"
        )


def _is_held_out(path: str, fraction: float) -> bool:
    """By the file's name alone: a file more or less changes nothing for the others."""
    return derive_seed("held out", path) / 2**63 < fraction


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

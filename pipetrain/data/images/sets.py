"""The sets of images: where they lie, what is in them, and that they are whole. Before a worker starts.

Small sets come as their authors pack them and are read by torchvision; `folder` is a folder for each class, as
ImageNet is kept. `digits` needs no file: scikit-learn brings it.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pipetrain.data.images import folder
from pipetrain.data.images.read import FolderImages, Images, read_small_set
from pipetrain.errors import ConfigError

TRAIN, VALID = "train", "valid"
_MOST_NAMED = 5  # unreadable files


@dataclass(frozen=True)
class Kind:
    """What is known of a set without looking at it.

    Attributes:
        size: side of its images; of a folder the one that they are brought to.
        mean, std: of its training images, by channel, for values from 0 to 1.
        augment: what its training images may go through without becoming another class.
        needs: the files that must be there, below data.path.
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: tuple[str, ...]
    needs: tuple[str, ...] = ()

    @property
    def channels(self) -> int:
        return len(self.mean)


_FASHION = tuple(
    f"FashionMNIST/raw/{split}-{what}"
    for split in ("train", "t10k")
    for what in ("images-idx3-ubyte", "labels-idx1-ubyte")
)
KINDS: dict[str, Kind] = {
    "digits": Kind(32, (0.305,), (0.324,), ("crop",)),
    "fashion_mnist": Kind(28, (0.286,), (0.353,), ("crop", "flip"), _FASHION),
    "cifar10": Kind(
        32, (0.491, 0.482, 0.447), (0.247, 0.243, 0.262), ("crop", "flip"), ("cifar-10-batches-py/batches.meta",)
    ),
    "cifar100": Kind(32, (0.507, 0.487, 0.441), (0.267, 0.256, 0.276), ("crop", "flip"), ("cifar-100-python/meta",)),
    # Mean and deviation of ImageNet, which photographs share.
    "folder": Kind(224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), ("crop", "flip")),
}


@dataclass(frozen=True)
class ImageSet:
    """A set that was looked at and can be read.

    Attributes:
        kind: a key of `KINDS`.
        path: absolute; None where none is needed.
        size: side of the images that come out.
        channels: 1 (grey) or 3 (red, green, blue).
        classes: names, in the order of their numbers.
        num_images: of each split.
        index: of a folder the file that lists its images.
        valid_fraction: share of the images that are for validation, where the set brings no such split.
        skipped: images that cannot be read and were left out.
        fingerprint: changes whenever other images would come out.
    """

    kind: str
    path: str | None
    size: int
    channels: int
    classes: tuple[str, ...]
    num_images: dict[str, int]
    index: str | None
    valid_fraction: float
    skipped: int
    fingerprint: str


def prepare_images(
    kind: str,
    path: str | None,
    *,
    size: int | None,
    channels: int | None,
    valid_fraction: float,
    on_error: str,
    cache_dir: str,
    say: Callable[[str], None],
) -> ImageSet:
    """Finds a set and counts it.

    Args:
        kind: a key of `KINDS`.
        path: the folder that holds it.
        size: side of the images that are to come out; None is the set's own.
        channels: 1 or 3; None is the set's own.
        valid_fraction: share of the training images kept for validation, where the set brings no such split.
        on_error: fail, or skip: all images of a folder are read once and those that cannot be are left out.
        say: takes a line for the user.

    Raises:
        ConfigError: if files are missing, a class is empty, or the classes of the splits differ.
    """
    known = KINDS[kind]
    root = Path(path).expanduser().resolve() if path is not None else None
    index, skipped = None, 0
    if kind == "folder":
        assert root is not None
        listing = folder.list_images(root, valid_fraction)
        if on_error == "skip":
            listing, broken = folder.without_broken(listing, root, Path(cache_dir).expanduser())
            skipped = len(broken)
            for file, why in broken[:_MOST_NAMED]:
                say(f"skipped {file}: {why}")
            if skipped > _MOST_NAMED:
                say(f"skipped {skipped - _MOST_NAMED} more images that cannot be read")
        classes, num_images = listing.classes, {split: len(files) for split, files in listing.files.items()}
        fingerprint = listing.fingerprint
        index = str(folder.save(listing, Path(cache_dir).expanduser()))
    else:
        classes, num_images = _count(kind, known, root, valid_fraction)
        fingerprint = hashlib.sha256(json.dumps([kind, classes, num_images]).encode()).hexdigest()[:16]
    return ImageSet(
        kind=kind,
        path=str(root) if root else None,
        size=size or known.size,
        channels=channels or known.channels,
        classes=tuple(classes),
        num_images=num_images,
        index=index,
        valid_fraction=valid_fraction,
        skipped=skipped,
        fingerprint=fingerprint,
    )


def open_images(images: ImageSet, split: str) -> Images:
    """The images of one split, in the order of their numbers."""
    root = Path(images.path) if images.path else None
    if images.index is not None and root is not None:
        return FolderImages(root, Path(images.index), split)
    return read_small_set(images.kind, root, split, images.valid_fraction)


def _count(kind: str, known: Kind, root: Path | None, valid_fraction: float) -> tuple[list[str], dict[str, int]]:
    if root is not None:
        missing = [file for file in known.needs if not (root / file).is_file()]
        if missing:
            raise ConfigError(
                f"data.path={root} does not hold {kind}: {missing[0]} is missing; give the folder that it is in, as "
                "torchvision keeps it"
            )
    classes: list[str] = []
    num_images = {}
    for split in (TRAIN, VALID):
        small = read_small_set(kind, root, split, valid_fraction)
        classes, num_images[split] = small.classes, len(small.labels)
    return classes, num_images

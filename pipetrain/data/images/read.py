"""Single images of a set: from memory for small sets, from files for a folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from pipetrain.data.images import folder
from pipetrain.errors import ConfigError
from pipetrain.seeds import derive_seed
from pipetrain.vision import import_torchvision

Labels = npt.NDArray[np.int64]


class Unreadable(Exception):
    """An image file that cannot be read; the text names it."""


class Images(Protocol):
    """The images of one split."""

    @property
    def labels(self) -> Labels:
        """The class number of each."""

    def image(self, number: int) -> Any:
        """One image: uint8 [channels, height, width], or one of PIL, in the mode of its file.

        Raises:
            Unreadable: if its file is broken or gone.
        """


@dataclass(frozen=True)
class SmallSet:
    """All images of a split in memory: uint8 [images, channels, height, width]."""

    pixels: Tensor
    labels: Labels
    classes: list[str]

    def image(self, number: int) -> Any:
        return self.pixels[number]


def read_small_set(kind: str, root: Path | None, split: str, valid_fraction: float) -> SmallSet:
    """
    Args:
        kind: digits, fashion_mnist, cifar10 or cifar100.
        split: train or valid; the test images of a set that has such are its validation images.
        valid_fraction: of digits, which has no split of its own.

    Raises:
        ConfigError: if the files are damaged, or scikit-learn is not installed.
    """
    if kind == "digits":
        return _digits(split, valid_fraction)
    sets = import_torchvision("torchvision.datasets")
    reader = {"fashion_mnist": sets.FashionMNIST, "cifar10": sets.CIFAR10, "cifar100": sets.CIFAR100}[kind]
    try:
        found = reader(str(root), train=split == "train", download=False)
    except Exception as error:  # torchvision's readers assert, index and unpickle what may be anything
        why = str(error).replace(" You can use download=True to download it", "") or type(error).__name__
        raise ConfigError(f"data.path={root} does not hold a whole {kind}: {why}") from error
    pixels = torch.as_tensor(found.data)
    if len(pixels) != len(found.targets):
        raise ConfigError(
            f"data.path={root} does not hold a whole {kind}: {len(pixels)} images and {len(found.targets)} labels"
        )
    pixels = pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
    return SmallSet(pixels, np.asarray(found.targets, dtype=np.int64), list(found.classes))


def _digits(split: str, valid_fraction: float) -> SmallSet:
    """1,797 handwritten digits of 8x8 pixels in 17 greys, as scikit-learn brings them."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ConfigError(
            "data.set=digits comes with scikit-learn, which is not installed: pip install 'pipetrain[demo]', "
            "or train on your images: data.set=folder data.path=..."
        ) from None
    found = load_digits()
    held = np.array([derive_seed("held out", number) / 2**63 < valid_fraction for number in range(len(found.target))])
    chosen = held if split == "valid" else ~held
    pixels = torch.from_numpy((found.images[chosen] * (255 / 16)).round().astype(np.uint8))[:, None]
    return SmallSet(pixels, found.target[chosen].astype(np.int64), [str(digit) for digit in range(10)])


class FolderImages:
    """The images of a folder, read when they are asked for."""

    def __init__(self, root: Path, index: Path, split: str) -> None:
        self._root = root
        self._files = folder.load(index).files[split]
        self.labels = np.array([number for _, number in self._files], dtype=np.int64)

    def image(self, number: int) -> Any:
        path = self._root / self._files[number][0]
        try:
            with Image.open(path) as image:
                image.load()
                if image.mode == "F":
                    raise ValueError("floating-point pixels")
                return image
        except Exception as error:
            why = folder.why_unreadable(path) or str(error)
            raise Unreadable(f"{path} cannot be read: {why}") from None


def over_white(image: Image.Image) -> Image.Image:
    """Red, green and blue; what is transparent lies over white."""
    if image.mode.startswith("I"):  # 16 bits, which `convert` would cut off at 255
        image = Image.fromarray((np.asarray(image).astype(np.int64).clip(0, 0xFFFF) >> 8).astype(np.uint8))
    if image.mode == "LA":
        grey = Image.new("L", image.size, 255)
        grey.paste(image.getchannel("L"), mask=image.getchannel("A"))
        return grey.convert("RGB")
    if image.mode in ("RGBA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image)
        return white
    return image.convert("RGB")

"""What an image goes through before the model sees it: size, augmentation, standardised values."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pipetrain.data.images.read import over_white
from pipetrain.vision import import_torchvision

_EVALUATED_SHARE = 0.875  # of a photograph's shorter side is looked at in evaluation, its middle


class Augmentation:
    """Transforms of one image, by torchvision; random ones draw from torch's default generator.

    crop: a random part, of small images after a border of an eighth was added, of photographs between 8 % and all of
    it, as Szegedy et al. 2015 do. flip: left and right, half of the time. erase: a random rectangle, half of the time
    (Zhong et al. 2017). trivial: one random change of shape or colour (TrivialAugment, Müller and Hutter 2021).
    """

    def __init__(
        self,
        names: Sequence[str],
        size: int,
        channels: int,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        zoom: bool,
    ) -> None:
        """
        Args:
            names: any of crop, flip, erase, trivial.
            size: side of the images that come out.
            channels: 1 or 3.
            mean, std: of the set, by channel.
            zoom: images are photographs of any size.
        """
        v2 = import_torchvision("torchvision.transforms.v2")
        steps: list[Any] = []
        if zoom and "crop" in names:
            steps.append(_crop_of_photograph(size, v2))
        elif zoom:
            steps += [over_white, v2.Resize(round(size / _EVALUATED_SHARE), antialias=True), v2.CenterCrop(size)]
        else:
            steps.append(_Resized(size, v2))
            if "crop" in names:
                steps.append(v2.RandomCrop(size, padding=max(1, size // 8)))
        if "flip" in names:
            steps.append(v2.RandomHorizontalFlip())
        if "trivial" in names:
            steps.append(v2.TrivialAugmentWide())
        steps += [v2.PILToTensor(), v2.RGB() if channels == 3 else v2.Grayscale()]
        if "erase" in names:
            steps.append(v2.RandomErasing(p=0.5))
        self._transform = v2.Compose(steps)
        same = len(mean) == channels
        self._mean = torch.tensor(mean if same else [sum(mean) / len(mean)] * channels)[:, None, None]
        self._std = torch.tensor(std if same else [sum(std) / len(std)] * channels)[:, None, None]

    def __call__(self, image: Any) -> Tensor:
        """uint8 [channels, size, size]."""
        made: Tensor = self._transform(image)
        return made

    def standardised(self, images: Tensor) -> Tensor:
        """uint8 [rows, channels, size, size] -> float32 with a mean of 0 and a deviation of 1 over the set."""
        return (images.float() / 255 - self._mean) / self._std


def _crop_of_photograph(size: int, v2: Any) -> torch.nn.Module:
    """`RandomResizedCrop`, which gives colours to the part that is looked at only: large files take half as long."""

    class Crop(v2.RandomResizedCrop):  # type: ignore[misc]
        def transform(self, image: Any, params: dict[str, int]) -> Any:
            box = (params["left"], params["top"], params["left"] + params["width"], params["top"] + params["height"])
            return v2.functional.resize(over_white(image.crop(box)), self.size, self.interpolation, antialias=True)

    made: torch.nn.Module = Crop(size, antialias=True)
    return made


class _Resized(torch.nn.Module):
    def __init__(self, size: int, v2: Any) -> None:
        super().__init__()
        self._size, self._resize = size, v2.Resize((size, size), antialias=True)

    def forward(self, image: Tensor) -> Tensor:
        if image.shape[-2:] == (self._size, self._size):
            return image
        resized: Tensor = self._resize(image)
        return resized

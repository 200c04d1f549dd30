"""Images: what is read, what comes out, that it repeats, and what is said about sets that are not whole."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipetrain.data.images.augment import Augmentation
from pipetrain.data.images.batches import ImageBatches
from pipetrain.data.images.read import over_white
from pipetrain.data.images.sets import KINDS, ImageSet, prepare_images
from pipetrain.errors import ConfigError, DataError
from pipetrain.rules.data import AUGMENTATIONS, IMAGE_SETS
from pipetrain.seeds import seeded


def prepared(kind: str = "digits", path: Path | None = None, cache: Path | None = None, **changes: Any) -> ImageSet:
    settings = {"size": None, "channels": None, "valid_fraction": 0.1, "on_error": "fail", "say": lambda text: None}
    return prepare_images(kind, str(path) if path else None, **(settings | {"cache_dir": str(cache)} | changes))


def batches(images: ImageSet, split: str = "train", **changes: Any) -> ImageBatches:
    settings = {"batch_size": 8, "seed": 0, "augment": KINDS[images.kind].augment, "workers": 0}
    return ImageBatches(images, split, **(settings | changes))


def folder_of(root: Path, classes: dict[str, int], split: str = "") -> Path:
    """Images of one colour each, sizes differ: 20 + number of the image."""
    for place, (name, number) in enumerate(classes.items()):
        folder = root / split / name
        folder.mkdir(parents=True)
        for n in range(number):
            Image.new("RGB", (20 + n, 24), (60 * place, 10 * n, 200)).save(folder / f"{n}.png")
    return root


def test_the_rules_know_the_same_sets_and_augmentations() -> None:
    assert tuple(KINDS) == IMAGE_SETS
    assert {name for kind in KINDS.values() for name in kind.augment} <= set(AUGMENTATIONS)


# ---- digits ----------------------------------------------------------------------------------------------------------


def test_digits_come_with_scikit_learn_and_are_standardised() -> None:
    images = prepared()
    assert (images.size, images.channels, len(images.classes)) == (32, 1, 10)
    assert sum(images.num_images.values()) == 1797
    assert 0.08 < images.num_images["valid"] / 1797 < 0.12
    all_of_them = batches(images, "valid", batch_size=images.num_images["valid"]).batch(0)[0][0]
    assert all_of_them.shape[1:] == (1, 32, 32)
    assert all_of_them.dtype is torch.float32
    assert float(all_of_them.mean()) == pytest.approx(0, abs=0.05)
    assert float(all_of_them.std()) == pytest.approx(1, abs=0.05)


def test_the_same_number_always_gives_the_same_batch_on_any_number_of_processes() -> None:
    images = prepared()
    one = batches(images)
    number = one.num_batches + 3  # of the second epoch
    expected = one.batch(number)
    for other in (batches(images), batches(images, workers=1), batches(images, workers=2)):
        other.batch(0)
        assert torch.equal(other.batch(number - 1)[1], batches(images).targets(number - 1))
        got = other.batch(number)
        assert torch.equal(got[0][0], expected[0][0])
        assert torch.equal(got[1], expected[1])
    assert torch.equal(one.targets(number), expected[1])
    assert not torch.equal(batches(images, seed=1).batch(number)[0][0], expected[0][0])


def test_an_epoch_has_each_image_once_and_the_next_one_in_another_order_and_augmented_anew() -> None:
    images = prepared()
    plain = batches(images, augment=())
    epochs = [
        torch.cat([plain.batch(e * plain.num_batches + i)[0][0] for i in range(plain.num_batches)]) for e in (0, 1)
    ]
    assert len(epochs[0]) == images.num_images["train"] // 8 * 8
    assert not torch.equal(*epochs)
    assert len({image.numpy().tobytes() for image in epochs[0]}) > 0.99 * len(epochs[0])  # a few digits are alike
    augmented = batches(images)
    number = int(np.flatnonzero(augmented._samples.numbers(0) == augmented._samples.numbers(0)[0])[0])
    first = augmented.batch(0)[0][0][number]
    assert not torch.equal(first, plain.batch(0)[0][0][number])


def test_augmentation_draws_from_the_epoch() -> None:
    images = prepared()
    reader = batches(images, batch_size=images.num_images["train"])
    order = [np.argsort(reader._samples.numbers(epoch)) for epoch in (0, 1)]
    first, second = (reader.batch(epoch)[0][0][torch.from_numpy(order[epoch])] for epoch in (0, 1))
    same = sum(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert same < 0.1 * len(first)


def test_validation_images_come_as_they_are_once_and_in_order() -> None:
    images = prepared()
    valid = batches(images, "valid", batch_size=50)
    assert [valid.rows(i) for i in range(valid.num_batches)] == [
        *[50] * (valid.num_batches - 1),
        images.num_images["valid"] % 50 or 50,
    ]
    assert torch.equal(valid.batch(0)[0][0], batches(images, "valid", batch_size=50, seed=9).batch(0)[0][0])
    assert torch.equal(valid.batch(0)[0][0], valid.batch(valid.num_batches)[0][0])


def test_the_users_randomness_is_left_alone() -> None:
    reader = batches(prepared())
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    reader.batch(0)
    assert torch.equal(torch.rand(2), expected)


# ---- folders ---------------------------------------------------------------------------------------------------------


def test_a_folder_with_train_and_val_is_read_as_imagenet_is(tmp_path: Path) -> None:
    root = folder_of(folder_of(tmp_path / "photos", {"cat": 5, "dog": 4}, "train"), {"cat": 2, "dog": 3}, "val")
    images = prepared("folder", root, tmp_path, size=16)
    assert images.classes == ("cat", "dog")
    assert images.num_images == {"train": 9, "valid": 5}
    valid = batches(images, "valid")
    (x,), y = valid.batch(0)
    assert x.shape == (5, 3, 16, 16)
    assert y.tolist() == [0, 0, 1, 1, 1]
    kind = KINDS["folder"]
    colour = torch.tensor([60, 10, 200]) / 255  # the second dog
    assert torch.allclose(x[3, :, 8, 8], (colour - torch.tensor(kind.mean)) / torch.tensor(kind.std), atol=1e-5)


def test_a_folder_without_a_validation_split_holds_some_images_out_by_their_names(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "photos", {"cat": 60, "dog": 60})
    images = prepared("folder", root, tmp_path, valid_fraction=0.2)
    assert sum(images.num_images.values()) == 120
    assert 12 <= images.num_images["valid"] <= 36
    before = {path for path, _ in _listed(images)["valid"]}
    Image.new("RGB", (9, 9)).save(root / "cat" / "new.png")
    after = {path for path, _ in _listed(prepared("folder", root, tmp_path, valid_fraction=0.2))["valid"]}
    assert after - {"cat/new.png"} == before


def _listed(images: ImageSet) -> dict[str, list[tuple[str, int]]]:
    from pipetrain.data.images.folder import load

    assert images.index is not None
    return load(Path(images.index)).files


def _modes() -> dict[str, Image.Image]:
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    palette = clear.convert("P")
    palette.info["transparency"] = 0
    return {
        "RGBA": clear,
        "LA": clear.convert("LA"),
        "P": palette,
        "L": Image.new("L", (8, 8), 255),
        "1": Image.new("1", (8, 8), 1),
    }


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "1"])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_every_mode_become_what_the_model_takes_over_white(mode: str, channels: int, tmp_path: Path) -> None:
    image = _modes()[mode]
    for n in range(3):
        folder = tmp_path / "photos" / f"class{n}"
        folder.mkdir(parents=True)
        image.save(folder / "0.png", **({"transparency": 0} if mode == "P" else {}))
    images = prepared("folder", tmp_path / "photos", tmp_path, size=8, channels=channels, valid_fraction=0.0)
    (x,), _ = batches(images, batch_size=3, augment=()).batch(0)
    assert x.shape == (3, channels, 8, 8)
    white = Augmentation((), 8, channels, KINDS["folder"].mean, KINDS["folder"].std, zoom=True)
    assert torch.allclose(x, white.standardised(torch.full_like(x, 255)), atol=0.02)  # grey is rounded


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "1", "RGB", "CMYK"])
def test_a_crop_is_torchvisions_of_the_whole_picture_over_white(mode: str) -> None:
    """Colours and white come after the crop here, which changes nothing but the time."""
    noise = Image.effect_noise((40, 30), 90)
    picture = Image.merge("RGBA", (noise, noise.rotate(90), noise.rotate(180), noise.rotate(45))).convert(mode)
    if mode == "P":
        picture.info["transparency"] = 7
    whole = Image.new("RGBA", picture.size, "white")
    whole.alpha_composite(picture.convert("RGBA"))
    kind = KINDS["folder"]
    crop = Augmentation(("crop", "flip"), 16, 3, kind.mean, kind.std, zoom=True)
    for seed in range(8):
        torch.manual_seed(seed)
        mine = crop(picture)
        torch.manual_seed(seed)
        assert torch.equal(mine, crop(whole.convert("RGB")))


def _broken(root: Path) -> Path:
    file = root / "train" / "cat" / "1.png"
    file.write_bytes(file.read_bytes()[:40])
    (root / "train" / "dog" / "0.jpg").write_text("this is no image")
    return root


def test_an_image_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    root = _broken(
        folder_of(folder_of(tmp_path / "photos", {"cat": 3, "dog": 3}, "train"), {"cat": 1, "dog": 1}, "val")
    )
    images = prepared("folder", root, tmp_path, size=8)
    for workers in (0, 1):
        with pytest.raises(DataError, match=r"(1.png|0.jpg) cannot be read: .*data.on_error=skip"):
            batches(images, batch_size=7, workers=workers).batch(0)


def test_images_that_cannot_be_read_are_left_out_and_counted(tmp_path: Path) -> None:
    root = _broken(
        folder_of(folder_of(tmp_path / "photos", {"cat": 3, "dog": 3}, "train"), {"cat": 1, "dog": 1}, "val")
    )
    said: list[str] = []
    images = prepared("folder", root, tmp_path, size=8, on_error="skip", say=said.append)
    assert (images.skipped, images.num_images["train"]) == (2, 5)
    assert [line.split(":")[0] for line in said] == ["skipped train/cat/1.png", "skipped train/dog/0.jpg"]
    batches(images, batch_size=5).batch(0)
    assert images.fingerprint != prepared("folder", root, tmp_path, size=8).fingerprint
    again = prepared("folder", root, tmp_path, size=8, on_error="skip")  # from the notes of the first time
    assert (again.skipped, again.fingerprint) == (2, images.fingerprint)


# ---- what is wrong ---------------------------------------------------------------------------------------------------


def _no_classes(root: Path) -> None:
    root.mkdir()


def _empty_class(root: Path) -> None:
    folder_of(root, {"cat": 2})
    (root / "dog").mkdir()


def _a_class_only_in_val(root: Path) -> None:
    folder_of(folder_of(root, {"cat": 2}, "train"), {"cat": 1, "dog": 1}, "val")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda root: None, "is no folder; give one with a folder of images for each class"),
        (_no_classes, "holds no folders"),
        (_empty_class, "has no readable image in dog; remove the folder or fill it"),
        (_a_class_only_in_val, "has folders that .*train has not: dog"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused(make: Callable[[Path], None], says: str, tmp_path: Path) -> None:
    make(tmp_path / "photos")
    with pytest.raises(ConfigError, match=says):
        prepared("folder", tmp_path / "photos", tmp_path)


@pytest.mark.parametrize("kind", ["fashion_mnist", "cifar10", "cifar100"])
def test_a_set_whose_files_are_missing_is_refused(kind: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"does not hold {kind}: .* is missing"):
        prepared(kind, tmp_path)


def test_a_batch_larger_than_the_set_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"batch_size=5000 is more than the .* training images"):
        batches(prepared(), batch_size=5000)


# ---- augmentation ----------------------------------------------------------------------------------------------------


def test_crop_moves_by_at_most_an_eighth_and_flip_mirrors() -> None:
    image = torch.zeros(1, 16, 16, dtype=torch.uint8)
    image[0, 8, 3] = 255
    with seeded(0):
        crop = Augmentation(("crop",), 16, 1, (0.0,), (1.0,), zoom=False)
        places = {tuple(crop(image).nonzero()[0].tolist()) for _ in range(300)}
        flip = Augmentation(("flip",), 16, 1, (0.0,), (1.0,), zoom=False)
        mirrored = {tuple(flip(image).nonzero()[0].tolist()) for _ in range(50)}
    assert places == {(0, 8 + down, 3 + right) for down in range(-2, 3) for right in range(-2, 3)}
    assert mirrored == {(0, 8, 3), (0, 8, 12)}


@pytest.mark.parametrize("name", ["erase", "trivial"])
def test_other_augmentations_change_the_image_and_keep_its_shape(name: str) -> None:
    image = torch.arange(3 * 32 * 32).reshape(3, 32, 32).to(torch.uint8)
    with seeded(1):
        augmentation = Augmentation((name,), 32, 3, (0.0,) * 3, (1.0,) * 3, zoom=False)
        made = [augmentation(image) for _ in range(20)]
    assert all(x.shape == image.shape and x.dtype is torch.uint8 for x in made)
    assert sum(not torch.equal(x, image) for x in made) >= 5


def test_sixteen_bits_keep_their_upper_eight(tmp_path: Path) -> None:
    values = np.array([[0, 255, 256, 0x8000], [0xFFFF, 0x1234, 0xFF00, 1]], dtype=np.uint16)
    for name in ("a.png", "b.tif"):
        Image.fromarray(values).save(tmp_path / name)
        with Image.open(tmp_path / name) as image:
            assert image.mode.startswith("I")
            assert np.array_equal(np.asarray(over_white(image))[..., 0], values >> 8)


def test_pixels_of_unknown_range_are_refused(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "photos", {"cat": 3, "dog": 3})
    Image.fromarray(np.ones((8, 8), dtype=np.float32)).save(root / "cat" / "float.tif")
    said: list[str] = []
    images = prepared("folder", root, tmp_path, valid_fraction=0.0, on_error="skip", say=said.append)
    assert images.skipped == 1
    assert "floating-point pixels" in said[0]
    every = batches(prepared("folder", root, tmp_path, valid_fraction=0.0), batch_size=7)
    with pytest.raises(DataError, match=r"float.tif cannot be read: floating-point pixels"):
        every.batch(0)


def test_what_is_broken_is_found_anew_in_another_folder_and_after_a_repair(tmp_path: Path) -> None:
    """Files of the same names and sizes: only their places and times differ."""
    roots = [folder_of(tmp_path / name, {"cat": 3, "dog": 3}) for name in ("good", "bad")]
    for root in roots:
        Image.new("RGB", (6, 6)).save(root / "cat" / "1.ppm")
    broken = roots[1] / "cat" / "1.ppm"
    whole = broken.read_bytes()
    broken.write_bytes(bytes(len(whole)))

    def skipped(root: Path) -> int:
        return prepared("folder", root, tmp_path, valid_fraction=0.0, on_error="skip").skipped

    assert [skipped(root) for root in roots] == [0, 1]
    assert [skipped(root) for root in roots] == [0, 1]
    broken.write_bytes(whole)
    os.utime(broken, ns=(1, 1))
    assert skipped(roots[1]) == 0


def test_links_to_nothing_and_folders_with_the_name_of_an_image_are_no_crash(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "photos", {"cat": 3, "dog": 3})
    (root / "cat" / "folder.jpg").mkdir()
    (root / "dog" / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    images = prepared("folder", root, tmp_path, valid_fraction=0.0, on_error="skip")
    assert (images.num_images["train"], images.skipped) == (6, 1)


@pytest.mark.parametrize(
    ("classes", "held", "problem"),
    [
        ({"cat": 3}, {"cat": 1}, "holds one class only, cat"),
        ({"cat": 3, "dog": 3}, {"cat": 1, "dog": 0}, "val has no readable image in dog"),
    ],
)
def test_classes_that_tell_nothing_are_refused(
    tmp_path: Path, classes: dict[str, int], held: dict[str, int], problem: str
) -> None:
    root = folder_of(folder_of(tmp_path / "photos", classes, "train"), held, "val")
    with pytest.raises(ConfigError, match=problem):
        prepared("folder", root, tmp_path)


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "photos", {"cat": 3, "dog": 3})
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"data.cache_dir=.*file.* cannot be written"):
        prepared("folder", root, tmp_path / "file")


def _idx(array: Any) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return header + array.astype(np.uint8).tobytes()


def _fashion(root: Path, images: int, labels: int) -> Path:
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for name in ("train", "t10k"):
        (raw / f"{name}-images-idx3-ubyte").write_bytes(_idx(np.arange(images * 784).reshape(images, 28, 28) % 251))
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(_idx(np.arange(labels) % 10))
    return root


def test_fashion_mnist_is_read_as_its_files_say(tmp_path: Path) -> None:
    images = prepared("fashion_mnist", _fashion(tmp_path, 12, 12), tmp_path)
    assert images.num_images == {"train": 12, "valid": 12}
    (x,), y = batches(images, split="valid", batch_size=12).batch(0)
    assert x.shape == (12, 1, 28, 28)
    assert y.tolist() == [n % 10 for n in range(12)]


def test_damaged_fashion_mnist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="12 images and 11 labels"):
        prepared("fashion_mnist", _fashion(tmp_path / "a", 12, 11), tmp_path)
    root = _fashion(tmp_path / "b", 12, 12)
    (root / "FashionMNIST" / "raw" / "train-images-idx3-ubyte").write_bytes(b"garbage" * 50)
    with pytest.raises(ConfigError, match="does not hold a whole fashion_mnist"):
        prepared("fashion_mnist", root, tmp_path)

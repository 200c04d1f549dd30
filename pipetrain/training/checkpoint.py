"""Checkpoints: whole or absent, and the same for every number of stages.

    checkpoints/step_00000100/
        stage_0.safetensors   weights and optimizer state of the rank that wrote it, by names of the unsplit model
        stage_1.safetensors
        manifest.json         step, settings, and for every file its size, SHA-256 and tensors; written last

All files are written and synced in a folder aside, which is then renamed into place. Loading looks tensors up by name,
so it does not matter how many stages wrote them; no pickle is ever read.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipetrain.engine.transport import Transport
from pipetrain.errors import CheckpointError

FORMAT = 1
_REASON_BYTES = 400
_NAME = re.compile(r"step_(\d{8,})")


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` says.

    Attributes:
        step: updates done.
        config: the run's settings, as `config.to_json` gives them.
        data: identifies the data; a resumed run must have the same.
        loss_val: of the evaluation at this step, or None.
        tokenizer: see `vocabulary.tokenizer_id`.
        files: file name -> {"bytes": ..., "sha256": ..., "tensors": [...]}.
    """

    step: int
    config: dict[str, Any]
    data: str
    loss_val: float | None
    files: dict[str, dict[str, Any]]
    format: int = FORMAT
    tokenizer: str | None = None


# ---- writing -----------------------------------------------------------------------------------------------------


def save(
    folder: Path,
    tensors: Mapping[str, Tensor],
    transport: Transport,
    *,
    step: int,
    config: dict[str, Any],
    data: str,
    loss_val: float | None,
    keep: int,
    tokenizer: str | None = None,
) -> None:
    """Writes one checkpoint together with all other ranks, then removes old ones.

    Args:
        tensors: of this rank; those of the first replica are written.

    Raises:
        CheckpointError: on every rank, if any of them could not write. Nothing that was there before is touched.
    """
    aside, final = folder / f".writing_{step:08d}", folder / f"step_{step:08d}"
    writes = transport.replicas.number == 0
    first = writes and transport.rank == 0
    _together(transport, aside, lambda: _make_empty(aside) if first else None)
    _together(transport, aside, lambda: _write_stage(aside, transport.rank, tensors) if writes else None)

    def commit() -> None:
        entries = sorted(aside.glob("*.entry"))
        files = {entry.stem: json.loads(entry.read_text()) for entry in entries}
        manifest = Manifest(step=step, config=config, data=data, loss_val=loss_val, files=files, tokenizer=tokenizer)
        for entry in entries:
            entry.unlink()
        _write_synced(aside / "manifest.json", json.dumps(manifest.__dict__).encode())
        if final.exists():  # a torn or foreign folder of that name: never written into, never mixed with
            shutil.rmtree(final)
        os.rename(aside, final)
        _sync_folder(folder)
        _remove_old(folder, step, keep)

    _together(transport, aside, lambda: commit() if first else None)


def _together(transport: Transport, aside: Path, work: Callable[[], None]) -> None:
    """Runs `work` on every rank; if it failed on any of them, all clean up and raise."""
    failure: Exception | None = None
    try:
        work()
    except Exception as error:  # safetensors has an exception of its own for a failed write
        failure = error
    reason = _first_reason(transport, failure)
    if not reason:
        return
    if transport.rank == 0 and transport.replicas.number == 0:
        shutil.rmtree(aside, ignore_errors=True)
    try:
        remains = f"the checkpoint of step {read_manifest(find_usable(aside.parent)[0]).step} is intact"
    except CheckpointError:
        remains = "there was no earlier checkpoint"
    free = shutil.disk_usage(aside.parent).free
    raise CheckpointError(
        f"cannot write a checkpoint to {aside.parent}: {reason} ({free / 2**20:.0f} MiB free there); {remains}. "
        "Make room and go on with resume="
        f"{aside.parent.parent}"
    )


def _first_reason(transport: Transport, failure: Exception | None) -> str:
    """Why the first failing rank failed, on every rank; empty if none did."""
    failed = torch.zeros(transport.num_ranks, dtype=torch.int64)
    failed[transport.rank] = failure is not None
    failed = transport.replicas.sum(transport.all_reduce(failed))  # only those of the first replica write
    if not failed.any():
        return ""
    letters = torch.zeros(_REASON_BYTES, dtype=torch.int64)
    if failure is not None and transport.rank == int(failed.nonzero()[0]):
        text = f"{failure}".encode()[:_REASON_BYTES]
        letters[: len(text)] = torch.tensor(list(text))
    letters = transport.replicas.sum(transport.all_reduce(letters))
    return bytes(letters[letters > 0].tolist()).decode(errors="replace")


def _make_empty(folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    for torn in folder.parent.glob(".writing_*"):
        shutil.rmtree(torn)
    folder.mkdir()


def _write_stage(folder: Path, rank: int, tensors: Mapping[str, Tensor]) -> None:
    path = folder / f"stage_{rank}.safetensors"
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    entry = {"bytes": path.stat().st_size, "sha256": _sha256(path), "tensors": list(tensors)}
    (folder / f"{path.name}.entry").write_text(json.dumps(entry))


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_old(folder: Path, written: int, keep: int) -> None:
    """Keeps the newest `keep` up to the one just written, and the one with the lowest validation loss.

    Later ones are leftovers: the run was resumed from an earlier one because they were damaged.
    """
    for step in _steps(folder):
        if step > written:
            shutil.rmtree(folder / f"step_{step:08d}", ignore_errors=True)
    steps = sorted(_steps(folder))
    losses = {step: loss for step in steps if (loss := _loss_val(folder, step)) is not None}
    best = {min(losses, key=lambda step: losses[step])} if losses else set()
    for step in steps[:-keep]:
        if step not in best:
            shutil.rmtree(folder / f"step_{step:08d}", ignore_errors=True)


def _loss_val(folder: Path, step: int) -> float | None:
    try:
        loss: float | None = read_manifest(folder / f"step_{step:08d}").loss_val
    except CheckpointError:
        return None
    return loss if loss is not None and loss == loss else None


# ---- finding -----------------------------------------------------------------------------------------------------


def _steps(folder: Path) -> list[int]:
    return [int(match[1]) for path in folder.glob("step_*") if (match := _NAME.fullmatch(path.name))]


def newest(folder: Path) -> tuple[int, Path] | None:
    """The newest finished checkpoint of a run, unverified."""
    steps = _steps(folder)
    return (max(steps), folder / f"step_{max(steps):08d}") if steps else None


def find_usable(folder: Path, *, best: bool = False) -> tuple[Path, list[str]]:
    """The newest checkpoint whose files are all what the manifest says, and why newer ones were skipped.

    Args:
        best: that with the lowest validation loss goes first, those without one do not count.

    Raises:
        CheckpointError: if there is none.
    """
    skipped: list[str] = []
    steps = sorted(_steps(folder), reverse=True)
    if best:
        losses = {step: loss for step in steps if (loss := _loss_val(folder, step)) is not None}
        steps = sorted(losses, key=lambda step: losses[step])
        if not steps:
            raise CheckpointError(
                f"no checkpoint in {folder} has a validation loss, so none is the best; use weights=newest"
            )
    for step in steps:
        path = folder / f"step_{step:08d}"
        try:
            verify(path)
        except CheckpointError as error:
            skipped.append(str(error))
        else:
            return path, skipped
    reasons = "".join(f"\n  {reason}" for reason in skipped)
    raise CheckpointError(f"no usable checkpoint in {folder}{reasons or ': it holds none'}")


def read_manifest(path: Path) -> Manifest:
    """Reads the manifest of one checkpoint.

    Raises:
        CheckpointError: if it is missing, torn or of another format.
    """
    try:
        raw = json.loads((path / "manifest.json").read_text())
        manifest = Manifest(**raw)
    except FileNotFoundError:
        raise CheckpointError(f"{path.name}: manifest.json is missing") from None
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path.name}: manifest.json cannot be read ({error})") from error
    if manifest.format != FORMAT:
        raise CheckpointError(f"{path.name}: format {manifest.format}, but this version reads format {FORMAT}")
    return manifest


def verify(path: Path) -> Manifest:
    """Checks size and SHA-256 of every file.

    Raises:
        CheckpointError: naming the first file that is not what the manifest says.
    """
    manifest = read_manifest(path)
    for name, entry in manifest.files.items():
        file = path / name
        if Path(name).name != name or not file.is_file():
            raise CheckpointError(f"{path.name}: {name} is missing")
        if file.stat().st_size != entry["bytes"]:
            raise CheckpointError(f"{path.name}: {name} has {file.stat().st_size} bytes instead of {entry['bytes']}")
        if _sha256(file) != entry["sha256"]:
            raise CheckpointError(f"{path.name}: {name} was changed (its SHA-256 differs)")
    return manifest


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- reading -----------------------------------------------------------------------------------------------------


class Reader:
    """Looks up tensors of one checkpoint by name, whichever stage wrote them."""

    def __init__(self, path: Path) -> None:
        self.manifest = read_manifest(path)
        self._files = {name: safe_open(path / name, framework="pt") for name in self.manifest.files}
        self._home = {tensor: name for name, entry in self.manifest.files.items() for tensor in entry["tensors"]}

    def names(self, prefix: str) -> list[str]:
        """The names that start with `prefix`."""
        return [name for name in self._home if name.startswith(prefix)]

    def __contains__(self, name: str) -> bool:
        return name in self._home

    def shape(self, name: str) -> list[int]:
        """The shape of a tensor that is there, without reading it."""
        return list(self._files[self._home[name]].get_slice(name).get_shape())

    def get(self, name: str) -> Tensor:
        """One tensor, on the CPU.

        Raises:
            CheckpointError: if the checkpoint has none of that name.
        """
        if name not in self._home:
            raise CheckpointError(f"the checkpoint has no {name}: it is of another model")
        tensor: Tensor = self._files[self._home[name]].get_tensor(name)
        return tensor

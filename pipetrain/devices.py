"""What `devices=` means: text from the command line to one device name for each rank."""

from typing import Any

from pipetrain.errors import ConfigError

_FORMS = "4, auto, cpu, cpu:4, cuda, cuda:1, [0,1], [cuda:0,cuda:1] or [cpu,cpu]"


def parse_devices(devices: Any, num_gpus: int, wanted: int | None = None) -> tuple[str, ...]:
    """The device of each rank, such as `("cuda:0", "cuda:1")` or `("cpu", "cpu")`.

    Args:
        devices: what the user typed: a number of devices, `auto`, a name with a count or an index, or a list.
        num_gpus: GPUs of this machine. Without any, a number of devices means that many CPU processes.
        wanted: with `auto` so many GPUs, or CPU processes on a machine without GPUs; None is all GPUs, or one process.

    Raises:
        ConfigError: if it is none of the forms, or asks for a GPU that is not there.
    """
    if isinstance(devices, str) and devices.strip().isdigit():
        devices = int(devices)
    if isinstance(devices, bool) or not isinstance(devices, int | str | list | tuple):
        raise ConfigError(f"devices={devices} is none of: {_FORMS}")
    if isinstance(devices, int):
        return _count(devices, num_gpus)
    if isinstance(devices, str):
        return _named(devices.strip(), num_gpus, wanted)
    return _listed([str(d).strip() for d in devices], num_gpus)


def _count(count: int, num_gpus: int) -> tuple[str, ...]:
    if count < 1:
        raise ConfigError(f"devices={count} must be at least 1; use devices=1 for a single device")
    if num_gpus == 0:
        return ("cpu",) * count
    if count > num_gpus:
        gpus = "1 GPU" if num_gpus == 1 else f"{num_gpus} GPUs"
        raise ConfigError(
            f"devices={count}, but this machine has {gpus}. Use devices={num_gpus}, "
            f"or devices=cpu:{count} for CPU processes"
        )
    return tuple(f"cuda:{i}" for i in range(count))


def _named(name: str, num_gpus: int, wanted: int | None) -> tuple[str, ...]:
    if name == "auto":
        if num_gpus == 0:
            return ("cpu",) * max(wanted or 1, 1)
        return _count(wanted or num_gpus, num_gpus)
    if name == "cpu":
        return ("cpu",)
    kind, _, number = name.partition(":")
    if kind == "cpu" and number.isdigit():
        if int(number) < 1:
            raise ConfigError(f"devices={name} must ask for at least 1 process; use devices=cpu:1")
        return ("cpu",) * int(number)
    if kind == "cuda" and (number.isdigit() or name == "cuda"):
        return _listed([f"cuda:{number or 0}"], num_gpus)
    raise ConfigError(f"devices={name} is none of: {_FORMS}")


def _listed(names: list[str], num_gpus: int) -> tuple[str, ...]:
    shown = "[" + ",".join(names) + "]" if len(names) != 1 else names[0]
    if not names:
        raise ConfigError(f"devices=[] names no device; use one of: {_FORMS}")
    full = [f"cuda:{name}" if name.isdigit() else name for name in names]
    if all(name == "cpu" for name in full):
        return tuple(full)
    if not all(name.startswith("cuda:") and name[5:].isdigit() for name in full):
        raise ConfigError(f"devices={shown} must be all cpu or all GPU numbers, such as [0,1] or [cpu,cpu]")
    if len(set(full)) != len(full):
        raise ConfigError(f"devices={shown} names a GPU twice; every rank needs its own")
    missing = [name for name in full if int(name[5:]) >= num_gpus]
    if missing:
        there = f"cuda:0 to cuda:{num_gpus - 1}" if num_gpus else "no GPU"
        raise ConfigError(
            f"devices={shown} asks for {', '.join(missing)}, but this machine has {there}; "
            f"use devices=cpu:{len(full)} for CPU processes"
        )
    return tuple(full)

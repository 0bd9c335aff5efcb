"""Which device a run computes on."""

from __future__ import annotations

from compressor.errors import InputError, UnknownNameError


def usable_device(name: str) -> str:
    """Return the device to compute on; `auto` becomes a GPU where there is one.

    Raises:
        UnknownNameError, InputError: there is no such device, here or anywhere.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    known = ["cpu", "cuda", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    if name not in known:
        raise UnknownNameError("device", name, [*known, "auto"])
    if name != "cpu" and not torch.cuda.is_available():
        raise InputError(f"--device {name}: this machine has no usable GPU; give --device cpu")
    return name

"""Which device a run computes on."""

from __future__ import annotations

from compressor.errors import InputError, UnknownNameError

# As `torch.cpu.get_capabilities` names them: AVX-512 and AMX of x86, NEON and SVE of Arm.
_BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")


def usable_device(name: str, option: str = "device") -> str:
    """Return the device to compute on; `auto` becomes a GPU where there is one.

    Args:
        name: as typed.
        option: the one that it was typed with.

    Raises:
        UnknownNameError, InputError: there is no such device, here or anywhere.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    known = ["cpu", "cuda", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    if name not in known:
        raise UnknownNameError(option, name, [*known, "auto"])
    if name != "cpu" and not torch.cuda.is_available():
        raise InputError(f"--{option} {name}: this machine has no usable GPU; give --{option} cpu")
    return name


def require_compiler(device: str, option: str = "compile") -> None:
    """Refuse a machine on which torch.compile cannot build anything.

    Raises:
        InputError: it says what is missing.
    """
    import torch

    try:
        torch.compile(torch.nn.ReLU().to(device))(torch.zeros(2, device=device))
    except Exception as error:  # whatever a compiler, or its absence, makes of it
        said = str(error).strip().partition("\n")[0]
        raise InputError(
            f"--{option}: torch.compile does not work on {device} here ({type(error).__name__}: {said}); install a C++ "
            f"compiler, g++ say, or leave --{option} out"
        ) from error


def require_bfloat16(device: str) -> None:
    """Refuse a device that computes in bfloat16 only by converting from and to it, which is slower than float32.

    Raises:
        InputError: this one does.
    """
    import torch

    if device == "cpu":
        known: dict[str, bool] = getattr(
            torch.cpu, "get_capabilities", dict
        )()  # not every PyTorch that we work with has it
        fits = any(known.get(name) for name in _BFLOAT16)
        lacks = "no bfloat16 instructions that PyTorch sees (AVX-512 BF16, AMX, Arm BF16)"
    else:
        fits, lacks = torch.cuda.is_bf16_supported(including_emulation=False), "no bfloat16 units"
    if not fits:
        raise InputError(f"--amp: {device} has {lacks}, float32 is faster there; leave --amp out")

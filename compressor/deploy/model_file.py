"""The format of a model file: one safetensors file, the tensors, and in its metadata, as JSON, what belongs to them.

    format    "compressor-model"
    version   "1"
    content   {"spec": {"factory": "resnet18", "classes": 10, ...}, "cut": {...}, "attributes": {...}, ...}
    sha256    of the content and of every tensor

Nothing in a file is run, and nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from torch import Tensor

from compressor._utils import atomic_write
from compressor.errors import ArtifactError, InputError

FORMAT = "compressor-model"
VERSION = 1


@dataclass(frozen=True)
class Description:
    """What a model file says about itself.

    Attributes:
        spec: the fields of the `ModelSpec` that builds the dense model; None for a model made otherwise.
        shapes: of every parameter and buffer.
        cut: by name, the dense shape of each tensor that is smaller now; empty where there is no spec.
        attributes: by module, the numbers among its attributes, which shapes do not tell (`groups`, `eps`, ...).
        channels_last: the tensors that lie in memory with their channels last; results differ in the last bit.
        extra: what the caller wanted to have kept.
        versions: of the packages that made the file.
        size_bytes: size of the file.
    """

    spec: dict[str, Any] | None
    shapes: dict[str, tuple[int, ...]]
    cut: dict[str, tuple[int, ...]]
    attributes: dict[str, dict[str, Any]]
    channels_last: tuple[str, ...]
    extra: dict[str, Any]
    versions: dict[str, str]
    size_bytes: int


def write(path: Path, content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a model file, beside `path` and then renamed.

    Raises:
        InputError: the content is not JSON, or the path cannot be written. A file that is there already stays.
    """
    from safetensors.torch import save

    text = _json(content)
    # safetensors refuses tensors that are not contiguous or that share memory; a fresh copy is neither.
    plain = torch.contiguous_format
    stored = {name: tensor.detach().cpu().clone(memory_format=plain) for name, tensor in tensors.items()}
    metadata = {"format": FORMAT, "version": str(VERSION), "content": text, "sha256": checksum(text, stored)}
    # Written by Python, not by safetensors' own writer: a full disk is an OSError then, as everywhere.
    with atomic_write(path) as unfinished:
        unfinished.write_bytes(save(stored, metadata))


def read(path: Path) -> tuple[Description, dict[str, Tensor]]:
    """Read a file and hold it against its checksum.

    Raises:
        ArtifactError: the file is missing, damaged, of another project or of a newer compressor.
    """
    if not path.is_file():
        raise ArtifactError(
            f"{path} is {'a folder' if path.is_dir() else 'missing'}: give a file that compressor saved"
        )
    metadata, tensors = _parsed(path)
    _check_format(path, metadata)
    text = metadata.get("content", "")
    if checksum(text, tensors) != metadata.get("sha256"):
        raise ArtifactError(f"{path} is damaged: its content does not match its checksum; take it from a copy")
    # A checksum is no signature: what someone forged with one that fits is still looked at piece by piece.
    try:
        content = msgspec.json.decode(text, type=_Content)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise ArtifactError(f"{path} is no model file as compressor writes them: {error}; save it again") from error
    return _description(path, content, tensors), tensors


def checksum(text: str, tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of the metadata and of every tensor's name, type, shape and bytes.

    safetensors' header says where each tensor lies and how long it is, so that a file cut short is noticed; a flipped
    bit among the weights or in our metadata is not.
    """
    digest = hashlib.sha256(text.encode())
    # In the order of the names: a reader may return the tensors in another than the writer had.
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)  # as bytes: numpy has no bfloat16
    return digest.hexdigest()


def _json(content: Mapping[str, Any]) -> str:
    try:
        return json.dumps(content)
    except (TypeError, ValueError) as error:
        raise InputError(f"extra cannot be kept: {error}; give numbers, strings, lists and dicts of them") from error


def _parsed(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Let safetensors read the file; it holds the header against the length."""
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # a damaged header fails in many ways
        raise ArtifactError(f"{path} is damaged, or no safetensors file ({error}); take it from a copy") from error


def _check_format(path: Path, metadata: Mapping[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        raise ArtifactError(f"{path} was not written by compressor: compressor.save(model, path) writes such files")
    version = metadata.get("version", "")
    if version != str(VERSION):
        raise ArtifactError(
            f"{path} has version {version!r} of the format, and this compressor reads {VERSION}: update compressor"
        )


_Size = Annotated[int, msgspec.Meta(ge=0, le=2**40)]
_Number = bool | int | float | None


@dataclass(frozen=True)
class _Content:
    """The metadata of a file as they must be."""

    spec: dict[str, str | int] | None
    cut: dict[str, list[_Size]]
    attributes: dict[str, dict[str, _Number | list[_Number]]]
    channels_last: list[str]
    extra: dict[str, Any]
    versions: dict[str, str]


def _description(path: Path, content: _Content, tensors: Mapping[str, Tensor]) -> Description:
    return Description(
        spec=content.spec,
        shapes={name: tuple(tensor.shape) for name, tensor in tensors.items()},
        cut={name: tuple(shape) for name, shape in content.cut.items()},
        attributes={
            # JSON has no tuples, and a convolution's padding must be one again.
            module: {name: tuple(value) if isinstance(value, list) else value for name, value in attributes.items()}
            for module, attributes in content.attributes.items()
        },
        channels_last=tuple(content.channels_last),
        extra=content.extra,
        versions=content.versions,
        size_bytes=path.stat().st_size,
    )

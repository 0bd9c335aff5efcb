"""Save a model and load it again, smaller than its factory makes it, without running what a file says.

A model file is one safetensors file: the tensors, and in its metadata, as JSON, what is needed to build the model that
they belong to. Loading builds the dense model, narrows it to the shapes in the file and copies the values. Nothing is
unpickled. A factory outside torchvision is only ever the caller's: a file cannot name code to run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressor._utils import written_beside
from compressor.errors import ArtifactError, InputError
from compressor.graph import all_numbers, is_number, numbers, restore_shapes
from compressor.training import ModelSpec

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


# -- saving


def save(
    model: nn.Module, path: str | Path, *, spec: ModelSpec | None = None, extra: Mapping[str, Any] | None = None
) -> None:
    """Write a model's weights and structure to one safetensors file, beside `path` and then renamed.

    Parameters, all buffers and plain numbers among the modules' attributes are kept; training mode, gradients and
    `requires_grad` are not.

    Args:
        model: the model, pruned or not; it is not changed.
        path: the file; `.safetensors` is the usual ending.
        spec: how to build the dense model; by default `model.compressor_spec`, which `compressor.models.build` leaves
            there. Without either, `load` needs a factory.
        extra: more to keep, as JSON values; `describe(path).extra` gives it back.

    Raises:
        InputError: the spec builds another model, `extra` is not JSON, or the path cannot be written. A file that is
            there already is left alone.
    """
    from safetensors.torch import save_file

    path = Path(path)
    spec = spec or getattr(model, "compressor_spec", None)
    live = _tensors(model)
    _refuse_extra_state(model)
    content = {
        "spec": dataclasses.asdict(spec) if spec else None,
        "cut": _cut(spec, live) if spec else {},
        "attributes": all_numbers(model),
        "channels_last": [name for name, tensor in live.items() if _is_channels_last(tensor)],
        "extra": dict(extra or {}),
        "versions": {name: importlib.metadata.version(name) for name in ("compressor", "torch", "torchvision")},
    }
    text = _json(content)
    stored = {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in live.items()}
    metadata = {"format": FORMAT, "version": str(VERSION), "content": text, "sha256": _checksum(text, stored)}
    with written_beside(path) as part:
        save_file(stored, part, metadata)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Give parameters and all buffers by name; tied ones once."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _refuse_extra_state(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise InputError(
                f"module {name!r} ({type(module).__name__}) has state that is no tensor (get_extra_state), and would "
                "be loaded without it; make it a buffer"
            )


def _cut(spec: ModelSpec, live: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Give the dense shapes of what is smaller now."""
    dense = {name: tuple(tensor.shape) for name, tensor in _tensors(spec.build(seed=0)).items()}
    if differing := sorted(dense.keys() ^ live.keys()):
        where = "the model" if differing[0] in live else f"what {spec} builds"
        raise InputError(
            f"this model is not {spec.factory!r} any more: {differing[0]!r} is only in {where}; "
            "give another spec, or `del model.compressor_spec` and load it with load(path, factory=...)"
        )
    return {name: shape for name, shape in dense.items() if shape != tuple(live[name].shape)}


def _is_channels_last(tensor: Tensor) -> bool:
    """Compare strides: of a 1x1 kernel torch says that it is laid out both ways, but it computes by the strides."""
    if tensor.dim() != 4:
        return False
    plain = torch.empty(tensor.shape, device="meta")
    last = torch.empty(tensor.shape, device="meta", memory_format=torch.channels_last)
    return tensor.stride() == last.stride() != plain.stride()


def _json(content: Mapping[str, Any]) -> str:
    try:
        return json.dumps(content)
    except (TypeError, ValueError) as error:
        raise InputError(f"extra cannot be kept: {error}; give numbers, strings, lists and dicts of them") from error


def _checksum(text: str, tensors: Mapping[str, Tensor]) -> str:
    """Give the SHA-256 of the metadata and of every tensor's name, type, shape and bytes."""
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


# -- loading


def load(path: str | Path, *, factory: Callable[[], nn.Module] | None = None, device: str = "cpu") -> nn.Module:
    """Build the model that a file holds, in evaluation mode; its outputs are bit for bit those of the saved one.

    Args:
        path: a file that `save` wrote.
        factory: gives the dense model; needed where the file does not name a torchvision model. It goes before what
            the file names.
        device: where the model is put.

    Raises:
        ArtifactError: the file is missing, damaged, of another project or of a newer compressor, belongs to another
            model than the factory gives, or needs a factory.
    """
    description, tensors = _read(Path(path))
    model = _dense(Path(path), description, factory)
    _fit(Path(path), model, description)
    for name, tensor in _tensors(model).items():
        last = name in description.channels_last and tensor.dim() == 4
        tensor.data = tensors[name].clone(memory_format=torch.channels_last if last else torch.contiguous_format)
    return model.to(device).eval()


def describe(path: str | Path) -> Description:
    """Give what a model file says about itself; the file is checked in full, and no model is built.

    Raises:
        ArtifactError: the file is missing, damaged, of another project or of a newer compressor.
    """
    return _read(Path(path))[0]


def _read(path: Path) -> tuple[Description, dict[str, Tensor]]:
    """Read a file and hold it against its checksum."""
    if not path.is_file():
        raise ArtifactError(
            f"{path} is {'a folder' if path.is_dir() else 'missing'}: give a file that compressor saved"
        )
    metadata, tensors = _parsed(path)
    _check_format(path, metadata)
    text = metadata.get("content", "")
    if _checksum(text, tensors) != metadata.get("sha256"):
        raise ArtifactError(f"{path} is damaged: its content does not match its checksum; take it from a copy")
    try:
        return _description(path, json.loads(text), tensors), tensors
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ArtifactError(f"{path} is no model file as compressor writes them: {error!r}; save it again") from error


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


def _description(path: Path, content: Any, tensors: Mapping[str, Tensor]) -> Description:
    return Description(
        spec=content["spec"],
        shapes={name: tuple(tensor.shape) for name, tensor in tensors.items()},
        cut={name: tuple(shape) for name, shape in content["cut"].items()},
        attributes={
            module: {name: tuple(value) if isinstance(value, list) else value for name, value in attributes.items()}
            for module, attributes in content["attributes"].items()
        },
        channels_last=tuple(content["channels_last"]),
        extra=content["extra"],
        versions=content["versions"],
        size_bytes=path.stat().st_size,
    )


def _dense(path: Path, description: Description, factory: Callable[[], nn.Module] | None) -> nn.Module:
    """Build the dense model, by the caller's factory or by torchvision's; the random state stays as it was."""
    if factory is not None:
        with torch.random.fork_rng(devices=[]):
            model = factory()
        if not isinstance(model, nn.Module):
            raise InputError(f"factory gave a {type(model).__name__}: give a callable that gives the dense model")
        return model
    if description.spec is None:
        raise ArtifactError(f"{path} does not say how to build its model: load(path, factory=...)")
    try:
        spec = ModelSpec(**description.spec)
        if not spec.names_code:
            return spec.build(seed=0)
    except (InputError, TypeError, RuntimeError) as error:  # RuntimeError: more classes than memory holds
        raise ArtifactError(f"{path} names no model that can be built: {error}; load(path, factory=...)") from error
    raise ArtifactError(f"{path} names {spec.factory!r}, and no file decides what is imported: load(path, factory=...)")


def _fit(path: Path, model: nn.Module, description: Description) -> None:
    """Narrow the dense model and set the attributes that shapes do not tell."""
    try:
        restore_shapes(model, description.shapes)
    except InputError as error:
        raise ArtifactError(f"{path} holds another model than {type(model).__name__}: {error}") from error
    modules = dict(model.named_modules())
    for name, attributes in description.attributes.items():
        known = numbers(modules[name]) if name in modules else {}
        for attribute, value in attributes.items():
            if attribute not in known or not is_number(value):
                where = f"{name}.{attribute}".strip(".")
                raise ArtifactError(f"{path} holds another model than {type(model).__name__}: {where} = {value!r}")
            setattr(modules[name], attribute, value)

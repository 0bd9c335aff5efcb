"""What an ONNX file of a classifier says about itself, as strings in its `metadata_props`.

    input          "images float32 (B, 3, 32, 32), (pixel - mean) / std"     or "images uint8 (B, 32, 32, 3)"
    output         "scores"                                                  or "probabilities"
    classes        ["cat", "dog"]
    image_shape    [3, 32, 32]        mean, std    [125.3, 123.0, 113.9], of pixel values from 0 to 255

Lists and numbers are JSON. Whoever has the file alone can feed it and read its answers; `compress predict` does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec

from compressor.errors import ArtifactError

_Side = Annotated[int, msgspec.Meta(ge=1, le=65_536)]
_KEYS = ("classes", "image_shape", "mean", "std")


@dataclass(frozen=True)
class ImageModel:
    """What a classifier of images takes and says.

    Attributes:
        image_shape: `(C, H, W)` of one image.
        classes: names, in the order of the scores; empty if they are not known.
        mean, std: per channel, of pixel values from 0 to 255: what images are normalised by.
        takes_pixels: whether the file takes uint8 `(B, H, W, C)` and gives probabilities; else it takes normalised
            float32 `(B, C, H, W)` and gives scores.
    """

    image_shape: tuple[_Side, _Side, _Side]
    classes: tuple[str, ...] = ()
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    takes_pixels: bool = False

    @property
    def input_names(self) -> list[str]:
        """The names of the file's inputs."""
        return ["images"]

    @property
    def output_names(self) -> list[str]:
        """The names of the file's outputs."""
        return ["probabilities" if self.takes_pixels else "scores"]

    def props(self, more: Mapping[str, Any] | None = None) -> dict[str, str]:
        """Return the strings for a file; `more` beside them, as JSON where it is no text."""
        channels, height, width = self.image_shape
        layout = f"uint8 (B, {height}, {width}, {channels})"
        if not self.takes_pixels:
            layout = f"float32 (B, {channels}, {height}, {width}), (pixel - mean) / std"
        said = {"input": f"images {layout}", "output": self.output_names[0]}
        known = {name: list(getattr(self, name)) for name in _KEYS}
        values = {**{name: value for name, value in known.items() if value}, **(more or {})}
        return said | {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}

    @staticmethod
    def from_props(props: Mapping[str, str], name: str) -> ImageModel:
        """Read what `props` wrote.

        Raises:
            ArtifactError: it is not there, or says something else.
        """
        missing = [key for key in ("image_shape", "output") if key not in props]
        if missing:
            raise ArtifactError(
                f"{name} does not say {missing[0]!r} among its metadata: give a file that compress exported"
            )
        try:
            values = {key: json.loads(props[key]) for key in _KEYS if key in props}
            found = msgspec.convert({**values, "takes_pixels": props["output"] == "probabilities"}, ImageModel)
        except (ValueError, msgspec.ValidationError) as error:
            raise ArtifactError(f"the metadata of {name} are damaged: {error}; export it again") from error
        channels = found.image_shape[0]
        if not found.takes_pixels and not len(found.mean) == len(found.std) == channels:
            raise ArtifactError(f"{name} does not say by what its {channels} channels are normalised: export it again")
        return found

"""Images of squares, circles and triangles on noise, drawn from a seed: data for detectors and segmentation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

CLASSES = ("square", "circle", "triangle")


@dataclass(frozen=True)
class Drawing:
    """One image with what stands in it.

    Attributes:
        image: `(size, size, 3)` uint8.
        mask: `(size, size)` uint8, 0 for the ground and 1 + class for a shape.
        boxes: `(class, x, y, width)` of each shape in pixels, all as high as wide; later ones hide earlier ones.
    """

    image: np.ndarray
    mask: np.ndarray
    boxes: tuple[tuple[int, int, int, int], ...]


def draw(size: int, rng: np.random.Generator) -> Drawing:
    image = Image.fromarray(rng.integers(60, 120, (size, size, 3), dtype=np.uint8))
    mask = Image.new("L", (size, size))
    boxes = []
    for _ in range(rng.integers(1, 4)):
        kind = int(rng.integers(len(CLASSES)))
        width = int(rng.integers(size // 6, size // 2))
        x, y = (int(each) for each in rng.integers(0, size - width, 2))
        colour = tuple(int(each) for each in rng.integers(120, 256, 3))
        for canvas, fill in ((image, colour), (mask, 1 + kind)):
            pen, corners = ImageDraw.Draw(canvas), (x, y, x + width, y + width)
            if kind == 0:
                pen.rectangle(corners, fill)
            elif kind == 1:
                pen.ellipse(corners, fill)
            else:
                pen.polygon([(x, y + width), (x + width, y + width), (x + width // 2, y)], fill)
        boxes.append((kind, x, y, width))
    return Drawing(np.asarray(image), np.asarray(mask), tuple(boxes))


def write_yolo_dataset(folder: Path, images: Mapping[str, int], size: int, seed: int = 0) -> Path:
    """Write images and labels as Ultralytics reads them, and return the path of its `data.yaml`."""
    rng = np.random.default_rng(seed)
    for split, count in images.items():
        for kind in ("images", "labels"):
            (folder / kind / split).mkdir(parents=True)
        for number in range(count):
            drawing = draw(size, rng)
            lines = [
                f"{kind} {(x + width / 2) / size} {(y + width / 2) / size} {width / size} {width / size}"
                for kind, x, y, width in drawing.boxes
            ]
            Image.fromarray(drawing.image).save(folder / "images" / split / f"{number}.png")
            (folder / "labels" / split / f"{number}.txt").write_text("\n".join(lines))
    names = "".join(f"\n  {number}: {name}" for number, name in enumerate(CLASSES))
    data = folder / "data.yaml"
    data.write_text(f"path: {folder.resolve()}\ntrain: images/train\nval: images/val\nnames:{names}\n")
    return data

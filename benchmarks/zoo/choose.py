"""Choose the timm models of the zoo: `python benchmarks/zoo/choose.py > benchmarks/zoo/timm_names.txt`, two minutes.

Every module of `timm.models` is a family. The smallest model of each comes first; then, from the families with the
most models, the one that has a third of the family below it, until there are 150. Left out: more than 120 million
parameters, a fixed image of more than 384 pixels, and timm's own miniatures for testing.
"""

from __future__ import annotations

from collections import defaultdict

import timm
import torch
from timm.models import _registry

COUNT = 150
MOST_PARAMS = 120_000_000
MOST_PIXELS = 384


def main() -> None:
    """Print the list."""
    sizes: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for name in timm.list_models():
        params = _params(name)
        if params is not None:
            sizes[_registry._model_to_module[name]].append((params, name))
    families = {module: [name for _, name in sorted(members)] for module, members in sizes.items()}
    chosen = {names[0] for names in families.values()}
    for module in sorted(families, key=lambda module: (-len(families[module]), module)):
        if len(chosen) < COUNT:
            chosen.add(families[module][max(1, len(families[module]) // 3)])
    print(f"# timm {timm.__version__}, {len(families)} families; chosen by choose.py")
    print("\n".join(sorted(chosen)))


def _params(name: str) -> int | None:
    """Return the number of parameters, None for a model that is left out."""
    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False)
    params = sum(parameter.numel() for parameter in model.parameters())
    settings = model.default_cfg
    fixed = settings.get("fixed_input_size") and settings["input_size"][-1] > MOST_PIXELS
    return None if fixed or params > MOST_PARAMS or name.startswith("test_") else params


if __name__ == "__main__":
    main()

"""Where graph, criterion, budget and surgery meet: `prune` at once, `Pruner` while training."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

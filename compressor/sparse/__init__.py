"""Sparse training: magnitude pruning, SET and RigL, with masks on weights or on whole channels."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

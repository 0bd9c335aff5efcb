"""Criteria: plain functions that score the channels of a group; larger means keep."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

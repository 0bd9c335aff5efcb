"""The cut: channels removed for good, all or nothing, what they carried compensated, and the result verified."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

"""What every room needs and no user calls: files written all or nothing, a model run and left as it was."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

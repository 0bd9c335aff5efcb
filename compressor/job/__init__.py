"""The main job: settings, stages and the run folder; `compress` on the command line calls `run`."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

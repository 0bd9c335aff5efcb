"""What a run has to say, in three forms: `report.json` (complete), `report.html` (one page), Markdown."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

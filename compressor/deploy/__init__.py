"""What leaves the workshop: model files without pickle, ONNX files proven equal, latency, and MACs as fvcore counts."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

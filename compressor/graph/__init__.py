"""The channel graph: which channels of a network go together, derived from the operations that really ran.

    graph = trace(model, example_inputs)    # graph.groups, graph.frozen

Read `group.py` first (the nouns), then one rule in `rules/shape.py`, then `recorder.py`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

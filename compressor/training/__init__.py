"""Training with checkpoints and resume, data sets and models by name. It knows nothing of pruning: it calls a hook.

    history = train(model, data, TrainingConfig(epochs=24, batch_size=64, lr=0.05))

A run with a checkpoint folder can be killed at any moment; resumed on a CPU, it gives the same metrics bit for bit.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

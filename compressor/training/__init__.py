"""Training with checkpoints and resume. It knows nothing of pruning: it calls a hook.

    history = train(model, data, TrainingConfig(epochs=24, batch_size=64, lr=0.05))

A run with a checkpoint folder can be killed at any moment; resumed on a CPU, it gives the same metrics bit for bit.
"""

from compressor.training.config import TrainingConfig, learning_rate
from compressor.training.evaluation import Evaluation, evaluate, recalibrate
from compressor.training.hooks import HookFactory, PlainStep, StepHook
from compressor.training.loop import History, require_scores, train

__all__ = [
    "Evaluation",
    "History",
    "HookFactory",
    "PlainStep",
    "StepHook",
    "TrainingConfig",
    "evaluate",
    "learning_rate",
    "recalibrate",
    "require_scores",
    "train",
]

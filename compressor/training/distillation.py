"""Distillation: a network learns from the scores of another one, its teacher, besides the right classes.

    loss = distilled(F.cross_entropy, teacher, images)(model(images), targets)

A worked example: of two classes the teacher's scores are 4 and 0, those of the student 0 and 0, the first is right.
At temperature 4 the scores are 1 and 0: the teacher says 0.73 and 0.27, the student 0.5 and 0.5. The divergence of one
from the other is 0.11, which counts 16 times, for the temperature squared; at weight 0.5 the loss is
0.5 * 0.69 + 0.5 * 16 * 0.11 = 1.24.

Source: Hinton, Vinyals & Dean, arXiv 1503.02531. The square of the temperature keeps the size of the gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressor.errors import InputError, RangeError
from compressor.training.config import TrainingConfig
from compressor.training.evaluation import in_mode
from compressor.training.hooks import LossFunction


def distilled(
    loss_fn: LossFunction,
    teacher: Callable[[Any], Tensor],
    inputs: Any,
    *,
    weight: float = 0.5,
    temperature: float = TrainingConfig.temperature,
) -> LossFunction:
    """Return a loss function for one batch, of which the teacher's answers are a part.

    Args:
        loss_fn: like `torch.nn.functional.cross_entropy`: takes outputs, targets and `reduction=`.
        teacher: gives scores `(B, classes)` for the inputs; a module is run in evaluation mode. Without gradients.
        inputs: the batch, as the model gets it.
        weight: the teacher's share of the loss, in [0, 1].
        temperature: by which scores of both are divided, above 0.

    Returns:
        A function like `loss_fn`, for outputs of these inputs: `(1 - weight) * loss_fn + weight * temperature ** 2 *
        KL(teacher || model)`. It takes `reduction="mean"`, "sum" or "none", and has to be made anew for every batch.

    Raises:
        RangeError: a weight or temperature outside its range.
        InputError: the model's outputs have another shape than the teacher's.
    """
    if not 0 <= weight <= 1:
        raise RangeError("weight", weight, "[0, 1]")
    if not 0 < temperature < float("inf"):
        raise RangeError("temperature", temperature, "(0, inf)")
    wanted = F.softmax(_at_least_float32(_answers(teacher, inputs)) / temperature, dim=1)

    def loss(outputs: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        if outputs.shape != wanted.shape:
            raise InputError(
                f"the model gives {tuple(outputs.shape)} and the teacher {tuple(wanted.shape)}: both need one score a "
                "class for the same batch; make the loss function anew for every batch"
            )
        divergence = F.kl_div(
            F.log_softmax(_at_least_float32(outputs) / temperature, dim=1), wanted, reduction="none"
        ).sum(1)
        soft = temperature**2 * divergence
        if reduction != "none":
            soft = soft.mean() if reduction == "mean" else soft.sum()
        return (1 - weight) * loss_fn(outputs, targets, reduction=reduction) + weight * soft

    return loss


def _at_least_float32(scores: Tensor) -> Tensor:
    return scores.to(torch.promote_types(scores.dtype, torch.float32))  # under autocast they come in half precision


def _answers(teacher: Callable[[Any], Tensor], inputs: Any) -> Tensor:
    with torch.no_grad():
        if not isinstance(teacher, nn.Module):
            return teacher(inputs)
        with in_mode(teacher, training=False):
            answers: Tensor = teacher(inputs)
            return answers

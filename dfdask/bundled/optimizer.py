"""Muon for a model's matrices: momentum whose singular values are all made about one before each step."""

from __future__ import annotations

import torch
from torch import Tensor


def orthogonalise(stack: Tensor) -> Tensor:
    """Five Newton-Schulz steps on (n, rows, columns) matrices, in bfloat16 on a GPU: precision does not matter."""
    matrices = stack.bfloat16() if stack.is_cuda else stack  # on most processors bfloat16 is far slower
    tall = matrices.shape[1] > matrices.shape[2]
    matrices = matrices.mT if tall else matrices
    matrices = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = matrices @ matrices.mT
        matrices = 3.4445 * matrices + (-4.7750 * gram + 2.0315 * gram @ gram) @ matrices
    result: Tensor = matrices.mT if tall else matrices
    return result.to(stack.dtype)


class Muon:
    """Steps matrices of one shape together, so that a small model costs few kernel launches.

    The step is scaled as Adam's would be: one learning rate serves both.
    """

    def __init__(self, matrices: list[Tensor], momentum: float = 0.95, weight_decay: float = 0.02) -> None:
        groups: dict[torch.Size, list[Tensor]] = {}
        for matrix in matrices:
            groups.setdefault(matrix.shape, []).append(matrix)
        self._groups = [(group, torch.zeros_like(torch.stack(group))) for group in groups.values()]
        self._momentum, self._weight_decay = momentum, weight_decay

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """One step from the gradients in place; matrices all need one."""
        for matrices, average in self._groups:
            gradient = torch.stack([_gradient(matrix) for matrix in matrices])
            average.lerp_(gradient, 1 - self._momentum)
            update = orthogonalise(gradient.lerp(average, self._momentum))
            scale = 0.2 * max(update.shape[1:]) ** 0.5
            torch._foreach_mul_(matrices, 1 - learning_rate * self._weight_decay)
            torch._foreach_add_(matrices, list(update.unbind()), alpha=-learning_rate * scale)


def _gradient(matrix: Tensor) -> Tensor:
    if matrix.grad is None:
        raise ValueError(f"a matrix of shape {tuple(matrix.shape)} has no gradient")
    return matrix.grad

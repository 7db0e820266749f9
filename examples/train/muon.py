"""Muon: momentum, then the nearest semi-orthogonal matrix by Newton-Schulz steps (Jordan et al., 2024).

It uses the precision of `precision.py`, and works matrix by matrix, which is faster on a CPU than stacks of them.
"""

import torch

from examples.train.precision import PRODUCTS


class Muon(torch.optim.Optimizer):
    """An optimizer for matrices `[out, in]` of hidden layers; AdamW takes the other parameters."""

    def __init__(self, matrices, lr: float = 0.02, momentum: float = 0.95, weight_decay: float = 0.01, steps: int = 4):
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "steps": steps})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                state = self.state[matrix]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(matrix)
                state["momentum"].lerp_(matrix.grad, 1 - group["momentum"])
                update = orthogonal(matrix.grad.lerp(state["momentum"], group["momentum"]), group["steps"])
                scale = group["lr"] * max(1, matrix.shape[0] / matrix.shape[1]) ** 0.5
                matrix.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-scale)


def orthogonal(x: torch.Tensor, steps: int) -> torch.Tensor:
    """Return a matrix `[out, in]` with its singular values pulled to about 1."""
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    dtype, x = x.dtype, (x / (x.norm() + 1e-7)).to(PRODUCTS).contiguous()
    for _ in range(steps):
        square = x @ x.T
        x = torch.addmm(x, torch.addmm(square, square, square, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return (x.T if tall else x).to(dtype)


def optimizers(named_parameters, lr: float, hidden=lambda name: "layers." in name or "mel_attn" in name) -> list:
    """Muon for the matrices of hidden layers, AdamW at 0.15 of its rate for everything else."""
    matrices, others = [], []
    for name, parameter in named_parameters:
        (matrices if parameter.dim() == 2 and hidden(name) else others).append(parameter)
    return [Muon(matrices, lr=lr), torch.optim.AdamW(others, lr=0.15 * lr, betas=(0.9, 0.98), weight_decay=0.01)]

"""Muon: momentum, then the nearest semi-orthogonal matrix by Newton-Schulz steps (Jordan et al., 2024).

In float32, as a CPU without bfloat16 is slow in it, and with matrices of one shape stacked into one product.
"""

import torch


class Muon(torch.optim.Optimizer):
    """For matrices `[out, in]` of hidden layers; other parameters belong to AdamW."""

    def __init__(self, matrices, lr: float = 0.02, momentum: float = 0.95, weight_decay: float = 0.01, steps: int = 4):
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "steps": steps})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            by_shape: dict[torch.Size, list] = {}
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                state = self.state[matrix]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(matrix)
                state["momentum"].lerp_(matrix.grad, 1 - group["momentum"])
                update = matrix.grad.lerp(state["momentum"], group["momentum"])
                by_shape.setdefault(matrix.shape, []).append((matrix, update))
            for shape, pairs in by_shape.items():
                updates = orthogonal(torch.stack([update for _, update in pairs]), group["steps"])
                scale = group["lr"] * max(1, shape[0] / shape[1]) ** 0.5
                for (matrix, _), update in zip(pairs, updates, strict=True):
                    matrix.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-scale)


def orthogonal(x: torch.Tensor, steps: int) -> torch.Tensor:
    """Matrices `[count, out, in]` with their singular values pulled to about 1."""
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.mT if tall else x


def optimizers(named_parameters, lr: float, hidden=lambda name: "layers." in name or "mel_attn" in name) -> list:
    """Muon for the matrices of hidden layers, AdamW at 0.15 of its rate for everything else."""
    matrices, others = [], []
    for name, parameter in named_parameters:
        (matrices if parameter.dim() == 2 and hidden(name) else others).append(parameter)
    return [Muon(matrices, lr=lr), torch.optim.AdamW(others, lr=0.15 * lr, betas=(0.9, 0.98), weight_decay=0.01)]

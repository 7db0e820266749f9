"""Float32 products of a GPU's matrix unit in TF32, computed on a CPU: sums that are cut off, not rounded.

NVIDIA does not document it. Fasi, Higham, Mikaitis and Pranesh, "Numerical behavior of NVIDIA tensor cores", PeerJ
Computer Science 7:e330 (2021), found by experiment: products are exact; an A100 aligns four TF32 products and the sum
so far to the largest of them, with one digit more than float32 has; what falls out at the end is cut off, and so are
the digits that the new sum has too many. Newer units take other numbers of products and digits: Khattak and Mikaitis,
"Accurate Models of NVIDIA Tensor Cores", arXiv:2512.07004 (2025).
"""

import numpy as np


def _cut(x: np.ndarray, unit: np.ndarray) -> np.ndarray:
    return np.trunc(x / unit) * unit


def _tf32(x: np.ndarray, rounded: bool) -> np.ndarray:
    """Return the 11 digits of float32 `x` that TF32 holds, the rest cut off unless it is `rounded`."""
    bits = np.ascontiguousarray(x).view(np.int32)
    return ((bits + 0x1000 * rounded) & -0x2000).view(np.float32)


def _multiply(a: np.ndarray, b: np.ndarray, total: np.ndarray, products: int, digits: int) -> np.ndarray:
    """Add `a` times `b` to `total`, one group of `products` after another, as the unit sums them."""
    a, b, total = (x.astype(np.float64)[..., None, :] for x in (a.swapaxes(-1, -2), b, total))
    for first in range(0, a.shape[-3], products):
        group = slice(first, first + products)
        # [..., m, 1 + products, n]
        terms = (a[..., group, :, :].swapaxes(-1, -2) * b[..., group, :, :]).swapaxes(-2, -3)
        terms = np.concatenate((total, terms), axis=-2)
        exponent = np.frexp(np.abs(terms).max(-2, keepdims=True))[1]
        total = _cut(terms, np.ldexp(1.0, exponent - 24 - digits)).sum(-2, keepdims=True)
        total = _cut(total, np.ldexp(1.0, np.frexp(total)[1] - 24))
    return total[..., 0, :].astype(np.float32)


def dot(
    a: np.ndarray, b: np.ndarray, total: np.ndarray, precision: str, *, products: int = 4, digits: int = 1
) -> np.ndarray:
    """Return the result of Triton's `dot(a, b, total, input_precision=precision)` on a GPU, for finite float32 arrays.

    Args:
        a, b, total: `[..., m, k]`, `[..., k, n]`, `[..., m, n]`.
        precision: "TF32": one product, added to `total` in the unit. "TF32x3": of what TF32 holds of a number and of
            the rest, three products, whose sum begins at zero and is added to `total` outside of the unit.
        products, digits: what the unit adds at once, and its digits beyond those of float32; by default an A100's.
    """
    if precision == "TF32":
        return _multiply(_tf32(a, False), _tf32(b, False), total, products, digits)
    high = [_tf32(x, True) for x in (a, b)]
    low = [_tf32(x - near, True) for x, near in zip((a, b), high, strict=True)]
    mixed = _multiply(low[0], high[1], np.zeros_like(total), products, digits)
    mixed = _multiply(high[0], low[1], mixed, products, digits)
    return _multiply(*high, mixed, products, digits) + total

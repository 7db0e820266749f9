"""Triton's interpreter, repaired for tests: what NumPy 2.4 broke, sums of a product that are rounded once, and
products of the same bits on every machine.
"""

import numpy as np


def repair() -> None:
    """Repair the interpreter, before a kernel is defined; does nothing where Triton is not installed."""
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    patch = interpreter._patch_lang_tensor
    create_dot = interpreter.InterpreterBuilder.create_dot

    def patched(tensor, scope):
        patch(tensor, scope)
        # NumPy 2.4 makes no index of an array of one element, which is what triton 3.6 interprets a loop's bound as.
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def dot(self, a, b, d, precision, *others):
        if a.data.dtype != np.float32 and a.data.dtype != np.float16:
            return create_dot(self, a, b, d, precision, *others)
        return interpreter.TensorHandle(summed(a.data, b.data, d.data, precision.name), d.dtype.scalar)

    def fma(self, x, y, z):
        # Triton's own rounds the product too, which a GPU does not. In float64 a product of two float32 is exact.
        with np.errstate(invalid="ignore"):
            wide = x.data.astype(np.float64) * y.data + z.data
        return interpreter.TensorHandle(wide.astype(z.data.dtype), z.dtype.scalar)

    interpreter._patch_lang_tensor = patched
    interpreter.InterpreterBuilder.create_fma = fma
    interpreter.InterpreterBuilder.create_dot = dot


def summed(a: np.ndarray, b: np.ndarray, total: np.ndarray, precision: str) -> np.ndarray:
    """Add the product of `a` and `b` to `total`, for every `precision` that a kernel asks a matrix unit for."""
    return product(a, b, total.dtype) + total


def product(a: np.ndarray, b: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Multiply `a` `[..., m, k]` by `b` `[..., k, n]`, each element summed from k = 0 on, with one rounding a step.

    A kernel promises a row's bits whatever rows lie beside it. NumPy's product is its BLAS's: which way that sums
    depends on the sizes of a tile and on the CPU, and the promise could not be seen to hold.
    """
    terms = a.astype(dtype, copy=False)[..., None] * b.astype(dtype, copy=False)[..., None, :, :]
    return np.add.reduce(terms, axis=-2)

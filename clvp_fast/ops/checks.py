"""Checks of the operators' arguments: dtypes that kernels take, layouts, and errors in a sentence."""

import torch


def unserved_by_triton(name: str, dtype: torch.dtype) -> str | None:
    """Return why a Triton kernel does not take the tensor `name` of `dtype`, or `None`."""
    if dtype in (torch.float32, torch.float16, torch.bfloat16):
        return None
    return f"{name} must be float32, float16 or bfloat16, not {dtype}"


def unserved_natively(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why a kernel of the native library does not take `dtype` on `device`, a CPU, or `None`."""
    return None if dtype in (torch.float32, torch.bfloat16) else f"on a CPU it serves float32 and bfloat16, not {dtype}"


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """Reshape `[..., width]` to `[rows, width]` with unit stride in the last axis, without a copy if possible."""
    x = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def shape_error(name: str, expected: str, tensor: torch.Tensor) -> ValueError:
    """Make the error for a tensor argument of the wrong shape."""
    return ValueError(f"{name} must have shape {expected}, not {list(tensor.shape)}")


def check_same(name: str, tensor: torch.Tensor, like_name: str, like: torch.Tensor, dtype: bool = True) -> None:
    """Raise unless `tensor` lies on the device of `like` and, if asked, has its dtype."""
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device} and {like_name} on {like.device}: move them to one device")
    if dtype and tensor.dtype != like.dtype:
        raise TypeError(f"{name} must have the dtype of {like_name}, {like.dtype}, not {tensor.dtype}")


def check_residual(residual: torch.Tensor, x: torch.Tensor) -> None:
    """Raise unless `residual` is on the device of `x` and has its dtype or, with a half type, float32."""
    if residual.dtype == torch.float32 and x.dtype in (torch.float16, torch.bfloat16):
        check_same("residual", residual, "x", x, dtype=False)
    else:
        check_same("residual", residual, "x", x)


def check_floating(name: str, dtype: torch.dtype | None) -> None:
    """Raise unless `dtype` is None or a type of real numbers."""
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"{name} must be a floating point type, not {dtype}")

"""Tolerance as a budget: so many times the error of a plain implementation in the same dtype, plus rounding."""

import torch

# The number of times that a result may have the error of plain torch in its dtype.
TIMES = 2
# The same where a GPU's matrix unit makes float32 products of TF32: it cuts its sums off (tests/kit/matrix_unit.py has
# the sources). Emulated over the tests of the kernels, an A100's unit has up to 3.4 times the error of float32's own
# sums, at narrow widths, where those have few roundings; with two more digits instead of one, 5.1 times.
MATRIX_UNIT_TIMES = 6
# There is nothing more exact to judge float64 by: other orders of summation are allowed a few more last bits.
_FLOAT64_ROUNDINGS = 256


def _rms(x: torch.Tensor) -> float:
    return x.square().mean().sqrt().item()


def assert_within_budget(
    actual: torch.Tensor,
    reference: torch.Tensor,
    baseline: torch.Tensor | None = None,
    name: str = "result",
    times: float = TIMES,
) -> None:
    """Assert that `actual` is as good as its dtype allows, by maximum and by RMS.

    The error against `reference` (float64, made from the same inputs) may be `times` that of `baseline`, a plain torch
    implementation in the dtype of `actual`, plus the rounding of the reference to that dtype. A reference so small
    that a wrong result would fit the budget, and two names of one storage, are refused.
    """
    assert reference.dtype == torch.float64, f"{name}: the reference must be float64, not {reference.dtype}"
    assert actual.shape == reference.shape, f"{name}: shape {list(actual.shape)}, not {list(reference.shape)}"
    others = {"the reference": reference} | ({} if baseline is None else {"the baseline": baseline})
    for other, tensor in others.items():
        same = actual.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
        assert not same or actual.numel() == 0, f"{name}: it and {other} are one storage, nothing is compared"
        assert torch.isfinite(tensor).all(), f"{name}: {other} itself is not finite"
    if baseline is not None:
        assert actual.dtype == baseline.dtype, f"{name}: dtype {actual.dtype}, not {baseline.dtype}"
    wild = ~torch.isfinite(actual)
    assert not wild.any(), f"{name}: {int(wild.sum())} values are not finite, the first at {wild.nonzero()[0].tolist()}"

    error = (actual.double() - reference).abs()
    noise = torch.finfo(actual.dtype).eps * (_FLOAT64_ROUNDINGS if actual.dtype == torch.float64 else 1)
    allowed_max, allowed_rms = noise * reference.abs().max().item(), noise * _rms(reference)
    if baseline is not None:
        baseline_error = (baseline.double() - reference).abs()
        allowed_max += times * baseline_error.max().item()
        allowed_rms += times * _rms(baseline_error)
    assert _rms(reference) >= 20 * allowed_rms, (
        f"{name}: the reference's RMS {_rms(reference):.3g} is below 20 times the tolerance {allowed_rms:.3g}: "
        "a wrong result could pass"
    )
    worst = torch.unravel_index(error.argmax(), error.shape)
    place = [int(i) for i in worst]
    assert error.max().item() <= allowed_max, (
        f"{name}: error {error.max().item():.3g} at {place} (got {actual[worst].item():.6g}, "
        f"expected {reference[worst].item():.6g}), allowed {allowed_max:.3g}"
    )
    assert _rms(error) <= allowed_rms, (
        f"{name}: RMS error {_rms(error):.3g}, allowed {allowed_rms:.3g}; the worst is at {place}"
    )

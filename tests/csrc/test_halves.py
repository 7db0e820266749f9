"""float16 by integer arithmetic, which needs no compiler that knows the type, against NumPy's."""

import ctypes

import numpy as np
import pytest

from tests.csrc.compiled import HERE, compile_cpp

HALVES = np.arange(1 << 16, dtype=np.uint16)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    target = tmp_path_factory.mktemp("halves") / "halves.so"
    return ctypes.CDLL(str(compile_cpp(target, HERE / "halves.cpp", flags=["-O1", "-fPIC", "-shared"])))


def converted(function, given, dtype):
    out = np.empty(given.size, dtype)
    function(given.ctypes.data_as(ctypes.c_void_p), out.ctypes.data_as(ctypes.c_void_p), ctypes.c_int64(given.size))
    return out


def test_every_half_is_the_number_that_it_stands_for(library):
    found, expected = converted(library.of_float16s, HALVES, np.float32), HALVES.view(np.float16).astype(np.float32)
    assert np.array_equal(np.isnan(found), np.isnan(expected)) and np.isnan(expected).sum() == 2046
    assert np.array_equal(found.view(np.uint32)[~np.isnan(found)], expected.view(np.uint32)[~np.isnan(expected)])


def test_numbers_are_rounded_to_the_nearest_half_and_ties_to_even(library):
    """Try every half, every number in the middle between two, and the float32 numbers around each."""
    halves = HALVES[:0x7C00].view(np.float16).astype(np.float64)
    places = np.concatenate((halves, (halves[1:] + halves[:-1]) / 2, [65520.0, 2.0**-25, 3e38])).astype(np.float32)
    around = np.concatenate([np.nextafter(places, np.float32(end)) for end in (-np.inf, np.inf)])
    rest = np.random.default_rng(0).integers(0, 1 << 32, 1 << 20, dtype=np.uint32).view(np.float32)
    given = np.concatenate((places, -places, around, -around, rest, np.float32([np.inf, -np.inf, np.nan])))
    with np.errstate(over="ignore", invalid="ignore"):
        expected = given.astype(np.float16)
    found = converted(library.float16s_of, given, np.uint16).view(np.float16)
    assert np.array_equal(np.isnan(found), np.isnan(given))
    numbers = ~np.isnan(given)
    assert np.array_equal(found.view(np.uint16)[numbers], expected.view(np.uint16)[numbers])

"""The library's reactions to answers of the CUDA driver and runtime, which a stand-in gives: csrc/cuda/device.cuh."""

import ctypes
import re
import shutil
import subprocess
from contextlib import nullcontext

import pytest
import torch

from clvp_fast import native
from clvp_fast.native import build
from tests.csrc.compiled import CSRC, HERE, compile_cpp

INSUFFICIENT_DRIVER, NO_DEVICE, UNKNOWN = 35, 100, 999
FIELDS = "driver runtime count shared_bytes count_error device_error attribute_error launch_error"
FIELDS += " noted launches most_bytes cooperative"


class Answers(ctypes.Structure):
    """`struct Answers` of device.cpp, which explains the fields."""

    _fields_ = tuple((name, ctypes.c_int) for name in FIELDS.split())


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    target = tmp_path_factory.mktemp("device") / "device.so"
    flags = ["-O1", "-fPIC", "-shared", f"-I{HERE / 'stand_in'}"]
    library = ctypes.CDLL(str(compile_cpp(target, HERE / "device.cpp", flags=flags)))
    library.error_of.restype = ctypes.c_char_p
    return library


@pytest.fixture
def answers(library):
    """Give the answers of a machine that can serve."""
    answers = Answers.in_dll(library, "answers")
    for name in FIELDS.split():
        setattr(answers, name, 0)
    answers.driver = answers.runtime = 13000
    answers.count, answers.shared_bytes = 1, 99 << 10
    return answers


def sentence(function, *args):
    """Return the sentence on the lack, or None."""
    told = ctypes.create_string_buffer(256)
    return told.value.decode() if function(*args, told, len(told)) else None


@pytest.mark.parametrize(
    "found, says",
    [
        ({}, None),
        ({"driver": 0, "count_error": INSUFFICIENT_DRIVER}, "there is no NVIDIA driver"),
        ({"driver": 12040, "count_error": INSUFFICIENT_DRIVER}, "serves CUDA 12.4, .* built with CUDA 13.0: update"),
        ({"count": 0, "count_error": NO_DEVICE}, "sees no CUDA device"),
        ({"count": 0}, "sees no CUDA device"),
        ({"count_error": UNKNOWN}, "CUDA error 999, cudaErrorUnknown: as the stand-in says"),
    ],
)
def test_a_missing_device_is_explained_in_one_sentence(library, answers, found, says):
    for name, value in found.items():
        setattr(answers, name, value)
    told = sentence(library.missing)
    assert told is None if says is None else re.search(says, told)
    assert answers.noted == 0


def test_a_sentence_keeps_to_its_room(library, answers):
    answers.count = 0
    told = ctypes.create_string_buffer(b"x" * 16, 16)
    assert library.missing(told, 8) == 1 and told.raw == b"the NVI\0xxxxxxxx"
    assert library.missing(None, 0) == 1


def test_shared_memory_that_a_device_lacks(library, answers):
    assert sentence(library.memory_missing, 99 << 10) is None
    told = sentence(library.memory_missing, 159 << 10)
    assert told == "it needs 159 KB of shared memory, and a block on this device has 99 at most"
    answers.device_error = UNKNOWN
    assert sentence(library.memory_missing, 1) == "CUDA error 999, cudaErrorUnknown: as the stand-in says"
    assert answers.noted == 0


@pytest.mark.parametrize("cooperative", [0, 1])
@pytest.mark.parametrize("fails", ["attribute_error", "launch_error"])
def test_a_failed_launch_does_not_poison_the_next(library, answers, fails, cooperative):
    setattr(answers, fails, UNKNOWN)
    assert library.start(1000, 2000, cooperative) == UNKNOWN
    assert answers.noted == 0 and answers.launches == 0
    setattr(answers, fails, 0)
    assert library.start(1000, 2000, cooperative) == 0
    assert answers.launches == 1 and answers.cooperative == cooperative and answers.most_bytes == 2000


def test_another_s_error_is_neither_ours_nor_taken_away(library, answers):
    answers.noted = UNKNOWN
    assert library.start(1000, 2000, 0) == 0 and answers.noted == UNKNOWN


def test_errors_have_name_and_number(library):
    assert library.error_of(UNKNOWN) == b"CUDA error 999, cudaErrorUnknown: as the stand-in says"


def test_log_mel_says_why_a_device_is_too_small(library, answers, monkeypatch):
    from clvp_fast.ops.log_mel import _short_of_memory

    class Library:
        @staticmethod
        def clvp_fast_log_mel_cuda_missing(n_fft, *told):
            return library.memory_missing(159 << 10 if n_fft == 4096 else 80 << 10, *told)

    monkeypatch.setattr(native, "library", lambda part: Library)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    _short_of_memory.cache_clear()
    device = torch.device("cuda", 0)
    assert _short_of_memory(2048, device) is None
    assert _short_of_memory(4096, device).startswith("n_fft 4096 is too long for this device: it needs 159 KB")
    _short_of_memory.cache_clear()


NVCC = build._find_nvcc()["nvcc"]


@pytest.mark.skipif(NVCC is None, reason="there is no nvcc")
@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="this machine may have a driver")
def test_the_true_runtime_finds_no_driver(tmp_path):
    source = tmp_path / "asks.cu"
    source.write_text(
        f'#include "{CSRC}/cuda/device.cuh"\n'
        'extern "C" int missing(char *sentence, int size) { return clvp_fast::cuda_missing(sentence, size); }\n'
        'extern "C" const char *error_of(int code) { return clvp_fast::cuda_error(code); }\n'
    )
    command = [NVCC, "-std=c++17", "-cudart=static", "-shared", "-Xcompiler=-fPIC", str(source), "-o"]
    subprocess.run([*command, str(tmp_path / "asks.so")], check=True, capture_output=True)
    library = ctypes.CDLL(str(tmp_path / "asks.so"))
    library.error_of.restype = ctypes.c_char_p
    assert sentence(library.missing) == "there is no NVIDIA driver"
    assert library.error_of(35).startswith(b"CUDA error 35, cudaErrorInsufficientDriver: ")

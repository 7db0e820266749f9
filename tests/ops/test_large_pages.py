"""Large pages: the system is asked for them where a CPU reads gigabytes at every step, and is not needed."""

import mmap
import re
from pathlib import Path

import pytest
import torch

from clvp_fast.engine.decoder import KVPages
from clvp_fast.ops import large_pages, panels

MAPS = Path("/proc/self/smaps")
on_linux = pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="the system has no large pages on request"
)


def is_asked_for(tensor):
    """Tell whether the system was asked for large pages in the middle of a tensor's memory."""
    middle = tensor.data_ptr() + tensor.nbytes // 2
    for area in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", MAPS.read_text()):
        first, end = (int(place, 16) for place in area.split(" ", 1)[0].split("-"))
        if first <= middle < end:
            return "hg" in re.search(r"VmFlags:(.*)", area)[1].split()
    raise AssertionError("the tensor's memory is nowhere")


@on_linux
def test_panels_and_pages_lie_in_large_pages():
    pages = KVPages(2, 64, 16, 16, 64, dtype=torch.float32, device="cpu")
    packed = panels.pack(torch.ones(1024, 1024))
    plain = torch.empty(64 << 20, dtype=torch.uint8)
    assert is_asked_for(pages.data) and is_asked_for(packed) and not is_asked_for(plain)


def test_a_room_keeps_tensors_apart_and_in_line():
    shapes = [((3, 5), torch.float32), ((7,), torch.int8), ((2, 2, 3), torch.bfloat16)]
    room = large_pages.Room(sum(large_pages.Room.bytes_of(*shape, dtype=dtype) for shape, dtype in shapes), "cpu")
    made = [room.empty(*shape, dtype=dtype).fill_(number) for number, (shape, dtype) in enumerate(shapes, 1)]
    for number, (shape, dtype), tensor in zip((1, 2, 3), shapes, made, strict=True):
        assert tensor.shape == shape and tensor.dtype == dtype and tensor.is_contiguous() and (tensor == number).all()
    assert all((tensor.data_ptr() - made[0].data_ptr()) % 64 == 0 for tensor in made)
    with pytest.raises(RuntimeError):
        room.empty(1, dtype=torch.int8)


@on_linux
def test_small_tensors_leave_the_heap_as_it_is(monkeypatch):
    monkeypatch.setattr(large_pages, "_advise", lambda: pytest.fail("the system was asked"))
    assert large_pages.empty(3, 5, dtype=torch.float32, device="cpu").shape == (3, 5)


def test_a_system_without_large_pages_serves(monkeypatch):
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    monkeypatch.setattr(large_pages, "_advise", large_pages._advise.__wrapped__)
    tensor = large_pages.empty(1 << 20, 3, dtype=torch.float32, device="cpu")
    assert tensor.shape == (1 << 20, 3) and tensor.is_contiguous() and tensor.dtype == torch.float32
    assert tensor.fill_(2).sum() == 6 << 20

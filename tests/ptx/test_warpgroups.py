"""Products of a warpgroup: the layout of operands, and detection of missing waits and fences."""

import numpy as np
import pytest

from tests.ptx.assembled import run
from tests.ptx.regions import Fault
from tests.ptx.test_warps import fragments, half, names

RNG = np.random.default_rng(3)
#: A descriptor's code of the layout, and the bytes of a row of eight.
ROWS = {0: 16, 3: 32, 2: 64, 1: 128}
A_AT, SIZE = 65536, 98304


def place(row, depth, width, code, across, leading, stride):
    """Return the byte of element (row, depth), "Canonical Layouts", one element at a time."""
    line, item = ROWS[code], 4 if width == 4 else 2
    of = line // item
    if across:
        outer, k = (row // of, depth)
        byte = (
            row % of * item
            + k % 8 * line
            + (outer * stride + k // 8 * leading if code == 0 else outer * leading + k // 8 * stride)
        )
    else:
        byte = row % 8 * line + row // 8 * stride
        byte += depth // of * leading + depth % of * item if code == 0 else depth * item
    return byte ^ (byte >> 7) % (line // 16) * 16


def descriptor(at, code, leading, stride):
    return at >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | code << 62


def laid(image, at, matrix, kind, code, across):
    """Put `[rows, k]` into the bytes of shared memory, and return its descriptor."""
    bits = matrix.astype(np.float32).view(np.uint32) if kind == "tf32" else half(kind, matrix)
    rows, depth = bits.shape
    width, line = bits.dtype.itemsize, ROWS[code]
    if across:  # blocks of 8 k; of all k; of the rows that a line holds
        leading, stride = (128 * (rows // 8), 128) if code == 0 else (16 * line, 8 * line)
    else:
        leading, stride = 128 * (rows // 8), 8 * line
    for row in range(rows):
        for k in range(depth):
            byte = at + place(row, k, width, code, across, leading, stride)
            image[byte : byte + width] = np.frombuffer(bits[row, k].tobytes(), np.uint8)
    return descriptor(at, code, leading, stride)


def text(
    n, kind, depth, a, b_word, across, *, before="", between="", behind="", fence=True, proxy=True, wait="0", scale="1"
):
    """Fill shared memory from `a` of the kernel, and the registers of A from `b`; the sums begin with 1."""
    sums = names(100, n // 2)
    fill = "".join(
        f"ld.global.v4.b32 {names(10, 4)}, [%d7+{i}]; st.shared.v4.b32 [%r2+{i}], {names(10, 4)};"
        for i in range(0, SIZE, 2048)
    )
    load = "".join(f"ld.global.b32 %r{20 + i}, [%d8+{4 * i}];" for i in range(4))
    store = "".join(f"st.global.b32 [%d9+{4 * i}], %r{100 + i};" for i in range(n // 2))
    last = ", ".join(str(int(x)) for x in (1, 1, *across))
    return f"""mul.wide.u32 %d7, %r0, 16; add.s64 %d8, %d1, %d7; add.s64 %d7, %d0, %d7; mov.u32 %r5, memory;
    shl.b32 %r2, %r0, 4; add.s32 %r2, %r2, %r5; mul.wide.u32 %d9, %r0, {2 * n}; add.s64 %d9, %d2, %d9;
    {fill} {load} {"".join(f"mov.b32 %r{100 + i}, 0f3F800000;" for i in range(n // 2))}
    {"fence.proxy.async.shared::cta;" if proxy else ""} {before} {"wgmma.fence.sync.aligned;" if fence else ""}
    wgmma.mma_async.sync.aligned.m64n{n}k{depth}.f32.{kind}.{kind} {sums}, {a}, {b_word}, {scale}, {last};
    wgmma.commit_group.sync.aligned; {between} wgmma.wait_group.sync.aligned {wait}; {behind} {store}"""


def product(n, kind, codes=(1, 1), across=(False, False), registers=False, before="bar.sync 0;", **options):
    """Return the matrix that a warpgroup multiplies, and the right one."""
    depth = 8 if kind == "tf32" else 16
    a, b = RNG.integers(-8, 8, (64, depth)), RNG.integers(-8, 8, (n, depth))
    image = np.zeros(SIZE, np.uint8)
    b_word = laid(image, 0, b, kind, codes[1], across[1])
    a_word = laid(image, A_AT, a, kind, codes[0], across[0])
    words = np.concatenate([fragments(kind, a[16 * w : 16 * w + 16], np.zeros((depth, 8), int))[0] for w in range(4)])
    last = () if kind == "tf32" else (across[1],) if registers else across
    left = names(20, 4) if registers else str(a_word)
    body = text(n, kind, depth, left, b_word, last, before=before, **options)
    out = run(body, image, words, np.zeros(64 * n, np.uint32), threads=128, shared=SIZE).view(np.float32)
    found = np.zeros((64, n), np.float32)
    for thread, row in enumerate(out.reshape(128, n // 8, 2, 2)):
        warp, g, t = thread // 32, thread % 32 // 4, thread % 4
        for block in range(n // 8):
            for low in range(2):
                found[16 * warp + g + 8 * low, 8 * block + 2 * t : 8 * block + 2 * t + 2] = row[block, low]
    return found, a @ b.T + 1


@pytest.mark.parametrize("registers", [False, True])
@pytest.mark.parametrize("kind, n", [("bf16", 8), ("bf16", 64), ("f16", 24), ("tf32", 32), ("bf16", 256)])
def test_sizes_and_types(kind, n, registers):
    found, expected = product(n, kind, registers=registers)
    assert (found == expected).all()


@pytest.mark.parametrize("across", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("code", ROWS)
def test_layouts(code, across):
    """Use rows of 16, 32, 64 and 128 bytes, along k or across it."""
    found, expected = product(64, "bf16", (code, code), across)
    assert (found == expected).all()


def test_without_what_was_there():
    found, expected = product(16, "f16", scale="0")
    assert (found == expected - 1).all()


#: A branch that lets half of the warpgroup pass a barrier.
HALF = "bar.sync 0; setp.lt.u32 %p1, %r0, 64; @%p1 bra L; bar.sync 0;\nL: "


@pytest.mark.parametrize(
    "options, what",
    [
        (dict(fence=False), "since the last wgmma.fence"),
        (dict(proxy=False), "no fence.proxy.async lies between"),
        (dict(before=""), "no barrier between"),
        (dict(wait="1"), "touched before its product was waited for"),
        (dict(between="mov.b32 %r1, %r100;"), "touched before its product was waited for"),
        (dict(between="mov.b32 %r100, %r1;"), "touched before its product was waited for"),
        (dict(between="bar.sync 0; st.shared.b32 [%r2], %r0;"), "a product that was not waited for reads"),
        (dict(behind="st.shared.b32 [%r2], %r0;"), "reads, no barrier between"),
        (dict(before=HALF), "divergence|deadlock"),
    ],
)
def test_faults(options, what):
    with pytest.raises(Fault, match=what):
        product(16, "bf16", **options)


def test_a_proxy_fence_behind_the_barrier_does_too():
    found, expected = product(16, "bf16", proxy=False, before="bar.sync 0; fence.proxy.async.shared::cta;")
    assert (found == expected).all()


def test_registers_of_a_are_free_behind_the_wait_alone():
    product(16, "bf16", registers=True, behind="mov.b32 %r20, %r0;")
    with pytest.raises(Fault, match="touched before"):
        product(16, "bf16", registers=True, between="mov.b32 %r20, %r0;")


@pytest.mark.parametrize("transposed", [False, True])
def test_stmatrix_is_ldmatrix_the_other_way(transposed):
    how = ".trans" * transposed
    body = f"""shl.b32 %r1, %r0, 4; mov.u32 %r5, memory; add.s32 %r1, %r1, %r5; mul.lo.u32 %r2, %r0, 0x10003;
    add.s32 %r20, %r2, 7; add.s32 %r21, %r2, 0x5000B; add.s32 %r22, %r2, 99; add.s32 %r23, %r2, 0x770000;
    stmatrix.sync.aligned.m8n8.x4{how}.shared.b16 [%r1], {names(20, 4)}; bar.sync 0;
    ldmatrix.sync.aligned.m8n8.x4{how}.shared.b16 {names(30, 4)}, [%r1]; mul.wide.u32 %d3, %r0, 16;
    add.s64 %d6, %d2, %d3; st.global.v4.b32 [%d6], {names(30, 4)};"""
    out = run(body, out=np.zeros(128, np.uint32), shared=512).reshape(32, 4)
    threads = np.arange(32, dtype=np.uint32)[:, None] * np.uint32(0x10003)
    assert (out == threads + np.array([7, 0x5000B, 99, 0x770000], np.uint32)).all()


@pytest.mark.parametrize(
    "body, what",
    [
        ("ld.global.b32 %r1, [%d4]; griddepcontrol.wait;", "touched before griddepcontrol.wait"),
        ("st.global.b32 [%d6], %r0; griddepcontrol.wait;", "touched before griddepcontrol.wait"),
        ("setp.lt.u32 %p1, %r0, 3; @%p1 bra L; griddepcontrol.wait;\nL: ", "ends without griddepcontrol.wait"),
    ],
)
def test_launches_that_overlap(body, what):
    run("griddepcontrol.launch_dependents; prefetch.global.L2 [%d4]; griddepcontrol.wait; st.global.b32 [%d6], %r0;")
    with pytest.raises(Fault, match=what):
        run(body)

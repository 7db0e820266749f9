"""The modifiers of instructions that are modelled: one that changes a meaning must not be passed over in silence."""

import re

from tests.ptx.kinds import BITS

_ORDERS = "relaxed acquire release acq_rel gpu sys"
_APPROXIMATE = "approx rn ftz"
_SUM = "rn ftz sat"
_EXTREME = "NaN ftz xorsign abs"
_OF_ATOMS = f"{_ORDERS} global shared add min max exch cas and or xor inc dec"
_OF_MATRICES = "sync aligned m8n8 x1 x2 x4 trans shared"

_MODIFIERS = {
    "abs": "ftz", "neg": "ftz", "not": "", "popc": "", "clz": "", "brev": "", "copysign": "", "selp": "", "mov": "",
    "and": "", "or": "", "xor": "", "shl": "", "shr": "", "bfe": "", "bfi": "", "prmt": "", "lop3": "",
    "shf": "l r wrap clamp", "cvta": "to global shared const",
    "add": _SUM, "sub": _SUM, "mul": f"{_SUM} lo hi wide", "mad": "lo hi wide rn ftz", "fma": "rn ftz",
    "div": "rn full approx ftz", "rem": "", "min": _EXTREME, "max": _EXTREME,
    **dict.fromkeys(("ex2", "lg2", "rcp", "rsqrt", "sqrt", "sin", "cos", "tanh"), _APPROXIMATE),
    "setp": "eq ne lt le gt ge lo ls hi hs equ neu ltu leu gtu geu num nan and or xor ftz",
    "cvt": "rn rz rm rp rna rni rzi rmi rpi ftz sat satfinite tf32 e4m3x2",
    "ld": f"{_ORDERS} weak global shared const param nc ca cg cs lu cv v2 v4",
    "st": f"{_ORDERS} weak global shared wb cg cs wt v2 v4",
    "atom": _OF_ATOMS, "red": _OF_ATOMS,
    "cp": "async ca cg shared global commit_group wait_group wait_all", "prefetch": "global L1 L2",
    "membar": "gl cta sys", "fence": "acq_rel sc cta gpu sys proxy async shared",
    "griddepcontrol": "wait launch_dependents",
    "bar": "warp sync", "shfl": "sync up down bfly idx", "vote": "sync ballot any all", "activemask": "",
    "redux": "sync add min max and or xor", "ldmatrix": _OF_MATRICES, "stmatrix": _OF_MATRICES,
    "mma": "sync aligned row col tf32", "wgmma": "mma_async fence commit_group wait_group sync aligned tf32",
}  # fmt: skip
# Hints to caches, which change no value; and the shapes of products.
_ANY = re.compile(r"L[12]::\w+$|m\d+n\d+k\d+$")


def unknown(op: list[str]) -> list[str]:
    """Return the pieces of a mnemonic whose meaning is not modelled."""
    known = _MODIFIERS.get(op[0])
    if known is None:
        return op[:1]
    pieces = (piece.partition("::")[0] if piece in ("shared::cta", "param::entry") else piece for piece in op[1:])
    return [piece for piece in pieces if not (piece in BITS or piece in known.split() or _ANY.match(piece))]

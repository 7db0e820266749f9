"""`python -m clvp_fast.native`: builds the library if needed, and prints its state."""

import argparse
import sys

from clvp_fast import native
from clvp_fast.native import build


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m clvp_fast.native", description="Builds the library if needed, and prints what there is of it."
    )
    parser.add_argument("--require", choices=("cpu", "cuda"), default="cpu", help="what must be built; else exit 1")
    parser.add_argument("--rebuild", action="store_true", help="build it anew, also after a failure")
    arguments = parser.parse_args(argv)
    parts = ("cpu", "cuda") if arguments.require == "cuda" or native.no_device() is None else ("cpu",)
    try:
        for part in parts if arguments.rebuild else ():
            if not native.is_checkout():
                raise native.NativeLibraryError("an installed library is not rebuilt: install clvp-fast again")
            native.cached(part, anew=True)
        native.library()
        if arguments.require == "cuda":
            native.library("cuda")
    except (native.NativeLibraryError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    built = native.record()
    without = f", without {', '.join(built['left_out'])}" if built["left_out"] else ""
    print(f"library  {native.folder('cpu') / build.LIBRARIES['cpu']}")
    print(f"cpu      {native.isa()} here; compiled for {', '.join(built['isas'])}{without}; {built['cxx_version']}")
    print(f"cuda     {_cuda_line(parts)}")
    return 0


def _cuda_line(parts: tuple[str, ...]) -> str:
    if "cuda" not in parts or native.loaded("cuda")[0] is None:
        return str(native.missing("cuda"))
    built = native.record("cuda")
    served = ", ".join(f"sm_{arch}" for arch in built["architectures"]) + f"; nvcc {built['nvcc_version']}"
    refused = native.missing("cuda")
    return f"{native.folder('cuda') / build.LIBRARIES['cuda']}; {served}" + (f"; {refused}" if refused else "")


if __name__ == "__main__":
    sys.exit(main())

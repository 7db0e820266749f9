"""A rival that needs no package: its logits are what is entered, and one of its threads never rests."""

from pathlib import Path
from threading import Thread

from benchmarks.rivals.serving import serve

PACKAGES = ()
SETTINGS = {"": [{}]}


def model_file(kind, layers, stored) -> Path:
    return Path("none")


def held_down(isa) -> dict[str, str] | None:
    return {"LIBRARY_MAX_ISA": "AVX2"} if isa == "avx2" else None


def load(job):
    def spin():
        while True:
            pass

    Thread(target=spin, daemon=True).start()
    return lambda hidden: hidden


if __name__ == "__main__":
    serve(load)

"""`python -m benchmarks.rivals.sweep [RIVAL ...]`: times the decode step of each rival with each of its settings.

It prints rows and appends them to sweep.jsonl beside this file, from which `benchmarks/decode_rivals.py` takes the
fastest settings of this machine. RIVAL: the beginning of a rival's name, as "llama.cpp q8_0"; all of them if left out.
"""

import argparse
import json
from datetime import UTC, datetime

from benchmarks import decode_step
from benchmarks.decode_rivals import RIVALS, SWEEP, Rival, here
from benchmarks.machine import seconds_of
from benchmarks.providers import Absent

CANDIDATES = (1, 16)
_REPEATS = 7


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rivals.sweep", description=__doc__)
    parser.add_argument("rival", nargs="*", default=[""])
    parser.add_argument("--candidates", type=int, nargs="+", default=CANDIDATES)
    parser.add_argument("--smoke", action="store_true", help="at a tiny size; nothing is written")
    parser.add_argument("--dry", action="store_true", help="nothing is written")
    arguments = parser.parse_args()
    for rival in RIVALS:
        for candidates in arguments.candidates if rival.name.startswith(tuple(arguments.rival)) else ():
            try:
                rows = swept(rival, candidates, arguments.smoke)
            except Absent as reason:
                print(f"{rival.name}: absent: {reason}", flush=True)
                break
            if not (arguments.smoke or arguments.dry):
                with SWEEP.open("a", encoding="utf-8") as file:
                    file.writelines(json.dumps(row) + "\n" for row in rows)


def swept(rival: Rival, candidates: int, smoke: bool) -> list[dict]:
    """Return a row for each of a rival's settings that does the same work: the least of some steps' seconds."""
    text_tokens, stored = decode_step.SMOKE[1:] if smoke else (decode_step.TEXT_TOKENS, decode_step.STORED)
    shape, rows = {"candidates": candidates, "text_tokens": text_tokens, "stored": stored}, []
    for settings in rival.module.SETTINGS[rival.kind]:
        decoder = decode_step.process_of(rival, shape, smoke, settings)
        try:
            error, _ = decode_step.judged(decoder, "cpu", smoke, shape, rival.distinct)
            if not error <= rival.tier.tolerance:
                raise RuntimeError(f"its logits are off by {error:.1e}, where {rival.tier.tolerance:.1e} is allowed")
            seconds = min(seconds_of(decoder.run) for _ in range(_REPEATS))
        except RuntimeError as error:
            print(f"{rival.name}, candidates {candidates}, {settings}: {error}", flush=True)
            continue
        finally:
            decoder.end()
        print(f"{rival.name}, candidates {candidates}, {settings}: {1000 * seconds:.1f} ms", flush=True)
        utc = datetime.now(UTC).isoformat(timespec="seconds")
        row = {"rival": rival.name, "candidates": candidates, "settings": settings, "seconds": seconds}
        rows.append(row | {"device": here(), "utc": utc})
    return rows


if __name__ == "__main__":
    main()

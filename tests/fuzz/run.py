"""Damaged files by the hundred thousand, for every reader of the program.

    python tests/fuzz/run.py --count 100000                    # all readers, one after another
    python tests/fuzz/run.py --reader loras --count 100000 --start 200000
    python tests/fuzz/run.py --reader loras --start 1234 --count 1     # one input again, by its number

The same numbers give the same inputs. A reader may refuse a file with the project's own error, in one line, or read it: see
`watching.py` for what it may not. What fails is kept in build/fuzz/ and listed; status 1.
"""

from __future__ import annotations

import argparse
import faulthandler
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
_FAILED = 3  # status of a worker that has lived to the end
_KEPT = 20  # of one reader: enough to see what is wrong


def made(reader: str, number: int, seeds: list[tuple[str, bytes]]) -> tuple[str, bytes]:
    """Input `number`: its file's name and content."""
    from mutations import mutated

    draw = random.Random(f"{reader} {number}")
    name, seed = draw.choice(seeds)
    return name, mutated(draw, seed, [content for _, content in seeds])


def warm(reader: str, seeds: list[tuple[str, bytes]], folder: Path) -> None:
    """Read the whole files: they can be, and everything is imported then."""
    from readers import READERS

    from diffmorpher.errors import LoraError

    for name, content in seeds:
        (folder / name).write_bytes(content)
        try:
            READERS[reader].read(folder / name)
        except LoraError:
            assert name == "another model's", name


def work(reader: str, start: int, count: int, out: Path) -> int:
    """So many inputs in this process. Returns how many failed; a process that dies has its input's number in out/READER.now."""
    from readers import READERS
    from watching import Bad, attempt

    with tempfile.TemporaryDirectory() as place:
        (seeds_in := Path(place, "seeds")).mkdir()
        (folder := Path(place, "work")).mkdir()
        seeds = READERS[reader].seeds(seeds_in)
        warm(reader, seeds, folder)
        read = failed = 0
        begun = time.monotonic()
        for number in range(start, start + count):
            (out / f"{reader}.now").write_text(str(number))
            name, content = made(reader, number, seeds)
            (folder / name).write_bytes(content)
            faulthandler.dump_traceback_later(60, exit=True)  # in C, where no signal is heard
            try:
                read += attempt(READERS[reader].read, folder / name, folder)
            except Bad as error:
                failed += 1
                (out / f"{reader}-{number}-{name}").write_bytes(content)
                print(f"{reader} {number}: {error}", flush=True)
                if failed == _KEPT:
                    print(f"{reader}: {failed} failed; no more of it.", flush=True)
                    return failed
            finally:
                faulthandler.cancel_dump_traceback_later()
        seconds = time.monotonic() - begun
        print(f"{reader}: {count} inputs, {read} read, {failed} failed, {seconds:.0f} s", flush=True)
        return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reader", action="append", help="one of them; all by default")
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    sys.path[:0] = [str(_ROOT / "tests" / "fuzz"), str(_ROOT / "tests"), str(_ROOT / "src")]
    from readers import READERS

    out = _ROOT / "build" / "fuzz"
    out.mkdir(parents=True, exist_ok=True)
    if options.worker:
        return _FAILED if work(options.reader[0], options.start, options.count, out) else 0
    bad = []
    for reader in options.reader or READERS:
        start, end = options.start, options.start + options.count
        while start < end:
            given = ["--worker", "--reader", reader, "--start", str(start), "--count", str(end - start)]
            status = subprocess.run([sys.executable, __file__, *given]).returncode
            if status:
                bad.append(reader)
            if status in (0, _FAILED):
                break
            number = int((out / f"{reader}.now").read_text())
            print(f"{reader} {number}: the process died with status {status}", flush=True)
            start = number + 1
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

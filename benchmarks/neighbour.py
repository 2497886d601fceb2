"""What a film costs alone and beside a busy neighbour, by how long torch's threads spin while they wait for each other.

    python benchmarks/neighbour.py --rounds 8

Each setting is a process of its own, since OpenMP reads the environment once, and makes the same short film of the bundled
model again and again. In each round every setting has two turns right after each other, in random order: alone, and beside
a process that keeps one core busy. Shown are medians over the rounds: seconds alone and beside, the same as multiples of
the first setting's seconds alone in the same round. Meant for an idle machine; the load average is printed.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import sys
import time
import warnings

#: What is added to the environment. The first is torch's own way.
SETTINGS: dict[str, dict[str, str]] = {
    "torch's own": {},
    "spin 100000": {"GOMP_SPINCOUNT": "100000"},
    "spin 30000": {"GOMP_SPINCOUNT": "30000"},
    "spin 10000": {"GOMP_SPINCOUNT": "10000"},
    "spin 3000": {"GOMP_SPINCOUNT": "3000"},
    "spin 2000": {"GOMP_SPINCOUNT": "2000"},
    "spin 1500": {"GOMP_SPINCOUNT": "1500"},
    "spin 1000": {"GOMP_SPINCOUNT": "1000"},
    "spin 500": {"GOMP_SPINCOUNT": "500"},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
OURS = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--films", type=int, default=4, help="in a turn")
    parser.add_argument("--settings", nargs="*", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.films)
        return
    plain = {name: value for name, value in os.environ.items() if name not in OURS}
    workers = {}
    for name in options.settings:
        command = [sys.executable, __file__, "--worker", "--films", str(options.films)]
        workers[name] = subprocess.Popen(
            command, env=plain | SETTINGS[name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        turn(workers[name])  # loading and the first film
    print(f"load average before: {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores")
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in workers}
    for _ in range(options.rounds):
        for name in random.sample(list(workers), len(workers)):
            alone = turn(workers[name])
            neighbour = subprocess.Popen([sys.executable, "-c", "while True: pass"])
            try:
                beside = turn(workers[name])
            finally:
                neighbour.kill()
                neighbour.wait()
            seconds[name].append((alone, beside))
    for worker in workers.values():
        worker.stdin.close()  # type: ignore[union-attr]
        worker.wait()
    first = [alone for alone, _ in seconds[options.settings[0]]]
    print("| setting | alone, s | beside, s | alone, ratio | beside, ratio |\n| --- | --- | --- | --- | --- |")
    for name, pairs in seconds.items():
        columns = [[pair[i] for pair in pairs] for i in (0, 1)]
        ratios = [statistics.median(a / b for a, b in zip(column, first, strict=True)) for column in columns]
        medians = [statistics.median(column) for column in columns]
        print(f"| {name} | {medians[0]:.2f} | {medians[1]:.2f} | {ratios[0]:.2f} | {ratios[1]:.2f} |")
    print(f"load average after: {os.getloadavg()[0]:.1f}")


def turn(worker: subprocess.Popen[str]) -> float:
    """One turn of a worker: seconds of a film."""
    assert worker.stdin is not None and worker.stdout is not None
    worker.stdin.write("\n")
    worker.stdin.flush()
    return float(worker.stdout.readline())


def work(films: int) -> None:
    """Films for each line that comes in; says how long one took."""
    from diffmorpher import FitConfig, Morpher, SampleConfig
    from diffmorpher.models.catalog import ASSETS
    from diffmorpher.progress import quiet_bars

    quiet_bars()

    morpher = Morpher.from_pretrained("mini", device="cpu")
    pictures = [ASSETS / "demo" / f"{name}.png" for name in ("tiger-face", "wolf-face")]
    fit, sample = FitConfig(steps=1, draws=4), SampleConfig(steps=1)
    warnings.simplefilter("ignore")  # of the size
    for _ in sys.stdin:
        start = time.perf_counter()
        for _ in range(films):
            morpher(pictures, num_frames=3, fit=fit, sample=sample, size=(128, 128))
        print((time.perf_counter() - start) / films, flush=True)


if __name__ == "__main__":
    main()

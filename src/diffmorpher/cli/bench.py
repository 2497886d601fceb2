"""The command line of the evaluation: `diffmorpher bench`, `compare` and `study`."""

from __future__ import annotations

import json
import shlex
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from ..errors import ConfigError, DiffMorpherError
from ..files.places import check_place, expanded
from ..progress import console, quiet_bars, say
from ..settings import check_seed
from . import options as o
from . import signals
from .checks import check_inputs_stay
from .terminal import begin

Data = Annotated[str, typer.Argument(metavar="DATA", help="'mini', a folder of pairs, or a .csv or .jsonl manifest.")]
Methods = Annotated[
    str, typer.Option("--methods", metavar="A,B", help="Names and presets: ablation, modes, lambda, all.")
]
OutDir = Annotated[
    Path,
    typer.Option("-o", "--out", metavar="DIR", help="Folder of the results; run again to go on.", parser=expanded),
]
Pairs = Annotated[
    int | None, typer.Option("--pairs", metavar="N", help="So many pairs only, of all categories in turn.")
]
Shard = Annotated[
    str | None, typer.Option("--shard", metavar="I/N", help="Every n-th pair from the i-th, for batch systems.")
]
InceptionFile = Annotated[
    Path | None, typer.Option("--inception", metavar="FILE", help="pytorch-fid's weights, for FID as published.")
]
BenchFrames = Annotated[
    int | None, typer.Option("--frames", metavar="N", help="Not the protocol's 17: for trying it out.")
]
Run = Annotated[Path | None, typer.Argument(metavar="DIR", help="The folder that 'bench' wrote.")]
Two = Annotated[str, typer.Option("--methods", metavar="A,B", help="The two methods to compare.")]
StudyOut = Annotated[Path, typer.Option("-o", "--out", metavar="FILE", help="The page.", parser=expanded)]
Tally = Annotated[
    list[Path] | None, typer.Option("--tally", metavar="FILE", help="Count saved votes: repeat it for each.")
]
ResultsA = Annotated[Path, typer.Argument(metavar="A", help="results.json, or its folder.")]
ResultsB = Annotated[Path, typer.Argument(metavar="B", help="Another one of the same protocol.")]


@o.takes("model", "prediction", "vae", "size", "device", "dtype", "steps", "lora_steps", "seed")
def bench(
    data: Data,
    methods: Methods,
    out: OutDir,
    pairs: Pairs = None,
    shard: Shard = None,
    jobs: o.Jobs = "auto",
    ray: o.Ray = None,
    inception: InceptionFile = None,
    frames: BenchFrames = None,
    debug: o.Debug = False,
    **typed: Any,
) -> None:
    """Run methods on a data set of pairs: figures, films, a report."""
    begin(debug)
    check_seed(typed.get("seed"))
    if pairs is not None and pairs < 1:
        raise ConfigError(f"--pairs is {pairs}, but must be a whole number of at least 1.")
    from ..cluster.slots import choose_jobs
    from ..config import FitConfig
    from ..evaluation.bench import parse_shard, run_bench
    from ..evaluation.datasets import OUTPUTS, load_dataset
    from ..evaluation.inception import load_inception
    from ..evaluation.methods import resolve_methods
    from ..evaluation.report import write_report
    from ..evaluation.results import collect
    from ..evaluation.worker import Settings

    _check_extra()
    check_place(out, folder=True)
    inputs = {"the data set": [Path(data)], "the weights for FID": [] if inception is None else [inception]}
    for name in OUTPUTS:
        check_inputs_stay(out / name, inputs)
    if inception is not None:
        load_inception(inception)  # what is wrong with it is said before the work
    part, parts = parse_shard(shard)
    dataset = load_dataset(data)
    names = tuple(resolve_methods(methods))
    chosen_settings = typed | ({} if frames is None else {"frames": frames})
    if "lora_steps" in typed:
        chosen_settings["fit"] = FitConfig(steps=chosen_settings.pop("lora_steps"))
    settings = Settings(names, **chosen_settings)
    warn_of_others(out, settings)
    chosen = dataset.take(pairs)
    mine = chosen[part - 1 :: parts]
    out.mkdir(parents=True, exist_ok=True)
    quiet_bars()
    signals.stop_by_exception()
    try:
        _run(run_bench(mine, settings, out, choose_jobs(jobs, settings.device), ray), len(mine) * len(names))
    finally:
        results = collect(dataset, chosen, settings, out, shlex.join(["diffmorpher", *sys.argv[1:]]), inception)
    report = write_report(results, out)
    _print_table(results)
    say(f"Wrote {report}, results.json and results.csv in {out}.")
    failed = results["failed"]
    for reason, count in Counter(f["error"] for f in failed).items():
        say(f"{count} failed: {reason}")
    if failed:
        raise DiffMorpherError(
            f"{len(failed)} of {len(chosen) * len(names)} results failed; run again to try them once more."
        )


def warn_of_others(out: Path, settings: Any) -> None:
    """Say so where the folder holds results of other settings, which are replaced one by one."""
    from ..errors import DataError
    from ..evaluation.results import read_results

    try:
        there = read_results(out)["protocol"]
    except DataError:
        return  # there are none
    others = [f"{key} {there[key]}" for key, value in settings.protocol.items() if there.get(key, value) != value]
    if others:
        warnings.warn(
            f"{out} holds results made with {', '.join(others)}, which these replace one by one: stop now to keep them.",
            stacklevel=2,
        )


def compare(a: ResultsA, b: ResultsB, as_json: o.Json = False, debug: o.Debug = False) -> None:
    """Differences of two benchmark runs, pair by pair: B minus A, with 95 % intervals."""
    begin(debug)
    from ..evaluation.report import COLUMNS
    from ..evaluation.results import as_json as to_json
    from ..evaluation.results import compare as differences
    from ..evaluation.results import read_results

    found = differences(read_results(a), read_results(b))
    if as_json:
        typer.echo(to_json(found))
        return
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("B minus A")
    for figure, (heading, _) in COLUMNS.items():
        if figure != "unet_rows":
            table.add_column(heading, justify="right")
    for method, rows in found.items():
        pairs = int(next(iter(rows.values()))[3])
        cells = []
        for figure, (mean, low, high, _) in rows.items():
            scale = 1e4 if figure == "pdv" else 1
            sure = "" if low <= 0 <= high else " *"
            cells.append(f"{mean * scale:+.4f} ({low * scale:+.4f} … {high * scale:+.4f}){sure}")
        table.add_row(f"{method}, {pairs} pairs", *cells)
    Console().print(table)
    say("* the interval does not hold 0.")


@o.takes("seed")
def study(
    run: Run = None,
    methods: Two = "diffmorpher,ddim",
    out: StudyOut = Path("study.html"),
    tally: Tally = None,
    as_json: o.Json = False,
    debug: o.Debug = False,
    **typed: Any,
) -> None:
    """Which film is better? A page for a blind vote between two methods, and the count of its votes."""
    begin(debug)
    seed = typed.get("seed", 0)
    check_seed(seed)
    if (run is None) == (not tally):
        raise ConfigError("give the folder of a benchmark to make a study, or --tally with files of votes.")
    from ..evaluation.study import tally as count
    from ..evaluation.study import write_study

    if run is not None:
        names = [name.strip() for name in methods.split(",")]
        if len(names) != 2:
            raise ConfigError(f"--methods is {methods!r}, but a study compares two: give A,B.")
        if out.suffix.lower() not in (".html", ".htm"):
            raise ConfigError(f"-o {str(out)!r} must end in .html: the page is written in no other format.")
        check_place(out)
        say(f"Wrote {write_study(run, (names[0], names[1]), out, seed)}: open it in a browser, or send it to others.")
        return
    found = count(tally or [])
    if as_json:
        typer.echo(json.dumps(found))
    for name, votes in found.items():
        first, second = name.split(" against ")
        counts = f"{votes[first]} for {first}, {votes[second]} for {second}, {votes['equal']} saw no difference"
        share = (
            ""
            if votes["share"] is None
            else f"; {first}: {votes['share']:.0%} ({votes['low']:.0%} to {votes['high']:.0%})"
        )
        say(f"{name}: {counts}{share}")


def _check_extra() -> None:
    """Say what is missing before the work, not after it."""
    from importlib.util import find_spec

    missing = [name for name in ("matplotlib", "filelock", "platformdirs") if find_spec(name) is None]
    if missing:
        raise ConfigError(f"the benchmark needs {' and '.join(missing)}: pip install 'diffmorpher[bench]'.")


def _run(steps: Any, total: int) -> None:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bars:
        task = bars.add_task("starting", total=total)
        for pair, method in steps:
            bars.update(task, advance=1, description=f"{pair} {method}"[:44].ljust(44))


def _print_table(results: dict[str, Any]) -> None:
    """The table over all pairs, narrow enough for 80 columns; the report has the rest."""
    from ..evaluation.report import COLUMNS, best_methods
    from ..evaluation.results import ALL

    rows = results["table"].get(ALL, {})
    if not rows:
        return
    headings = {"ppl": "PPL", "pdv": "PDV e-4", "end_distance": "ends", "end_psnr": "dB", "unet_rows": "rows"}
    table = Table(box=box.SIMPLE_HEAD, title=f"{results['dataset']['name']}, {len(results['dataset']['pairs'])} pairs")
    table.add_column("method", no_wrap=True)
    for heading in (*headings.values(), "Fréchet"):
        table.add_column(heading, justify="right", no_wrap=True)
    best = {figure: best_methods(rows, figure) for figure in headings}
    for method, values in rows.items():
        cells = []
        for figure in headings:
            text = COLUMNS[figure][1].format(values[figure][0] * (1e4 if figure == "pdv" else 1))
            cells.append(f"[bold]{text}[/bold]" if method in best[figure] else text)
        value = results["frechet"].get(method)
        table.add_row(method, *cells, "" if value is None else f"{value:.3f}")
    Console().print(table)
    say(f"Distance, also of Fréchet's features: {results['protocol']['distance']}.")

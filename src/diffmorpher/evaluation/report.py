"""report.html: one file without network that shows a benchmark's tables, curves and frames."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import ConfigError
from ..files.atomic import replacing
from .metrics import FIGURES
from .results import ALL

#: Columns of a table: the figure, its heading, and how a value is written.
COLUMNS = {
    "ppl": ("PPL", "{:.3f}"),
    "pdv": ("PDV ×10⁻⁴", "{:.2f}"),
    "end_distance": ("ends, distance", "{:.4f}"),
    "end_psnr": ("ends, dB", "{:.2f}"),
    "directness": ("directness", "{:.3f}"),
    "roughness": ("roughness", "{:.3f}"),
    "ghost": ("ghost", "{:.2f}"),
    "unet_rows": ("U-Net rows", "{:.0f}"),
}
_SCALE = {"pdv": 1e4}
_SIDE = 72  # pixels of a frame in a strip

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1400px; padding: 0 1rem; }
table { border-collapse: collapse; margin: .5rem 0 1.5rem; display: block; overflow-x: auto; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .7rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
td small { opacity: .65; } td.best { font-weight: 700; background: var(--soft); }
.strip { display: flex; align-items: center; gap: .6rem; margin: 2px 0; overflow-x: auto; }
.strip span { flex: 0 0 12rem; font-size: 13px; text-align: right; } .strip img { background: white; display: block; }
.note { border-left: 4px solid #d80; padding: .2rem .8rem; background: var(--soft); }
figure { margin: 0; } figure img { max-width: 100%; background: white; } code { font-size: 13px; }
"""


def write_report(results: dict[str, Any], out: Path) -> Path:
    """Write out/report.html from what `collect` gave and the frames in `out`. Raises `ConfigError` without matplotlib."""
    pairs = list(dict.fromkeys(r["pair"] for r in results["results"]))
    parts = [
        f"<h1>Benchmark: {_text(results['dataset']['name'])}</h1>",
        _notes(results),
        *(_table(results, category) for category in _all_first(results["table"])),
        "<h2>Distance per gap</h2><p>Mean over the pairs; an even film is a flat line.</p>",
        f"<figure><img alt='distance per gap' src='{_gap_curves(results)}'></figure>",
        "<h2>Frames</h2>",
        *(_strips(results, pair, out) for pair in pairs),
        _about(results),
    ]
    file = out / "report.html"
    with replacing(file) as part:
        head = (
            "<meta charset='utf-8'><meta name='viewport' content='width=device-width'><title>diffmorpher bench</title>"
        )
        page = f"<head>{head}<style>{_STYLE}</style></head><body>{''.join(parts)}</body>"
        part.write_text(f"<!doctype html><html lang='en'>{page}</html>", "utf-8")
    return file


def best_methods(rows: dict[str, dict[str, list[float]]], figure: str) -> set[str]:
    """The methods with the best mean, as far as the table's digits tell; none for the U-Net rows."""
    if figure not in FIGURES:
        return set()
    lower = FIGURES[figure][1]
    shown = {method: float(_number(figure, values[figure][0])) for method, values in rows.items() if figure in values}
    if not shown:
        return set()
    best = (min if lower else max)(shown.values())
    return {method for method, value in shown.items() if value == best}


def _number(figure: str, value: float) -> str:
    return COLUMNS[figure][1].format(value * _SCALE.get(figure, 1))


def _all_first(table: dict[str, Any]) -> list[str]:
    return [ALL, *(category for category in table if category != ALL)] if ALL in table else list(table)


def _text(value: object) -> str:
    return html.escape(str(value))


def _notes(results: dict[str, Any]) -> str:
    notes = []
    if not results["is_protocol"]:
        notes.append("These settings are not the protocol's: the figures compare with no other run's.")
    if not results["dataset"]["has_prompts"]:
        notes.append("The data set has no prompts: every method ran without.")
    if results["missing"]:
        missing, failed = len(results["missing"]), len(results["failed"])
        notes.append(f"{missing} results are missing, {failed} of them failed; they are in no mean.")
    if not results.get("fid"):
        notes.append("FID is left out: no Inception weights were given (--inception FILE).")
    protocol = results["protocol"]
    pairs, of = len(results["dataset"]["pairs"]), results["dataset"]["of"]
    text = (
        f"<p>{pairs} of {of} pairs, {protocol['frames']} frames each, {protocol['steps']} steps, "
        f"model {_text(results['model'])}. "
        f"Distance: {_text(protocol['distance'])}. Means with 95 % bootstrap intervals over pairs; best in bold.</p>"
    )
    return text + "".join(f"<p class='note'>{note}</p>" for note in notes)


def _table(results: dict[str, Any], category: str) -> str:
    rows = results["table"][category]
    if not rows:
        return ""
    best = {figure: best_methods(rows, figure) for figure in COLUMNS}
    sets = {"Fréchet (LPIPS features)": results["frechet"], "FID": (results.get("fid") or {}).get("values")}
    sets = {heading: values for heading, values in sets.items() if values and category == ALL}
    arrows = {figure: "" if figure not in FIGURES else " ↓" if FIGURES[figure][1] else " ↑" for figure in COLUMNS}
    heads = "".join(
        f"<th title='{_text(FIGURES.get(figure, ('rows of all U-Net batches',))[0])}'>{_text(heading)}{arrows[figure]}</th>"
        for figure, (heading, _) in COLUMNS.items()
    )
    heads += "".join(f"<th>{heading} ↓</th>" for heading in sets)
    lines = []
    for method, values in rows.items():
        cells = []
        for figure in COLUMNS:
            if figure not in values:  # the row was made before there was that figure
                cells.append("<td></td>")
                continue
            mean, low, high = (_number(figure, value) for value in values[figure])
            interval = f" <small>{low} … {high}</small>" if low != high else ""
            cells.append(f"<td class='{'best' if method in best[figure] else ''}'>{mean}{interval}</td>")
        for distances in sets.values():
            value = distances.get(method)
            least = value is not None and value == min(distances.values())
            cells.append(f"<td class='{'best' if least else ''}'>{'' if value is None else f'{value:.3f}'}</td>")
        lines.append(f"<tr><td>{_text(method)}</td>{''.join(cells)}</tr>")
    title = "All pairs" if category == ALL else category
    body = f"<thead><tr><th>method</th>{heads}</tr></thead><tbody>{''.join(lines)}</tbody>"
    return f"<h2>{_text(title)}</h2><table>{body}</table>"


def _gap_curves(results: dict[str, Any]) -> str:
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ConfigError("the report needs matplotlib: pip install 'diffmorpher[bench]'.") from error
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    ax = figure.subplots()
    for method in results["methods"]:
        curves = [r["figures"]["distances"] for r in results["results"] if r["method"] == method]
        if curves:
            means = [sum(gap) / len(gap) for gap in zip(*curves, strict=True)]
            ax.plot(range(1, len(means) + 1), means, label=method)
    ax.set(xlabel="gap", ylabel="perceptual distance", ylim=(0, None))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8, ncols=2)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return _data_uri(buffer.getvalue(), "image/png")


def _strips(results: dict[str, Any], pair: str, out: Path) -> str:
    lines = [f"<h3>{_text(pair)}</h3>"]
    for result in (r for r in results["results"] if r["pair"] == pair):
        frames = sorted((out / pair / result["method"]).glob("[0-9]*.png"))
        about = f"PDV {result['figures']['pdv'] * 1e4:.2f}·10⁻⁴"
        strip = _strip(frames)
        label = f"<span>{_text(result['method'])}<br><small>{about}</small></span>"
        lines.append(
            f"<div class='strip'>{label}<img loading='lazy' alt='{_text(result['method'])}' src='{strip}'></div>"
        )
    return "".join(lines)


def _strip(frames: Sequence[Path]) -> str:
    sheet = Image.new("RGB", (_SIDE * len(frames), _SIDE), "white")
    for i, file in enumerate(frames):
        with Image.open(file, formats=["PNG"]) as frame:
            frame.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
            sheet.paste(frame, (i * _SIDE + (_SIDE - frame.width) // 2, (_SIDE - frame.height) // 2))
    buffer = io.BytesIO()
    sheet.save(buffer, "JPEG", quality=82)
    return _data_uri(buffer.getvalue(), "image/jpeg")


def _data_uri(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _about(results: dict[str, Any]) -> str:
    rows: Iterable[tuple[str, object]] = [
        ("command", results["command"]),
        ("date", results["date"]),
        ("machine", results["machine"]),
        ("versions", results["versions"]),
        ("protocol", results["protocol"]),
        *((name, text) for name, text in results["figures"].items()),
    ]
    cell = "<td style='text-align:left;white-space:normal'>"
    lines = "".join(f"<tr><td>{_text(name)}</td>{cell}{_text(value)}</td></tr>" for name, value in rows)
    return f"<h2>How it was made</h2><table>{lines}</table>"

"""What `diffmorpher info` shows: versions, devices, and which models are here."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path

import torch
from huggingface_hub.constants import HF_HUB_CACHE
from rich import box
from rich.table import Table

from ..errors import ModelError
from ..models.catalog import CATALOG, cached_models
from ..models.loading import default_device
from ..models.single_file import Checkpoint


def about_table() -> Table:
    """Versions, devices and models, found without asking any network."""
    table = Table(box=box.SIMPLE, show_header=False, padding=(0, 1))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    for name in ("diffmorpher", "torch", "diffusers", "transformers"):
        table.add_row(name, version(name))
    table.add_row("python", platform.python_version(), end_section=True)
    for name, about in _devices():
        table.add_row(name, about, "default" if name == str(default_device()) else "")
    table.add_section()
    cached = cached_models()
    for name, spec in CATALOG.items():
        where = "bundled" if Path(spec.source).is_dir() else cached.get(spec.source, "not downloaded yet")
        table.add_row(name, spec.about, where)
    known = {spec.source for spec in CATALOG.values()}
    for name, where in cached.items():
        if name not in known:
            table.add_row(name, "", where)
    table.add_section()
    table.add_row("model cache", HF_HUB_CACHE)
    return table


def about_file(file: Path) -> Table:
    """What one .safetensors file holds and how it is used, by its header alone. Raises `ModelError` for what is none."""
    checkpoint = Checkpoint.read(file)
    family, predicts = checkpoint.family, checkpoint.prediction
    try:
        config = checkpoint.check()
        use = f"--model {file}, with {'the configuration in ' + str(config) if checkpoint.folder else 'nothing else'}"
    except ModelError as error:
        use = str(error)
    rows = {
        "file": f"{file.name}, {file.stat().st_size / 1e9:.3g} GB, {', '.join(sorted(checkpoint.dtypes))}",
        "holds": family.name,
        "predicts": (predicts or "not said") if family.config else "",
        "use": use,
        "but": checkpoint.few_steps,
    }
    table = Table(box=box.SIMPLE, show_header=False, padding=(0, 1))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in rows.items():
        if text:
            table.add_row(name, text)
    return table


def _devices() -> list[tuple[str, str]]:
    """(name, description) of every device torch can use here."""
    found = [("cpu", f"{platform.machine()}, {os.cpu_count()} cores")]
    for i in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(i)
        found.append((f"cuda:{i}" if i else "cuda", f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB"))
    if torch.backends.mps.is_available():
        found.append(("mps", "Apple"))
    return found

"""What `diffmorpher info` shows: versions, devices, and which models are here."""

from __future__ import annotations

import os
import platform
import warnings
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.constants import HF_HUB_CACHE
from rich import box
from rich.table import Table

from ..errors import LoraError, ModelError
from ..files.cache import Cache, cache_limit
from ..files.lora_families import made_for
from ..files.loras import load_lora
from ..models.catalog import CATALOG, ModelSpec, cached_models, spec_of
from ..models.families import FAMILIES
from ..models.loading import count_parameters, default_device
from ..models.single_file import Checkpoint


def about_machine() -> dict[str, Any]:
    """Versions, devices and models, found without asking any network."""
    versions = {name: version(name) for name in ("diffmorpher", "torch", "diffusers", "transformers")}
    cached = cached_models()
    models = [
        {"name": name, "about": spec.described(), "where": _where(spec, cached), "source": spec.source}
        for name, spec in CATALOG.items()
    ]
    known = {spec.source for spec in CATALOG.values()}
    models += [
        {"name": name, "about": "", "where": where, "source": name}
        for name, where in cached.items()
        if name not in known
    ]
    return {
        "versions": versions | {"python": platform.python_version()},
        "devices": [
            {"name": name, "about": about, "default": name == str(default_device())} for name, about in _devices()
        ],
        "models": models,
        "model_cache": HF_HUB_CACHE,
        "film_cache": _film_cache(),
    }


def _where(spec: ModelSpec, cached: dict[str, str]) -> str:
    return "bundled" if Path(spec.source).is_dir() else cached.get(spec.source, "not downloaded yet")


def machine_table(facts: dict[str, Any]) -> Table:
    """What `about_machine` found."""
    table = Table(box=box.SIMPLE, show_header=False, padding=(0, 1))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    for name, number in facts["versions"].items():
        table.add_row(name, number)
    table.add_section()
    for device in facts["devices"]:
        table.add_row(device["name"], device["about"], "default" if device["default"] else "")
    table.add_section()
    for model in facts["models"]:
        table.add_row(model["name"], model["about"], model["where"])
    table.add_section()
    table.add_row("model cache", facts["model_cache"])
    kept = facts["film_cache"]
    if kept["limit_bytes"]:
        used = f"{kept['bytes'] / 1e9:.2f} of {kept['limit_bytes'] / 1e9:g} GB, {kept['entries']} entries"
        table.add_row("film cache", kept["place"], f"{used}; may be removed at any time")
    else:
        table.add_row("film cache", "none", "DIFFMORPHER_CACHE_GB is 0")
    return table


def _film_cache() -> dict[str, Any]:
    """Where fits, inversions and frames are kept, and how full that is."""
    cache, limit = Cache(), cache_limit()
    entries = cache.entries() if limit else []
    used = sum(size for _, size, _ in entries)
    return {"place": str(cache.root), "limit_bytes": limit, "bytes": used, "entries": len(entries)}


def about_file(file: Path) -> dict[str, Any]:
    """What one .safetensors file holds and how it is used, a model's by its header alone. Raises `ModelError` for what is none.

    family: for people; usable: whether it is a model that can be loaded, as "use" says how, or why not.
    """
    checkpoint = Checkpoint.read(file)
    family = checkpoint.family
    facts: dict[str, Any] = {
        "file": file.name,
        "bytes": file.stat().st_size,
        "dtypes": sorted(checkpoint.dtypes),
        "family": family.name,
        "parameters": count_parameters(file),
    }
    if family == FAMILIES["lora"]:
        facts |= _about_lora(file)
    if family.config:
        facts["predicts"] = checkpoint.prediction
    try:
        config = checkpoint.check()
        facts["usable"] = True
        facts["use"] = (
            f"--model {file}, with {'the configuration in ' + str(config) if checkpoint.folder else 'nothing else'}"
        )
    except ModelError as error:
        facts |= {"usable": False, "use": str(error)}
    return facts | {"suits": _differs(spec_of(str(file))), "but": checkpoint.few_steps}


def _about_lora(file: Path) -> dict[str, Any]:
    """The family a LoRA was made for, where its layers tell, and how large it is; nothing for one that cannot be read."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of layers that are left out
            lora = load_lora(file)
    except LoraError as error:
        return {"lora_error": str(error)}
    ranks = sorted({down.shape[0] for down in lora.down.values()})
    return {"made_for": made_for(lora.down) or None, "layers": len(lora.down), "ranks": ranks}


def file_table(facts: dict[str, Any]) -> Table:
    """What `about_file` found."""
    rows = {
        "file": f"{facts['file']}, {facts['bytes'] / 1e9:.3g} GB, {', '.join(facts['dtypes'])}",
        "holds": facts["family"],
        "made for": f"{facts['made_for'] or 'not said'}; {facts['layers']} layers" if "made_for" in facts else "",
        "predicts": (facts["predicts"] or "not said") if "predicts" in facts else "",
        "use": facts["use"],
        "suits it": ", ".join(f"{name} {value}" for name, value in facts["suits"].items()),
        "but": facts.get("lora_error") or facts["but"],
    }
    table = Table(box=box.SIMPLE, show_header=False, padding=(0, 1))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in rows.items():
        if text:
            table.add_row(name, text)
    return table


def _differs(spec: ModelSpec) -> dict[str, Any]:
    """What of a model's recommendation is not as in the paper, by the keys of a recipe."""
    changed: dict[str, Any] = {}
    for section in ("fit", "sample"):
        own, paper = (asdict(getattr(each, section)) for each in (spec, ModelSpec()))
        changed |= {f"{section}.{name}": value for name, value in own.items() if value != paper[name]}
    return changed


def _devices() -> list[tuple[str, str]]:
    """(name, description) of every device torch can use here."""
    found = [("cpu", f"{platform.machine()}, {os.cpu_count()} cores")]
    for i in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(i)
        found.append((f"cuda:{i}" if i else "cuda", f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB"))
    if torch.backends.mps.is_available():
        found.append(("mps", "Apple"))
    return found

"""Models that load as one of a family but do not suit: distilled to a few steps, or made to edit pictures.

Their layers are those of the model that they were made from, so that only names and settings tell. Imports no torch.
"""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

from ..errors import ModelError
from .families import for_editing

#: Names that few-step models go by; "hyper-realistic" is none.
_FEW_STEPS = re.compile(r"(?<![a-z])(turbo|lightning|lcm|hyper(?![-_ ]?real)|dmd2?|schnell|distilled)(?![a-z])")
#: Samplers made for few-step models alone.
_FEW_STEP_SCHEDULERS = ("LCMScheduler", "TCDScheduler")


def few_steps_by_name(name: str) -> str:
    """A sentence for a file, folder or hub id that goes by the name of a few-step model, else nothing."""
    return few_steps_sentence(name) if _FEW_STEPS.search(name.lower()) else ""


def few_steps_sentence(name: str) -> str:
    return f"{name} goes by the name of a few-step model, which morphs badly: take the one it was made from."


def check_class(kind: str) -> None:
    """Raise `ModelError` for the class of a pipeline that edits pictures."""
    if found := for_editing(kind):
        raise ModelError(f"{kind} is the pipeline of {found.name}: {found.instead}.")


def check_suits(pipe: Any, name: str) -> None:
    """Raise `ModelError` for a pipeline that edits pictures; warn of one that is distilled to a few steps.

    name: what the model was asked for by.
    """
    check_class(type(pipe).__name__)
    if name.lower().endswith(".safetensors"):  # `single_file.Checkpoint` has asked; the rest comes from another model
        return
    names = _names(pipe, name)
    if hasattr(pipe, "transformer"):
        for each in names:
            if found := for_editing(each):
                raise ModelError(f"{each} goes by the name of {found.name}: {found.instead}.")
    said = next(filter(None, map(few_steps_by_name, names)), "") or _few_steps_by_scheduler(pipe)
    if said:
        warnings.warn(said, stacklevel=4)


def _names(pipe: Any, name: str) -> list[str]:
    """What a pipeline goes by: the name it was asked for by, where it was loaded from, and where a copy says it came from."""
    place = str(getattr(pipe.config, "_name_or_path", None) or "")
    origin = read_index(Path(place)).get("_name_or_path")  # which diffusers leaves out when it loads a folder
    return [_own_part(str(each)) for each in (name, place, origin) if each]


def read_index(folder: Path) -> dict[str, Any]:
    """A folder's model_index.json; empty where there is none that can be read, of which loading says more."""
    try:
        index = json.loads((folder / "model_index.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return index if isinstance(index, dict) else {}


def _own_part(place: str) -> str:
    """Of a path or a hub id the model's own part: neither the owner nor the folders above."""
    parts = [part for part in re.split(r"[\\/]", place) if part]
    cached = next((part for part in parts if part.startswith("models--")), "")  # the hub's cache ends in a revision
    return cached.rpartition("--")[2] or (parts[-1] if parts else "")


def _few_steps_by_scheduler(pipe: Any) -> str:
    kind, config = type(pipe.scheduler).__name__, getattr(pipe.scheduler, "config", {})
    # As SDXL-Turbo has it. Trailing alone is also what models have whose levels end in noise alone.
    turbo = (
        kind == "EulerAncestralDiscreteScheduler"
        and config.get("timestep_spacing") == "trailing"
        and config.get("prediction_type") == "epsilon"
        and not config.get("rescale_betas_zero_snr")
    )
    if not turbo and kind not in _FEW_STEP_SCHEDULERS:
        return ""
    how = f"{kind} with trailing steps" if turbo else kind
    return (
        f"the scheduler is {how}, as few-step models have it, which morph badly: take the model that it was made from."
    )

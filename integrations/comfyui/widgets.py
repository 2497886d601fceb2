"""Inputs of nodes, made from the library's table of settings: names, limits and help exist once, there."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from comfy_api.latest import io

from diffmorpher import Morpher, Recipe, SampleConfig
from diffmorpher.settings import BY_NAME, SETTINGS, Setting, check_typed

from .host import lora_file

#: Settings of the loader, of the film as a file and its sound, and one that attention 0 says as well.
ELSEWHERE = {"model", "prediction", "device", "dtype", "low_memory", "tf32", "hold", "audio", "beat", "no_attention"}
ALL = [
    each.name
    for each in SETTINGS
    if each.name not in ELSEWHERE and (each.group != "Output" or each.name in ("frames", "loop"))
]
#: What the slow part depends on. The rest can be changed without doing it again.
FIT = [
    name
    for name in ALL
    if BY_NAME[name].key.partition(".")[0]
    in ("prompts", "size", "resize", "focus", "loras", "styles", "fit", "loop", "seed")
    or name == "steps"
]
FILM = [name for name in ALL if name not in FIT and BY_NAME[name].key]  # presets, which have no key, change the fit too

#: Browsers count exactly up to here.
_MOST = 2**53 - 1
_PLAIN = Recipe(model="any")


def widgets(names: Iterable[str]) -> list[Any]:
    """An input for each setting; none must be there, so that workflows of older versions go on working."""
    return [_widget(BY_NAME[name]) for name in names]


def typed(values: dict[str, Any]) -> dict[str, Any]:
    """What was chosen, by names of settings, as `Recipe.changed` takes it: a widget left as it was says nothing."""
    said = {name: value for name, value in values.items() if value != _default(BY_NAME[name])}
    for name in said:
        if BY_NAME[name].is_list:
            said[name] = [line.strip() for line in said[name].splitlines() if line.strip()]
    for name in {"lora", "style"} & said.keys():
        said[name] = [lora_file(file) for file in said[name]]
    for name in {"size", "stretch"} & said.keys():
        said[name] = BY_NAME[name].read(said[name].strip())
    if "stretch" in said:  # shares of the film, as its frames always stand beside them here
        said["frames"] = values.get("frames", _PLAIN.frames)
    check_typed(said)
    return said


def recipe(morpher: Morpher, count: int, values: dict[str, Any], sample: SampleConfig | None = None) -> Recipe:
    """The recipe of a film of `count` pictures; what was not chosen is as in `sample`, or else what suits the model."""
    names = tuple(f"image {k}" for k in range(count))
    spec = morpher.spec
    own = Recipe(pictures=names, model=morpher.backbone.name, fit=spec.fit, sample=sample or spec.sample)
    return own.changed(**typed(values))


def _default(setting: Setting) -> Any:
    limits = setting.limits
    if setting.is_switch:
        return setting.is_on
    if limits is None or limits.many:
        return ""
    if setting.is_model_own or (limits.kind is int and limits.choices):
        return limits.kind(0)
    value = setting.get(_PLAIN)
    return -1.0 if value is None else value


def _widget(setting: Setting) -> Any:
    limits, default = setting.limits, _default(setting)
    shared = {"display_name": setting.label, "tooltip": setting.help, "default": default, "optional": True}
    if setting.is_switch:
        return io.Boolean.Input(setting.name, **shared)
    if setting.is_list:
        shared["tooltip"] += " One a line."
        return io.String.Input(setting.name, multiline=True, **shared)
    if limits is None or limits.many:
        return io.String.Input(setting.name, placeholder=setting.unset, **shared)
    if limits.kind is str:
        return io.Combo.Input(setting.name, options=list(limits.choices), **shared)
    low = default if setting.is_model_own or default == -1 or limits.choices else limits.low
    high = _MOST if limits.high is None else min(limits.high, _MOST)
    if default in (0, -1) and setting.name != "seed" and default == low:
        shared["tooltip"] += f" {default:g}: {'not fixed' if default == -1 else 'what suits the model'}."
    if limits.kind is int:
        again = True if setting.name == "seed" else None
        return io.Int.Input(setting.name, min=int(low), max=int(high), control_after_generate=again, **shared)
    step = 1e-5 if setting.name == "lora_lr" else 0.05
    return io.Float.Input(setting.name, min=float(low), max=float(high), step=step, **shared)

"""The one table of a film's settings: options of the command line, fields of the page and of its API, keys of a recipe.

What contradicts what, and what a setting does nothing with, is said here too.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .config import MAX_SECONDS, FitConfig, Limits, SampleConfig, ScheduleConfig, limits_of, shown
from .errors import ConfigError
from .files.pictures import MIN_SIDE
from .files.playback import Playback

#: An hour at 24 frames per second; gif and webp hold them all in memory.
MAX_FRAMES = 86_400

#: Pixels on a side of a frame.
MAX_SIDE = 4096

#: Of a LoRA: far beyond what leaves a picture.
MAX_WEIGHT = 100

#: Sizes that are said by their shape, width and height in proportion: the nearest that suits the model.
SHAPES = {"square": (1, 1), "16:9": (16, 9), "9:16": (9, 16), "4:5": (4, 5)}

#: The tables of a recipe, and what may stand in each; "" is what stands in none.
CONFIGS: dict[str, type] = {"fit": FitConfig, "sample": SampleConfig, "schedule": ScheduleConfig}
LIMITS: dict[str, dict[str, Limits]] = {section: limits_of(config) for section, config in CONFIGS.items()} | {
    "": {
        "frames": Limits("frames", int, 2, MAX_FRAMES, allowed=f"a whole number from 2 to {MAX_FRAMES}"),
        "seconds": Limits(
            *("the length", float, 0, MAX_SECONDS),
            above=True,
            optional=True,
            allowed=f"a number of seconds above 0 and at most {MAX_SECONDS}",
        ),
        **limits_of(Playback),
        "loop": Limits("loop", bool),
        "beat": Limits("beat", bool),
        "transparent": Limits("transparent", bool),
        "resize": Limits("resize", str, choices=("crop", "pad", "blur")),
        "seed": Limits("the seed", int, 0, 2**63 - 1, allowed="a whole number from 0 to 2^63 - 1"),
        "low_memory": Limits("low memory", bool),
        "tf32": Limits("TF32", bool),
        "prediction": Limits("the prediction", str, choices=("epsilon", "v"), optional=True),
    }
}


#: `Setting.sets` of a setting that takes a value; of a switch it is what the switch sets.
VALUE: Any = object()


@dataclass(frozen=True)
class Setting:
    """One setting: an option of the command line, a field of the page and of its API, a key of a recipe's file.

    key: where it stands in a recipe and in its file. label: what the page calls it. help: when to touch it. sets: a switch sets
    this, whatever stood there. unset: what None stands for.
    """

    name: str
    key: str
    group: str
    label: str
    help: str
    metavar: str = " "
    sets: Any = VALUE
    unset: str = ""

    @property
    def limits(self) -> Limits | None:
        section, _, name = self.key.rpartition(".")
        return LIMITS[section].get(name)

    @property
    def is_switch(self) -> bool:
        return self.sets is not VALUE or (self.limits is not None and self.limits.kind is bool)

    @property
    def is_list(self) -> bool:
        return self.key in ("prompts", "loras", "styles", "focus")

    @property
    def is_model_own(self) -> bool:
        """Whether models have recommendations of their own for it."""
        return self.key.startswith("fit.") or self.key == "sample.steps"

    @property
    def is_on(self) -> bool:
        """Whether it is a switch that is on unless it is switched off."""
        section, _, name = self.key.rpartition(".")
        return self.sets is VALUE and bool(section) and getattr(CONFIGS[section], name) is True

    @property
    def option(self) -> str:
        """What it goes by: "--loop", or "--no-adain" for what is on."""
        return self.flag(not self.is_on)

    def says(self, value: Any) -> bool:
        """Whether a value that came from a face changes anything: what sets nothing unless switched on does not."""
        return value is not False or self.sets is VALUE

    def flag(self, on: bool) -> str:
        """A switch as it is typed."""
        return f"--{'' if on else 'no-'}{self.name.replace('_', '-')}"

    def get(self, recipe: Any) -> Any:
        section, _, name = self.key.rpartition(".")
        return getattr(getattr(recipe, section) if section else recipe, name, None)

    def put(self, recipe: Any, value: Any) -> Any:
        """The recipe with this setting changed. Raises `ConfigError`."""
        value = value if self.sets is VALUE else self.sets
        section, _, name = self.key.rpartition(".")
        if name == "frames":  # in place of a length in seconds
            return replace(recipe, frames=value, seconds=None)
        if not section:
            return replace(recipe, **{name: value})
        config = getattr(recipe, section)
        if config is None:  # no LoRA: it changes nothing, but must still be one that can be
            replace(CONFIGS[section](), **{name: value})
            return recipe
        return replace(recipe, **{section: replace(config, **{name: value})})

    def said(self, value: Any) -> str:
        """A value as it is typed."""
        if self.name == "size":
            return value if isinstance(value, str) else "{}x{}".format(*value)
        if isinstance(value, tuple):
            return ",".join(map(self.said, value))
        return str(int(value)) if isinstance(value, float) and value == int(value) else str(value)

    def read(self, text: str) -> Any:
        """What was typed as what the setting takes; its own checks come later. Raises `ConfigError`."""
        if self.name == "size":
            return parse_size(text)
        if self.limits is not None and self.limits.many:
            return parse_numbers(text, self.limits.label)
        return text


SETTINGS: tuple[Setting, ...] = (
    Setting("frames", "frames", "Output", "Frames", "More is smoother, and longer.", "N"),
    Setting("seconds", "seconds", "Output", "Seconds", "Length of the whole film, in place of frames.", "S",
            unset="what the frames take"),
    Setting("fps", "fps", "Output", "Frames a second", "More is faster, and shorter.", "F"),
    Setting("loop", "loop", "Output", "Loop", "Leads back to the first picture."),
    Setting("ping_pong", "ping_pong", "Output", "Ping-pong", "Plays forwards, then backwards."),
    Setting("reverse", "reverse", "Output", "Reverse", "Plays backwards."),
    Setting("quality", "quality", "Output", "Quality", "Of .mp4, .webm, .mov, .webp: smaller files, or better ones.",
            "small|good|best"),
    Setting("transparent", "transparent", "Output", "Transparent",
            "Frames keep the pictures' transparency: in .webm, .mov, .mkv, .webp, .apng, .png and folders."),
    Setting("hold", "hold", "Pacing", "Hold", "Seconds that pictures stand still: one for all, or 0.5,0,1.", "S,S,..."),
    Setting("stretch", "schedule.stretch", "Pacing", "Stretch",
            "Seconds from picture to picture, such as 2,1,4; shares where frames or seconds say how long the film is.",
            "S,S,...", unset="what the pictures ask for"),
    Setting("ease", "schedule.ease", "Pacing", "Ease", "in leaves pictures slowly, out comes to them slowly.",
            "linear|in|out|in-out"),
    Setting("audio", "audio", "Sound", "Sound", "A file whose sound goes under .mp4, .webm, .mov and .mkv.", "FILE",
            unset="none"),
    Setting("beat", "beat", "Sound", "Follow the beat", "Pictures change with the sound in place of evenly."),
    Setting("prompt", "prompts", "Pictures", "What they show", "What they show: one for all, or repeat it for each.", "TEXT"),
    Setting("size", "size", "Pictures", "Size", f"Working size, such as 512x512, or a shape: {', '.join(SHAPES)}.", "WxH",
            unset="what suits the model"),
    Setting("resize", "resize", "Pictures", "Other shapes",
            "When nothing may be cut off: pad with white, or with the picture itself, enlarged and blurred.", "crop|pad|blur"),
    Setting("focus", "focus", "Pictures", "Focus",
            "What a crop has in its middle: center, auto (a face, or what stands out), or X,Y in shares of width and height; "
            "repeat it for each.", "X,Y"),
    Setting("lora_steps", "fit.steps", "LoRAs", "LoRA steps", "More when the ends lack detail.", "N"),
    Setting("lora_rank", "fit.rank", "LoRAs", "LoRA rank", "More for crowded pictures.", "R"),
    Setting("lora_lr", "fit.learning_rate", "LoRAs", "LoRA rate", "Less when frames break up.", "X"),
    Setting("lora", "loras", "LoRAs", "LoRA files",
            "Files fitted before, in place of fitting: one for all pictures, or repeat it for each.", "FILE[:WEIGHT]"),
    Setting("style", "styles", "LoRAs", "Styles",
            "A LoRA of others, which acts on every frame beside the pictures' own; repeat it for more.", "FILE[:WEIGHT]"),
    Setting("no_lora", "fit", "LoRAs", "Without LoRA", "Quick but rough: learns nothing.", sets=None),
    Setting("fix_lora", "sample.fix_lora", "LoRAs", "Fix the LoRA at",
            "0 keeps to the first picture's manner throughout, 1 to the second's.", "W"),
    Setting("lora_blend", "sample.lora_blend", "LoRAs", "LoRA blend", "How two are mixed.", "auto|factors|product"),
    Setting("steps", "sample.steps", "Method", "Steps", "Diffusion steps; fewer to try things out.", "T"),
    Setting("attention_lambda", "sample.attention_lambda", "Method", "Attention λ",
            "0 to 1; more when frames flicker, 0 is off.", "L"),
    Setting("attention_mode", "sample.attention_mode", "Method", "Attention", "What of the ends is mixed.",
            "features|kv|outer"),
    Setting("no_attention", "sample.attention_lambda", "Method", "Without attention", "Do not mix self-attention.", sets=0.0),
    Setting("adain", "sample.adain", "Method", "Match colours (AdaIN)", "Colours are matched; off when they look dull."),
    Setting("reschedule", "schedule.enabled", "Method", "Even speed (reschedule)",
            "Speed is evened out; off when it should follow the positions."),
    Setting("paper", "", "Method", "As the paper",
            "The paper's settings throughout, in place of the model's own: for mini four times the work.", sets=True),
    Setting("preview", "", "Method", "Quick",
            "A rough film soon: --no-lora --no-reschedule --attention-mode outer (kv for flow models).", sets=True),
    Setting("guidance", "sample.guidance_scale", "Method", "Guidance",
            "Above 1 heeds the prompts more, in twice the time.", "G"),
    Setting("model", "model", "Model", "Model", "A name that 'info' lists, hub id, folder or .safetensors file.", "M"),
    Setting("prediction", "prediction", "Model", "Prediction", "What the U-Net predicts, for files that do not say.",
            "epsilon|v", unset="what the model says"),
    Setting("vae", "vae", "Model", "VAE", "An autoencoder in place of the model's own: a folder or a .safetensors file.",
            "FOLDER|FILE", unset="the model's own"),
    Setting("device", "device", "Model", "Device", "cpu, cuda, cuda:1, mps ...", "D", unset="the fastest present"),
    Setting("dtype", "dtype", "Model", "Dtype", "float32, bfloat16, float16.", "T",
            unset="float32, on CUDA 16 bits; of a large model bfloat16 on a CPU that has it"),
    Setting("batch_size", "sample.batch_size", "Model", "Batch size", "Frames at once; lower it if memory runs out.", "B"),
    Setting("low_memory", "low_memory", "Model", "Low memory",
            "The same film in less memory and more time; for GPUs of 8 GB."),
    Setting("tf32", "tf32", "Model", "TF32", "Let a GPU round float32 products to TF32: faster, less exact."),
    Setting("seed", "seed", "Other", "Seed", "The same one repeats a film, another gives another.", "S"),
)  # fmt: skip
BY_NAME = {each.name: each for each in SETTINGS}


def _paper(recipe: Any) -> Any:
    fit = None if recipe.fit is None else FitConfig()
    return replace(recipe, fit=fit, sample=SampleConfig(), schedule=replace(recipe.schedule, method="two-pass"))


def _quick(recipe: Any) -> Any:
    sample = replace(recipe.sample, attention_mode=recipe.suits().quick_attention)
    schedule = replace(recipe.schedule, enabled=False)
    return replace(recipe, fit=None, loras=(), lora_hashes=(), sample=sample, schedule=schedule)


#: Settings that go together, by the names of their switches.
PRESETS = {"paper": _paper, "preview": _quick}

# ---- what contradicts what, and what a setting does nothing with

_CONTRADICT = (("lora", "no_lora"), ("lora", "preview"), ("frames", "seconds"))


def check_typed(typed: Collection[str]) -> None:
    """Raise `ConfigError` where settings that were typed, by their names, contradict each other."""
    for pair in _CONTRADICT:
        if set(pair) <= set(typed):
            one, other = (BY_NAME[name].option for name in pair)
            raise ConfigError(f"{one} and {other} contradict each other: leave one out.")


def unused(recipe: Any, typed: Collection[str]) -> list[str]:
    """A sentence for each setting that was typed and changes nothing, as the recipe stands."""
    no_lora = recipe.fit is None and not recipe.loras
    fit = ("lora_steps", "lora_rank", "lora_lr")
    rules: list[tuple[bool, str, tuple[str, ...]]] = [
        (no_lora, "preview" if "preview" in typed else "no_lora", (*fit, "fix_lora", "lora_blend")),
        (bool(recipe.loras), "lora", fit),
        ("no_attention" in typed, "no_attention", ("attention_lambda", "attention_mode")),
        (recipe.sample.attention_lambda == 0 and "no_attention" not in typed, "no_attention", ("attention_mode",)),
    ]
    return [
        f"{BY_NAME[name].option} changes nothing with {BY_NAME[reason].option}."
        for holds, reason, names in rules
        for name in names
        if holds and name in typed
    ]


# ---- checks of single values


def parse_size(text: str | None) -> tuple[int, int] | str | None:
    """ "512x384" as (width, height); a shape and None stay as they are. What the model asks of a size it says itself."""
    if text is None or text in SHAPES:
        return text
    match = re.fullmatch(r"([0-9]{1,9})x([0-9]{1,9})", text)
    if match is None:
        raise ConfigError(
            f"the size {text!r} is not of the form WxH: give two whole numbers, such as 512x512, or one of {', '.join(SHAPES)}."
        )
    return check_size((int(match[1]), int(match[2])))


def parse_numbers(text: str, label: str) -> tuple[float, ...]:
    """ "0.5,0,1" as numbers. Raises `ConfigError`."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"{label} is {text!r}, but must be a number, or numbers with commas between.") from None


def split_weight(text: str) -> tuple[str, str]:
    """ "ink.safetensors:0.8" as the file and ":0.8"; "" where no number is behind the last colon."""
    match = re.fullmatch(r"(.+)(:[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?)", text, re.DOTALL)
    return (match[1], match[2]) if match else (text, "")


def parse_weighted(text: str) -> tuple[str, float]:
    """ "ink.safetensors:0.8" as a file and its weight, which is 1 where none is given. Raises `ConfigError`."""
    file, weight = split_weight(text)
    if abs(number := float(weight[1:] or 1)) > MAX_WEIGHT:
        raise ConfigError(
            f"the weight in {text!r} is {number:g}, but must be a number from -{MAX_WEIGHT} to {MAX_WEIGHT}."
        )
    return file, number


def parse_focus(text: str) -> tuple[float, float]:
    """ "center" or "0.3,0.5" as shares of width and height. Raises `ConfigError`."""
    if text in ("", "center", "auto"):  # the last is settled by whoever has the picture
        return 0.5, 0.5
    try:
        x, y = (float(part) for part in text.split(","))
    except ValueError:
        x = y = -1.0
    if not (0 <= x <= 1 and 0 <= y <= 1):
        raise ConfigError(
            f"the focus {text!r} is no point: give center, auto, or two numbers from 0 to 1, such as 0.3,0.5."
        )
    return x, y


def check_size(size: Sequence[int] | str) -> tuple[int, int] | str:
    """A shape, or two whole numbers, large enough for a picture. Raises `ConfigError`."""
    if isinstance(size, str):
        return parse_size(size) or size
    if (
        not isinstance(size, (tuple, list))
        or len(size) != 2
        or not all(isinstance(side, int) and not isinstance(side, bool) for side in size)
    ):
        raise ConfigError(f"the size is {shown(size)}, but must be two whole numbers, (width, height).")
    width, height = size
    if min(size) < MIN_SIDE:
        raise ConfigError(f"the size {shown(width)}x{shown(height)} is too small: give at least {MIN_SIDE}x{MIN_SIDE}.")
    if max(size) > MAX_SIDE:
        raise ConfigError(f"the size {shown(size)} is too large: a side can have {MAX_SIDE} pixels.")
    return width, height


def check_seed(seed: int | None) -> None:
    if seed is not None:
        LIMITS[""]["seed"].check(seed)

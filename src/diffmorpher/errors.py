"""The exceptions this package raises on purpose.

A `UserError` is a mistake the user can mend: its message is one sentence that quotes what was given and says what to do.
The command line prints it and exits with status 2; everything else that goes wrong exits with 1.
"""

import re

_LINES = re.compile(r"\s*[\r\n]+\s*")


class DiffMorpherError(Exception):
    """Base of every error this package raises on purpose: one line, also where it quotes a file that has several."""

    def __init__(self, *args: object) -> None:
        super().__init__(*(_LINES.sub(" ", arg) if isinstance(arg, str) else arg for arg in args))


class UserError(DiffMorpherError, ValueError):
    """A mistake in what was given, with a message that says how to mend it."""


class ConfigError(UserError):
    """A setting is out of its range, or settings contradict each other."""


class ImageError(UserError):
    """A picture cannot be read or used."""


class ModelError(UserError):
    """A model cannot be found, loaded or used."""


class LoraError(UserError):
    """A LoRA file cannot be read, or does not belong to the model."""


class PathFileError(UserError):
    """A saved morph path cannot be read, or does not belong to the model."""


class RecipeError(UserError):
    """A recipe cannot be read: an unknown key, a wrong type, a newer version, a picture that is missing or another one."""


class SoundError(UserError):
    """A sound cannot be read, or a film cannot hold one."""


class DataError(UserError):
    """A data set of the benchmark, or a file of results, cannot be used."""


class OutputError(UserError):
    """The output cannot be written where, or in the format, that was asked for."""


class WriteError(OutputError):
    """Writing failed at work, on a full disk say: no mistake in what was given (exit status 1)."""


class NumbersError(DiffMorpherError):
    """NaN or infinity came up at work; the message says at which stage and step, and what most likely made it."""


class OutOfMemory(DiffMorpherError):
    """Memory does not suffice even for the smallest batch; the message says what needs less."""


class Cancelled(DiffMorpherError):
    """Raise this from a progress callback to stop a run; it passes through to the caller."""

"""The exceptions this package raises on purpose.

A `UserError` is a mistake the user can mend: its message is one sentence that quotes what was given and says what to do.
The command line prints it and exits with status 2; everything else that goes wrong exits with 1.
"""


class DiffMorpherError(Exception):
    """Base of every error this package raises on purpose."""


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


class DataError(UserError):
    """A data set of the benchmark, or a file of results, cannot be used."""


class OutputError(UserError):
    """The output cannot be written where, or in the format, that was asked for."""


class Cancelled(DiffMorpherError):
    """Raise this from a progress callback to stop a run; it passes through to the caller."""

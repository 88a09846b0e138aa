"""The errors users meet. Each message says what was given, what was expected, and the nearest thing that would work."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FinetunaError(Exception):
    """Base of every error that this package raises on purpose. At the command line it is one line, no traceback."""


class ConfigError(FinetunaError, ValueError):
    """A setting has a value that cannot work."""


class TargetError(FinetunaError, ValueError):
    """A module name, suffix or pattern matches nothing that can carry what was asked for."""


class DataError(FinetunaError, ValueError):
    """A data file is missing, empty, malformed, or does not fit the model."""


class BackboneError(FinetunaError, ValueError):
    """A backbone folder cannot be loaded as what it was said to be."""


class RouteError(FinetunaError, RuntimeError):
    """A batch reached an adapted layer without saying which rows belong to which adapter."""


class CheckpointError(FinetunaError, RuntimeError):
    """A checkpoint or adapter folder does not belong to this backbone, or is not complete."""


class FrozenWeightError(FinetunaError, RuntimeError):
    """A backbone weight that must stay frozen was thawed or overwritten."""


def did_you_mean(given: str, options: Iterable[str]) -> str:
    """``"; did you mean 'q_proj'?"`` for the option nearest to ``given``, else the empty string."""
    near = difflib.get_close_matches(given, list(options), n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""


def one_of(what: str, given: object, options: Iterable[str]) -> str:
    """The message for a value outside a fixed set of names."""
    options = list(options)
    return f"{what} must be one of {', '.join(options)}, not {given!r}{did_you_mean(str(given), options)}"

"""The one exception for input that cannot be used, and the warnings."""

from __future__ import annotations


class CpiftError(ValueError):
    """A file, key, tensor or setting given by the user cannot be used.

    The message is one line that names the culprit and says what to do; the command line prints it without a traceback.
    """


class MismatchWarning(UserWarning):
    """Files that are used together seem to come from different trainings."""


class NoEffectWarning(UserWarning):
    """A step ran as asked and changed nothing, for instance an empty core region."""

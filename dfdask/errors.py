"""Everything that dfdask raises on purpose, as one tree.

Each message says what is wrong, gives the actual values and says what to do next. The command line prints
the message alone and exits with ``exit_code``.
"""

from __future__ import annotations


class DfdaskError(Exception):
    """Base of all errors that a user can do something about."""

    exit_code = 1


class SpecError(DfdaskError):
    """The job is not valid: an unknown key, a bad value, an argument that the pipeline refuses."""

    exit_code = 2


class PromptError(SpecError):
    """The prompts cannot be read: missing file, wrong columns, duplicate ids, bad encoding."""


class ModelError(DfdaskError):
    """The model cannot be found, read or cut into stages."""

    exit_code = 2


class StorageError(DfdaskError):
    """The output cannot be reached, read or written."""

    exit_code = 3


class RunChangedError(StorageError):
    """A run of that name exists and was made from a different spec."""


class RunNotFoundError(StorageError):
    """There is no run of that name."""


class ClusterError(DfdaskError):
    """The Dask cluster cannot do the job: no scheduler there, it went away, or no workers for a stage."""

    exit_code = 4


class JobStopped(DfdaskError):
    """The job was stopped on request (Ctrl-C or ``run.stop()``); everything committed is kept."""

    exit_code = 130

"""Errors that the person at the keyboard can mend; each message says what was found and what to do. Imports nothing.

``common.run.program.run`` prints them as one line instead of a traceback.
"""


class UsageError(ValueError):
    """Flags or arguments that do not go together, or not with a file; the message says what to change."""


class DataError(ValueError):
    """Data that is missing, incomplete or damaged; the message names it and says what to do."""


class NotNumbers(DataError):
    """Logits of an evaluation that are nan."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read, written or matched; the message names the file, the finding and the way out."""


class OutputError(OSError):
    """A result cannot be written; the message names the file and the system's reason. What was there stays."""


class ExportError(RuntimeError):
    """A network that cannot be exported, or whose file computes something else; the message says which and why."""


class LaunchError(RuntimeError):
    """The environment or the flags describe no job that can start; the message says what to change."""


class NonFiniteLoss(RuntimeError):
    """The loss became infinite or not a number; the message gives epoch, step and every term."""


EXPECTED = (UsageError, DataError, CheckpointError, OutputError, ExportError, LaunchError, NonFiniteLoss)

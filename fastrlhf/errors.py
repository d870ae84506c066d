"""The errors whose message is written for the user: the command line prints it, without a traceback.

Each is also the built-in error that Python code expects, so `except ValueError` catches a UserError. Operations and
other pure functions raise ValueError and TypeError themselves: there the caller's code is at fault.
"""

from __future__ import annotations


class ReportedError(Exception):
    """An error that the command line reports in one message."""


class UserError(ReportedError, ValueError):
    """The user's mistake: an option, a name, a combination of settings, or a folder that cannot be used."""


class UserTypeError(UserError, TypeError):
    """A value of another type than the option has."""


class MissingFileError(UserError, FileNotFoundError):
    """A file or folder that the user names and that is not there."""


class OutputError(UserError, FileExistsError):
    """An output folder that holds something else, or is in use."""


class ProtectedError(UserError, PermissionError):
    """A file of the output folder that may not be written."""


class MissingPackageError(UserError, ModuleNotFoundError):
    """A feature whose extra is not installed."""


class UserFunctionError(UserError, RuntimeError):
    """A function of the user's that ended in a way that would end the run without a word."""


class UserFunctionTimeout(UserError, TimeoutError):
    """A function of the user's that took too long."""


class DataError(ReportedError, ValueError):
    """A file that cannot be used: missing, malformed, of unknown layout, or with too many rejected rows."""


class MachineError(ReportedError, RuntimeError):
    """A fault of the machine, a server or another process."""


class NonFiniteError(MachineError, FloatingPointError):
    """A loss, a gradient or a score that is not finite."""


class DiskFullError(MachineError, OSError):
    """There is no room for what a run writes; what was written of it is removed."""

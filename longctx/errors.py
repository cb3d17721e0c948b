"""Defines what can go wrong, by whose doing, and with which exit code a command ends.

Users' mistakes derive from ``ValueError``. They carry one message with the value, the rule and the nearest valid
choice, and the command line prints that message alone. Broken invariants are ``assert``.
"""


class LongctxError(Exception):
    """The base of every error that a command reports in one message, without a traceback."""

    exit_code = 70


class UsageError(LongctxError, ValueError):
    """The command line itself cannot be read: a word that is no option and no override."""

    exit_code = 2


class ConfigError(LongctxError, ValueError):
    """The configuration asks for something impossible or inexact."""

    exit_code = 78


class DataError(LongctxError, ValueError):
    """The training data are malformed; the message names file, document and offset."""

    exit_code = 65


class NotAvailableError(LongctxError, RuntimeError):
    """Something that is not built yet, not installed, or not present on this machine."""

    exit_code = 69


class NumericsError(LongctxError, RuntimeError):
    """A number that may not be trusted, such as those of an inexact strategy or a loss that is not finite."""

    exit_code = 70


class RankLostError(LongctxError, RuntimeError):
    """Another rank has ended or does not answer, and this one cannot go on without it."""

    exit_code = 70


class StorageError(LongctxError, OSError):
    """Reading or writing files failed: missing or truncated checkpoint, full disk."""

    exit_code = 74


class RequeueError(LongctxError, RuntimeError):
    """The run was asked to stop and saved its state: start it again with ``--resume``."""

    exit_code = 75

"""Errors for what a user can cause: each message gives the value, what was expected, and the way out."""


class LongspanError(ValueError):
    """Base class of every error that longspan raises for something the caller can mend."""


class LayoutError(LongspanError):
    """A sequence layout, a process group or a document list does not fit."""


class InputError(LongspanError):
    """A tensor's shape, dtype, device or value, or an operator's option, does not fit."""


class NonFiniteError(LongspanError):
    """What a model computes is no longer a number: its weights, or what it was given, are not finite or overflow."""


class ConfigError(LongspanError):
    """A configuration key or value does not fit."""


class DataError(LongspanError):
    """A corpus, token file or tokenizer does not fit."""


class CheckpointError(LongspanError):
    """A checkpoint is incomplete, damaged, or belongs to something else."""


class ExchangeError(LongspanError, RuntimeError):
    """An exchange between ranks failed: a rank died, did not come in time, or raised an error of its own."""


class OutOfStepError(ExchangeError):
    """The ranks of a group do not take the same exchanges in the same order."""

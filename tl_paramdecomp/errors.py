"""Every error that the package raises on purpose, and its warnings.

Each error says what was given, what was expected and what to try, and leaves the model and the files as they were.
"""


class TLParamDecompError(Exception):
    """Root of the package's errors."""


class UnsupportedModelError(TLParamDecompError, ValueError):
    """The model, or this part of it, cannot be decomposed exactly."""


class UnsupportedSiteError(UnsupportedModelError):
    """One weight of an otherwise supported model cannot be decomposed exactly."""


class NoMatchingSiteError(TLParamDecompError, ValueError):
    """A pattern or a name matches no weight site."""


class TargetMismatchError(TLParamDecompError, ValueError):
    """The weights of the model are not those the decomposition was made from."""


class ShapeError(TLParamDecompError, ValueError):
    """A tensor has the wrong shape."""


class DtypeError(TLParamDecompError, TypeError):
    """A tensor has the wrong number type."""


class DeviceError(TLParamDecompError, ValueError):
    """Components and target model are on different devices."""


class ComponentIndexError(TLParamDecompError, IndexError):
    """The site has no such component."""


class PositionIndexError(TLParamDecompError, IndexError):
    """The row has no such position."""


class HeadIndexError(TLParamDecompError, IndexError):
    """The site has no such head, or no heads at all."""


class MaskNotConstantError(TLParamDecompError, ValueError):
    """A mask differs over batch or position where one weight must serve every token."""


class PatchConflictError(TLParamDecompError, RuntimeError):
    """Two patches of one site have no common meaning."""


class SiteNotFiredError(TLParamDecompError, RuntimeError):
    """A patched site was not reached by the forward pass."""


class NoImportanceError(TLParamDecompError, ValueError):
    """The decomposition has no causal-importance function."""


class SettingError(TLParamDecompError, ValueError):
    """A hyperparameter or an argument makes no sense."""


class DataError(TLParamDecompError, ValueError):
    """Data cannot be used as token rows."""


class TaskError(TLParamDecompError, ValueError):
    """Prompts, answers and metric do not make a task together."""


class TokenizerTaskError(TaskError):
    """A task cannot be written with this tokenizer."""


class NormalisationError(TLParamDecompError, ArithmeticError):
    """A value cannot be put between two others that are almost the same."""


class DecompositionFileError(TLParamDecompError, OSError):
    """A decomposition's files are missing, broken or foreign."""


class DiskSpaceError(DecompositionFileError):
    """There is no room on the disk for what is to be written."""


class RunInUseError(TLParamDecompError, OSError):
    """Another process writes to the run's directory."""


class MissingExtraError(TLParamDecompError, ImportError):
    """An optional library is not installed."""


class PeerLostError(TLParamDecompError, RuntimeError):
    """Another process of a run no longer answers."""


class DivergedError(TLParamDecompError, ArithmeticError):
    """A loss, a gradient or a parameter is no longer a finite number."""


class CollapseWarning(UserWarning):
    """A run's importances say nothing any more, or its settings let them get there."""


class RowStartWarning(UserWarning):
    """Rows begin with the beginning-of-sequence token, and those that a decomposition was made on did not, or the reverse."""

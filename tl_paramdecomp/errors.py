"""Every error the package raises on purpose.

    TLParamDecompError
    ├── UnsupportedModelError (ValueError)      this model, or this part of it, cannot be decomposed exactly
    │   └── UnsupportedSiteError                one weight of an otherwise supported model
    ├── NoMatchingSiteError (ValueError)        a pattern or name that matches no weight site
    ├── TargetMismatchError (ValueError)        the model's weights are not those the decomposition was made from
    ├── ShapeError (ValueError)                 a tensor of the wrong shape
    ├── DtypeError (TypeError)                  a tensor of the wrong number type
    ├── DeviceError (ValueError)                components and model on different devices
    ├── ComponentIndexError (IndexError)        no such component
    ├── PositionIndexError (IndexError)         no such position in this row
    ├── HeadIndexError (IndexError)             no such head, or a site that has none
    ├── MaskNotConstantError (ValueError)       a mask that differs over batch or position where one weight must serve all
    ├── PatchConflictError (RuntimeError)       two patches of one site that have no common meaning
    ├── SiteNotFiredError (RuntimeError)        a patched site that the forward pass never reached
    ├── NoImportanceError (ValueError)          a decomposition without a causal-importance function
    ├── SettingError (ValueError)               a hyperparameter or an argument that makes no sense
    ├── DataError (ValueError)                  training or evaluation data that cannot be used
    ├── TaskError (ValueError)                  prompts, answers or a metric that make no task together
    │   └── TokenizerTaskError                  a task that cannot be written with this tokenizer
    ├── NormalisationError (ArithmeticError)    a division by a difference close to zero
    ├── DecompositionFileError (OSError)        a missing, broken or foreign file
    │   └── DiskSpaceError                      a file that the disk has no room for
    ├── RunInUseError (OSError)                 a run's directory that another process is writing to
    ├── MissingExtraError (ImportError)         an optional library that this needs is not installed
    ├── PeerLostError (RuntimeError)            another process of the run died or does not answer
    └── DivergedError (ArithmeticError)         a loss, gradient or parameter that is no longer a number

Each says what was given, what was expected and what to try, and leaves the model and the files as they were.

The package's warnings:

    CollapseWarning (UserWarning)               a training run that has gone where nothing more is learned, or is about to
    RowStartWarning (UserWarning)               rows that begin otherwise than those a decomposition was made on
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

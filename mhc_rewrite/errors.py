"""What can go wrong, as exceptions that tell a person where and what to do.

Every message names the module, the line of the user's source where there is one, what was expected and the way out.
"""

from __future__ import annotations


class MHCError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigError(MHCError, ValueError):
    """An option has a value that cannot be used, or two options contradict each other."""


class ExampleInputsError(MHCError, TypeError):
    """Example inputs are missing and cannot be derived, or the model does not accept them."""


class NoResidualError(MHCError):
    """No residual stream was found, or the filters and `min_sites` left none."""


class AlreadyConvertedError(MHCError):
    """The model was converted before, or has hyper-connections of its own."""


class UnsupportedModelError(MHCError):
    """The model, its width or its dtype cannot be converted."""


class CaptureError(MHCError):
    """A forward could not be captured as a graph. `module` names whose."""

    def __init__(self, message: str, module: str = "") -> None:
        super().__init__(message)
        self.module = module


class SitesError(MHCError, ValueError):
    """Saved sites can't be read, or do not fit the model that they are loaded into."""


class StreamError(MHCError):
    """At run time a residual stream did not flow as it did when the model was converted."""


class KernelError(MHCError, ValueError):
    """An operator was given tensors that do not go together, or the kernels of a graph are not there."""


class PeerError(MHCError):
    """Another package's sites, for comparison, are not there or can't run a model."""


class RunFileError(MHCError, ValueError):
    """A file of a watched run can't be read or written, or is another run's."""


class ReportError(MHCError, ValueError):
    """A report can't be written there, or a library is missing that it needs."""


class DrawingError(MHCError, ValueError):
    """A picture can't be made of this, or can't be written there."""

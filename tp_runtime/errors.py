"""Errors for users. Each message says what was asked, what was found, the limit and the way out.

    TPError (ValueError)
    ├── ConfigError          a flag, an environment variable or a configuration file
    ├── ModelNotFoundError   no model, weights or tokenizer under the name that was given
    ├── CheckpointError      weights that are truncated, missing, surplus or of another shape
    ├── TokenizerError       a tokenizer or chat template that cannot be read or used
    ├── RequestError         a prompt or sampling parameter that cannot be served
    ├── ShardingError        a model that cannot be split as asked
    ├── MemoryLimitError     weights or a cache that cannot fit
    ├── LaunchError          a host or a job that cannot be used as asked
    ├── KernelBuildError     the C++ or Triton kernels cannot be built
    └── CollectiveError      a peer died, hung past its deadline, or left

Programs of this project print one line, `error: ...`, and exit with code 2 for any of them.
This module imports nothing but the standard library.
"""

from __future__ import annotations


class TPError(ValueError):
    """Base of all errors a user can cause or should read."""


class ConfigError(TPError):
    """A flag, an environment variable or a configuration file is unusable."""


class ModelNotFoundError(TPError):
    """No model, weights or tokenizer under the name that was given."""


class CheckpointError(TPError):
    """Weights are truncated, missing, surplus or of another shape than the model's."""


class TokenizerError(TPError):
    """A tokenizer or chat template cannot be read or used."""


class RequestError(TPError):
    """A prompt or sampling parameter cannot be served."""


class ShardingError(TPError):
    """A model cannot be split as asked."""


class MemoryLimitError(TPError):
    """Weights or a cache do not fit into memory."""


class LaunchError(TPError):
    """A host or a job cannot be used as asked."""


class KernelBuildError(TPError):
    """The native kernels cannot be built here."""


class CollectiveError(TPError):
    """A peer rank died, hung past its deadline, or left the group."""

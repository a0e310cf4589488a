"""The errors that a user can cause. Every message names the key or file, the value, the bound and the remedy."""


class RbGpuError(Exception):
    """Base of every error that rb_gpu raises on purpose; a job prints it without a traceback and exits with 1."""


class ConfigError(RbGpuError, ValueError):
    """A setting has a value outside its bounds, or two settings contradict each other."""


class DataError(RbGpuError, ValueError):
    """A trajectory table cannot be learned from: missing column, mixed dimensions, no rows, too many bad rows."""


class ArtifactError(RbGpuError):
    """An artifact is damaged, incomplete, of another schema, or does not fit what is asked of it."""


class RegistryError(RbGpuError):
    """The registry refuses a request: unknown version, lock held by another job, or nothing to roll back to."""

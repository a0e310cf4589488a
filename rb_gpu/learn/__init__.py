"""The batch side of rb_gpu, which needs torch: install it with `pip install 'rb_gpu[cpu]'` or `'rb_gpu[gpu]'`."""

try:
    import hydra  # noqa: F401
    import pyarrow  # noqa: F401
    import scipy  # noqa: F401
    import torch  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"rb_gpu.learn needs {error.name}, which is not installed; "
        "pip install 'rb_gpu[cpu]', or 'rb_gpu[gpu]' on a CUDA node"
    ) from error

from rb_gpu.learn.extractor import PatternExtractor, VerdictJudge
from rb_gpu.learn.pipeline import LearnedBank, learn

__all__ = ["LearnedBank", "PatternExtractor", "VerdictJudge", "learn"]

"""Sources of images for a conversion; `open_source` lists their forms."""

from fastdeit.pipelines.sources.base import SampleError, Source, SourceError, SplitNeededError, UnlistedClassError
from fastdeit.pipelines.sources.open import open_source, read_class_names

__all__ = [
    "SampleError",
    "Source",
    "SourceError",
    "SplitNeededError",
    "UnlistedClassError",
    "open_source",
    "read_class_names",
]

"""Where a conversion's images come from; `open_source` says in what forms."""

from fastdeit.pipelines.sources.base import SampleError, Source, SourceError
from fastdeit.pipelines.sources.open import open_source, read_class_names

__all__ = ["SampleError", "Source", "SourceError", "open_source", "read_class_names"]

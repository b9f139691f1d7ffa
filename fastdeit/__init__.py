"""Train Data-efficient image Transformers fast, exactly, and within a budget."""

__version__ = "0.1.0"

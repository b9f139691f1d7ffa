"""The version of fastdeit."""

__version__ = "0.1.0"

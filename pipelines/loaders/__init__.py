"""JPEG decoders, and how a run chooses one."""

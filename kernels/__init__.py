"""Device operations of fastdeit: Triton kernels and their plain PyTorch definitions."""

if __name__ != "fastdeit.kernels":
    raise ImportError("this folder is installed as `fastdeit.kernels`: run `pip install -e .` and import that")

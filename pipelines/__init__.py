"""Data side of fastdeit: conversion, the order of an epoch, the plan, loaders and augmentation stages."""

if __name__ != "fastdeit.pipelines":
    raise ImportError("this folder is installed as `fastdeit.pipelines`: run `pip install -e .` and import that")

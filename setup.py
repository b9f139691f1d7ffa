"""Package mapping; everything else is in pyproject.toml.

`kernels/` and `pipelines/` are folders beside `fastdeit/`, but are installed inside it, so that site-packages gets no
packages with such general names.
"""

from setuptools import Extension, find_packages, setup

MAPPING = {"fastdeit": "fastdeit", "fastdeit.kernels": "kernels", "fastdeit.pipelines": "pipelines"}

# A shared library for ctypes, not a Python module. Optional: installation succeeds without a C compiler or
# libjpeg-turbo's headers, and the turbo loader then says what is missing.
JPEG = Extension("fastdeit.pipelines.loaders._jpeg", ["pipelines/loaders/jpeg.c"], libraries=["jpeg"], optional=True)


def installed_packages() -> list[str]:
    names: list[str] = []
    for package, folder in MAPPING.items():
        names.append(package)
        names.extend(f"{package}.{sub}" for sub in find_packages(folder))
    return names


setup(packages=installed_packages(), package_dir=MAPPING, ext_modules=[JPEG])

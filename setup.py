"""Package mapping; everything else is in pyproject.toml.

`kernels/` and `pipelines/` sit beside `fastdeit/` and are installed inside it,
so that nothing generic lands in site-packages.
"""

from setuptools import find_packages, setup

MAPPING = {"fastdeit": "fastdeit", "fastdeit.kernels": "kernels", "fastdeit.pipelines": "pipelines"}


def installed_packages() -> list[str]:
    names: list[str] = []
    for package, folder in MAPPING.items():
        names.append(package)
        names.extend(f"{package}.{sub}" for sub in find_packages(folder))
    return names


setup(packages=installed_packages(), package_dir=MAPPING)

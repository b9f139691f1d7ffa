"""Package mapping and the JPEG library; everything else is in pyproject.toml.

`kernels/` and `pipelines/` are folders beside `fastdeit/`, but are installed inside it, so that site-packages gets no
packages with such general names.
"""

import sysconfig

from setuptools import Extension, find_packages, setup

MAPPING = {"fastdeit": "fastdeit", "fastdeit.kernels": "kernels", "fastdeit.pipelines": "pipelines"}

# The library calls nothing of Python, so one wheel serves every version from 3.11. Free-threaded Pythons have no such
# wheels: each builds its own.
ABI3 = not sysconfig.get_config_var("Py_GIL_DISABLED")

# A shared library for ctypes, not a Python module. Optional: installation succeeds without a C compiler or
# libjpeg-turbo's headers, and the turbo loader then says what is missing.
JPEG = Extension(
    "fastdeit.pipelines.loaders._jpeg",
    ["pipelines/loaders/jpeg.c"],
    libraries=["jpeg"],
    optional=True,
    py_limited_api=ABI3,
)


def installed_packages() -> list[str]:
    names: list[str] = []
    for package, folder in MAPPING.items():
        names.append(package)
        names.extend(f"{package}.{sub}" for sub in find_packages(folder))
    return names


setup(
    packages=installed_packages(),
    package_dir=MAPPING,
    package_data={name: ["py.typed"] for name in MAPPING}
    | {"fastdeit.model": ["kernel_table.json"], "fastdeit.recipes": ["curves.json"]},
    include_package_data=False,  # otherwise jpeg.c would be installed, because the sdist has it
    ext_modules=[JPEG],
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if ABI3 else {},
)

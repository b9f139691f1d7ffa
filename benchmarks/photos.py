"""Photographs for the loader benchmark, cut from the wallpapers of Debian packages.

    apt-get install --no-install-recommends lomiri-wallpapers-16.04 mate-backgrounds plasma-workspace-wallpapers

Only detailed photographs of these packages are used (bookworm; 157 MB; CC-BY, CC-BY-SA, GPL-2+, see
/usr/share/doc/*/copyright). Each image is a random window of one, reduced to the size of a typical ImageNet image and
stored as a JPEG like ImageNet's. `photos.json` in the folder records the sources.
"""

import itertools
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL
from PIL import Image

from fastdeit.pipelines.errors import UserError
from fastdeit.pipelines.parsing import read_json

PACKAGES = {
    "lomiri-wallpapers-16.04": (
        "/usr/share/backgrounds/Dragonfly_by_Bolly.jpg",
        "/usr/share/backgrounds/Picture_0B_by_freespace.jpg",
        "/usr/share/backgrounds/Picture_1A_by_freespace.jpg",
        "/usr/share/backgrounds/aitzgorri_by_Aitzol_Berasategi.jpg",
        "/usr/share/backgrounds/friends_by_Aitzol_Berasategi.jpg",
        "/usr/share/backgrounds/life_by_Aitzol_Berasategi.jpg",
        "/usr/share/backgrounds/picosdeeuropa_by_Aitzol_Berasategi.jpg",
        "/usr/share/backgrounds/seeding_by_Clements_Engelhardt.jpg",
        "/usr/share/backgrounds/sunset_by_Aitzol_Berasategi.jpg",
    ),
    "mate-backgrounds": (
        "/usr/share/backgrounds/mate/nature/Dune.jpg",
        "/usr/share/backgrounds/mate/nature/GreenMeadow.jpg",
        "/usr/share/backgrounds/mate/nature/TwoWings.jpg",
    ),
    "plasma-workspace-wallpapers": (
        "/usr/share/wallpapers/BytheWater/contents/images/2560x1600.jpg",
        "/usr/share/wallpapers/ColdRipple/contents/images/2560x1600.jpg",
        "/usr/share/wallpapers/ColorfulCups/contents/images/2560x1600.jpg",
        "/usr/share/wallpapers/EveningGlow/contents/images/2560x1600.jpg",
        "/usr/share/wallpapers/FallenLeaf/contents/images/2560x1600.jpg",
        "/usr/share/wallpapers/Grey/contents/images/2560x1600.jpg",
        "/usr/share/wallpapers/OneStandsOut/contents/images/2560x1600.jpg",
        "/usr/share/wallpapers/Path/contents/images/2560x1600.jpg",
    ),
}
_CLASSES = 10
_ATTEMPTS = 100  # windows to try for one image before giving up its source
_MIN_GRADIENT = 3.5  # mean difference of neighbouring pixels in grey levels; below it is sky or blur


def make_photos(
    folder: Path,
    count: int = 1000,
    *,
    size: tuple[int, int] = (500, 375),
    quality: int = 92,
    seed: int = 0,
    sources: Sequence[Path] | None = None,
) -> Path:
    """Write `count` JPEGs (4:2:0) of `size` (width, height) into an ImageFolder tree of ten classes in `folder`.

    The same sources, options and version of Pillow give the same bytes. Windows without texture are skipped and counted
    in `photos.json`. A folder that already holds these photographs is left unchanged.

    sources  image files to cut from; default: those of the Debian packages above

    Raises UserError naming missing packages, and if a source is smaller than `size` or has no texture, or the folder
    holds something else.
    """
    files = debian_photographs() if sources is None else list(sources)
    wanted = {
        "count": count,
        "size": list(size),
        "quality": quality,
        "seed": seed,
        "pillow": PIL.__version__,
        "files": [str(path) for path in files],
    }
    record = folder / "photos.json"
    if record.exists():
        try:
            made = read_json(record)
        except ValueError as error:
            raise UserError(f"{record} is not JSON ({error}): remove {folder} or name another folder") from error
        if isinstance(made, dict) and {name: made.get(name) for name in wanted} == wanted:
            return folder
        raise UserError(f"{folder} holds other photographs (see {record}): remove it or name another folder")
    for label in range(_CLASSES):
        (folder / f"class{label}").mkdir(parents=True, exist_ok=True)
    skipped = 0
    for number, path in enumerate(files):
        with Image.open(path) as opened:
            photograph = opened.convert("RGB")
        if photograph.width < size[0] or photograph.height < size[1]:
            raise UserError(
                f"{path}: {photograph.width} x {photograph.height} pixels, smaller than {size}: leave it out"
            )
        rng = np.random.default_rng([seed, number])
        for image in range(number, count, len(files)):
            window, empty = _cut(photograph, size, rng, path)
            skipped += empty
            # Put half of a source's images in one class and half in the next: no class may be a single picture.
            label = (number + image // len(files) % 2) % _CLASSES
            window.save(folder / f"class{label}" / f"{image:05d}.jpg", quality=quality, subsampling="4:2:0")
    packages = list(PACKAGES) if sources is None else None
    made = {**wanted, "packages": packages, "windows_passed_over": skipped}
    record.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    return folder


def shrink_photos(source: Path, dest: Path, side: int, *, quality: int = 92) -> int:
    """Copy the JPEGs of the ImageFolder tree `source` to a new `dest`, their longest side reduced to `side` pixels.

    Smaller images are copied unchanged; returns their number.
    """
    unchanged = 0
    for path in sorted(source.glob("*/*.jpg")):
        target = dest / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(path) as image:
            scale = side / max(image.size)
            if scale >= 1:
                shutil.copyfile(path, target)
                unchanged += 1
                continue
            size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
            reduced = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
        reduced.save(target, quality=quality, subsampling="4:2:0")
    return unchanged


def prepare_photos(folder: Path) -> list[Path]:
    """The JPEG files in `folder`, made first if it does not exist. Raises UserError if it holds none."""
    if not folder.exists():
        print(f"{folder}: cutting photographs, once; this takes some minutes", flush=True)
        make_photos(folder)
    photos = sorted(folder.glob("*/*.jpg"))
    if not photos:
        raise UserError(f"--photos {folder}: no JPEG files in its class folders; name another, or one to be made")
    return photos


def copy_photos(source: Path, dest: Path, count: int) -> Path:
    """Write `count` files to a new ImageFolder tree `dest`: copies of the JPEGs of `source`."""
    files = sorted(source.glob("*/*.jpg"))
    for number, path in enumerate(itertools.islice(itertools.cycle(files), count)):
        target = dest / path.parent.name / f"{path.stem}-{number // len(files)}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    return dest


def debian_photographs() -> list[Path]:
    """The photographs of `PACKAGES`. Raises UserError naming the packages to install."""
    missing = [name for name, files in PACKAGES.items() if not all(Path(file).exists() for file in files)]
    if missing:
        raise UserError(
            f"photographs to cut from are missing: apt-get install --no-install-recommends {' '.join(missing)}"
        )
    return [Path(file) for files in PACKAGES.values() for file in files]


def _cut(
    photograph: Image.Image, size: tuple[int, int], rng: np.random.Generator, path: Path
) -> tuple[Image.Image, int]:
    """A random window with texture, reduced to `size`, and the number of windows skipped for lack of it."""
    largest = min(photograph.width / size[0], photograph.height / size[1])
    for attempt in range(_ATTEMPTS):
        scale = rng.uniform(1.0, largest)
        width, height = round(size[0] * scale), round(size[1] * scale)
        left = int(rng.integers(photograph.width - width + 1))
        top = int(rng.integers(photograph.height - height + 1))
        box = (left, top, left + width, top + height)
        window = photograph.resize(size, Image.Resampling.LANCZOS, box=box)
        grey = np.asarray(window.convert("L"), np.float32)
        if (np.abs(np.diff(grey, axis=0)).mean() + np.abs(np.diff(grey, axis=1)).mean()) / 2 >= _MIN_GRADIENT:
            return window, attempt
    raise UserError(f"{path}: {_ATTEMPTS} windows in a row without texture: leave it out")

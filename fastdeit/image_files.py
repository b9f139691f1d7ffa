"""Image files as batches of tensors, read by worker processes; a bad one costs only itself."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastdeit.pipelines.conversion.encode import decode
from fastdeit.pipelines.errors import os_sentence
from fastdeit.pipelines.loaders.prefetch import usable_cores
from fastdeit.pipelines.sources.base import read_image


class ImageFile(NamedTuple):
    """A file's path, and its `image` (3, S, S) float32 or the `fault` that keeps it from being read."""

    path: Path
    image: Tensor | None
    fault: str | None


class _Files(Dataset[ImageFile]):
    def __init__(self, paths: Sequence[Path], transform: Callable[[Image.Image], Tensor]) -> None:
        self._paths, self._transform = paths, transform

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> ImageFile:
        path = self._paths[index]
        try:
            return ImageFile(path, self._transform(decode(read_image(path))), None)
        except UnidentifiedImageError:
            fault = "it is not an image of a format that is read here"
        except Exception as error:  # Pillow raises almost anything on a damaged file
            fault = (isinstance(error, OSError) and os_sentence(error)) or str(error) or repr(error)
        return ImageFile(path, None, f"{path}: cannot be read: {fault.removeprefix(f'{path}: ')}")


def read_batches(
    paths: Sequence[Path], transform: Callable[[Image.Image], Tensor], *, batch: int, workers: int
) -> Iterator[list[ImageFile]]:
    """The files in batches, in order; `transform` is that of `loading.Loaded`.

    workers  processes that read ahead, one a core at most; a list that fits two batches is read without
    """
    several = min(workers, usable_cores()) if len(paths) > 2 * batch else 0
    yield from DataLoader(_Files(paths, transform), batch_size=batch, num_workers=several, collate_fn=list)

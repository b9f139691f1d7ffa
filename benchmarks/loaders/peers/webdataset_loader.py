"""The `webdataset` package: tar shards of the same JPEG files, timm's transforms, worker processes."""

import tarfile
from pathlib import Path

from benchmarks.loaders.peers.stream import Setting, Stream, need
from benchmarks.loaders.peers.timm_loader import POSTERIZE_REMARK, mixed, transform

_BUFFER = 1000  # samples a worker shuffles among


def webdataset(setting: Setting) -> Stream:
    """Shards drawn with replacement, as the package's own examples train; Mixup and CutMix in the consumer."""
    need("webdataset", "pip install 'fastdeit[peers]'")
    from webdataset.compat import WebDataset, WebLoader

    shards = _write_shards(setting)
    samples = (
        WebDataset(shards, resampled=True, shardshuffle=False)
        .shuffle(_BUFFER)
        .decode("pilrgb")
        .to_tuple("jpg", "cls")
        .map_tuple(transform(), int)
        .batched(setting.batch, partial=False)
    )
    loader = WebLoader(samples, batch_size=None, num_workers=setting.threads)
    return Stream(mixed(loader), 2 * setting.threads, (POSTERIZE_REMARK, "shards are drawn with replacement"))


def _write_shards(setting: Setting) -> list[str]:
    """The photographs as tar files, four a worker."""
    files = sorted(Path(setting.photos).glob("*/*.jpg"))
    folders = sorted({path.parent for path in files})
    count = min(4 * setting.threads, len(files))
    shards = []
    for shard in range(count):
        path = Path(setting.scratch) / f"{shard:04d}.tar"
        shards.append(str(path))
        with tarfile.open(path, "w") as tar:
            for file in files[shard::count]:
                label = Path(setting.scratch) / "label"
                label.write_text(str(folders.index(file.parent)))
                name = f"{file.parent.name}_{file.stem}"
                tar.add(file, f"{name}.jpg")
                tar.add(label, f"{name}.cls")
    return shards

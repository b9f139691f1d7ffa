"""The order of an epoch: which samples make up which step, for every rank, without state.

A global batch is cut into mixing groups of `group_size` samples. A rank owns whole, consecutive groups, so a change of
world size moves samples between processes and changes nothing else. The epoch is one flat list in which every selected
image appears `repeats` times in a row (Hoffer et al., "Augment your batch"; paper, section 6). Each step takes the next
`global_batch` entries. Within a step, neighbouring entries go to neighbouring groups,

- `placement="spread"`: of the whole batch, as in the released sampler;
- `placement="local"`: of a cell of `cell_groups` consecutive groups, so that a rank that owns whole cells
  decodes each of its images once.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from fastdeit.pipelines.errors import UserError
from fastdeit.pipelines.jit import compiled
from fastdeit.pipelines.plan.philox import ORDER, Word, check_seed, philox


@dataclass(frozen=True)
class StepSamples:
    """The samples of one step of one rank.

    epoch, step           counted from 0
    index     (B,) int64  dataset index
    repeat    (B,) int32  which copy of the image, 0 to repeats - 1
    position  (B,) int64  place in the global batch, the same on every world size
    group     (B,) int32  mixing group within the rank
    first_group           number of the rank's first group within the global batch
    """

    epoch: int
    step: int
    index: np.ndarray
    repeat: np.ndarray
    position: np.ndarray
    group: np.ndarray
    first_group: int


class Order(Protocol):
    """Random access to the steps of an epoch."""

    @property
    def steps(self) -> int: ...

    def step(self, epoch: int, step: int) -> StepSamples: ...


class EpochOrder:
    """Training order: a fresh permutation each epoch, with repeated augmentation, on any world size.

    images          number of images in the data set; or the dataset indices of those to use
    global_batch    samples per step over all ranks
    group_size      samples that mix among themselves (paper: 64, its batch per GPU); 0: a rank's whole batch;
                    never more than the global batch
    cell_groups     placement "local": the copies of an image stay within so many groups; rounded down to a divisor
                    of the number of groups
    epoch_multiple  the samples of an epoch are cut to a multiple of this; 0: of the global batch
    order_seed      "seed_and_epoch", or "epoch": torch.randperm seeded by the epoch alone, as released

    Raises UserError where the batch cannot be divided as asked, or the data set is smaller than one batch.
    """

    def __init__(
        self,
        images: int | np.ndarray,
        *,
        global_batch: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        repeats: int = 3,
        group_size: int = 64,
        placement: Literal["local", "spread"] = "local",
        cell_groups: int = 4,
        epoch_multiple: int = 0,
        order_seed: Literal["seed_and_epoch", "epoch"] = "seed_and_epoch",
    ) -> None:
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} is not in a world of {world}")
        if repeats < 1:
            raise UserError(f"repeats is {repeats}: it must be at least 1")
        if global_batch % world:
            raise UserError(
                f"run.global_batch {global_batch} is not a multiple of the {world} processes: change either"
            )
        self._images = images if isinstance(images, np.ndarray) else None
        length = len(self._images) if self._images is not None else int(images)
        self.length, self.global_batch, self.repeats = length, global_batch, repeats
        self.seed, self.rank, self.world, self.order_seed = check_seed(seed), rank, world, order_seed
        self.group_size = min(group_size, global_batch) if group_size else global_batch // world
        if global_batch % self.group_size or (global_batch // self.group_size) % world:
            raise UserError(
                f"run.global_batch {global_batch} does not make whole mixing groups of {self.group_size} on each "
                f"of {world} processes: use a global batch that is a multiple of {self.group_size * world}, "
                f"or another departures.mix_group"
            )
        self.groups = global_batch // self.group_size
        if placement == "local":
            self.cell = max(d for d in range(1, min(cell_groups, self.groups) + 1) if self.groups % d == 0)
        else:
            self.cell = self.groups
        multiple = epoch_multiple or global_batch
        self.steps = length // multiple * multiple // global_batch
        if self.steps == 0:
            cut = f" after cutting to a multiple of {multiple} (departures.epoch_multiple)" if epoch_multiple else ""
            raise UserError(
                f"there are {length} images to train on{cut}, fewer than a global batch of {global_batch}: "
                f"lower run.global_batch"
            )
        if length >= 2**32:
            raise UserError(f"{length} images: an index must fit in 32 bits")
        self._permutations: dict[int, np.ndarray] = {}

    @property
    def rank_batch(self) -> int:
        """Samples per step of one rank."""
        return self.global_batch // self.world

    def permutation(self, epoch: int) -> np.ndarray:
        """The dataset indices in the order of `epoch`, (length,) int64."""
        if epoch not in self._permutations:
            if len(self._permutations) >= 2:
                self._permutations.pop(next(iter(self._permutations)))
            if self.order_seed == "epoch":
                import torch  # imported here, so that a wrong batch size is an error before PyTorch loads

                generator = torch.Generator().manual_seed(epoch)
                order = torch.randperm(self.length, generator=generator).numpy()
            else:
                order = np.argsort(_order_keys(np.uint64(self.seed), epoch, self.length), kind="stable")
            self._permutations[epoch] = order if self._images is None else self._images[order]
        return self._permutations[epoch]

    def step(self, epoch: int, step: int) -> StepSamples:
        """Samples of `step` of `epoch` on this rank. Raises IndexError outside the epoch."""
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} of an epoch of {self.steps} steps")
        start = self.rank * self.rank_batch
        position = np.arange(start, start + self.rank_batch, dtype=np.int64)
        group, slot = np.divmod(position, self.group_size)
        cell, lane = np.divmod(group, self.cell)
        entry = step * self.global_batch + (cell * self.group_size + slot) * self.cell + lane
        # Each image fills `repeats` neighbouring entries of the flat list.
        place, repeat = np.divmod(entry, self.repeats)
        first_group = start // self.group_size
        return StepSamples(
            epoch=epoch,
            step=step,
            index=self.permutation(epoch)[place].astype(np.int64),
            repeat=repeat.astype(np.int32),
            position=position,
            group=(group - first_group).astype(np.int32),
            first_group=first_group,
        )


class EvalOrder:
    """Evaluation order: the stored order, every image on exactly one rank, no padding.

    images      those of `EpochOrder`
    batch       samples per step of a rank; the last step of a rank may be smaller or empty
    replicate   every rank sees every image, as the released code does
    """

    def __init__(
        self, images: int | np.ndarray, *, batch: int, rank: int = 0, world: int = 1, replicate: bool = False
    ) -> None:
        self._index = images if isinstance(images, np.ndarray) else np.arange(images, dtype=np.int64)
        if not replicate:
            self._index = self._index[rank::world]
        self._batch = batch

    @property
    def steps(self) -> int:
        return -(-len(self._index) // self._batch)

    def step(self, epoch: int, step: int) -> StepSamples:
        """Samples of `step`, the same in every epoch."""
        start = step * self._batch
        index = self._index[start : start + self._batch]
        if start < 0 or len(index) == 0:
            raise IndexError(f"step {step} of an evaluation of {self.steps} steps")
        return plain_samples(index, epoch, step)


def plain_samples(index: np.ndarray, epoch: int = 0, step: int = 0) -> StepSamples:
    """The images `index` (B,) int64, one copy each, in one group."""
    zeros = np.zeros(len(index), dtype=np.int32)
    return StepSamples(epoch=epoch, step=step, index=index, repeat=zeros, position=index, group=zeros, first_group=0)


@compiled
def _order_keys(seed: Word, epoch: int, length: int) -> np.ndarray:
    """(length,) uint64 sort keys; sorting them gives the epoch's permutation."""
    keys = np.empty(length, np.uint64)
    for i in range(length):
        a, b, _, _ = philox(seed, i, 0, epoch, ORDER)
        keys[i] = (np.uint64(a) << np.uint64(32)) | np.uint64(b)
    return keys

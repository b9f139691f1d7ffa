"""`python -m benchmarks NAME [options]`: the benchmarks by name; `--help` after a name tells its options."""

from __future__ import annotations

import importlib
import sys

from fastdeit.cli import run

COMMANDS = {
    "throughput": "images per second of the model, inference and training step, beside timm's",
    "loaders": "training batches per second from JPEG files, beside those of the peers",
    "fuzz": "damaged images and containers through convert, verify and load",
    "soak": "an hour of epochs with flat memory, descriptors and threads",
    "gpu": "every check and figure that needs a GPU, in eight minutes",
    "kernels": "time of every kernel on a GPU, beside every alternative, with the roof",
    "tune": "search for faster launches of the kernels on a GPU",
    "convert": "images per second into both formats, beside FFCV's writer and wds2idx",
    "contact_sheet": "every operation of RandAugment beside Pillow, as a picture",
    "compiled": "registers, shared memory and instructions of every kernel, without a GPU",
    "tables": "the results as Markdown",
}


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in COMMANDS:
        print("usage: python -m benchmarks NAME [options]", *(f"  {n:15}{w}" for n, w in COMMANDS.items()), sep="\n")
        sys.exit(0 if name in ("-h", "--help") else 2)
    try:
        run(lambda: importlib.import_module(f"benchmarks.{name}").main(sys.argv[2:]))
    except ModuleNotFoundError as error:
        print(f"error: {error}, which `python -m benchmarks {name}` needs: install it with pip", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()

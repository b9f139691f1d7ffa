"""`python -m benchmarks NAME [options]`: run a benchmark; `--help` after its name lists its options."""

import importlib
import sys

from fastdeit.cli import run

COMMANDS = {  # module and one line of help
    "throughput": (
        "throughput.benchmark",
        "images per second of inference and training step, ours and timm's",
    ),
    "loaders": ("loaders.benchmark", "training batches per second from JPEG files, ours and the peers'"),
    "kernels": ("kernels.benchmark", "time of every kernel and its alternatives on a GPU, with the roof"),
    "tune": (
        "kernels.tune",
        "search for faster launches of the kernels on a GPU; --choose: find what PyTorch runs faster",
    ),
    "convert": ("convert.benchmark", "images per second into both formats, ours and FFCV's and wds2idx's"),
    "gpu": ("gpu", "every check and figure that needs a GPU, in five parts"),
    "roof": ("roof.benchmark", "predicted time of a training step by part, beside what was measured; needs no GPU"),
    "residual": ("residual", "accuracy with a residual stream in bf16 and in float32, on Fashion-MNIST; needs no GPU"),
    "findings": ("findings.benchmark", "which claims of the papers hold in small models, over seeds; needs no GPU"),
    "tables": ("tables", "the results as Markdown"),
}


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in COMMANDS:
        print(
            "usage: python -m benchmarks NAME [options]", *(f"  {n:15}{w}" for n, (_, w) in COMMANDS.items()), sep="\n"
        )
        sys.exit(0 if name in ("-h", "--help") else 2)
    module, _ = COMMANDS[name]
    try:
        run(lambda: importlib.import_module(f"benchmarks.{module}").main(sys.argv[2:]))
    except ModuleNotFoundError as error:
        print(f"error: {error}, which `python -m benchmarks {name}` needs: install it with pip", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()

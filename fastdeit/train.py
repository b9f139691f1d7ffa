"""`python -m fastdeit.train`: the `fastdeit-train` command, for torchrun."""

from fastdeit.commands.train import main

if __name__ == "__main__":
    main()

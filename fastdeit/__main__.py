"""`python -m fastdeit`: the `fastdeit` command, also for torchrun."""

from fastdeit.commands.main import main

if __name__ == "__main__":
    main()

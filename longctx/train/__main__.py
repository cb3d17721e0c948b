"""``torchrun -m longctx.train key=value ...``: one process of the trainer."""

from longctx.launcher.commands.train import main

if __name__ == "__main__":
    main()

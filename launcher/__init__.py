"""The outer shell: the command line, Hydra, process start-up, and the only reader of the environment."""

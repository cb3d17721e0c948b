"""Builds tables from closed forms and measurements of this project.

Each is a program of its own, so threads are set here, before one imports torch, which reads the settings then.
"""

from longctx.launcher.env import share_cores

share_cores(processes=1)

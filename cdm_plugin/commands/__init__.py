"""One module or folder a command of `cdm`; nothing imports them but the command line.

Each has `add_arguments(parser)` and `run(args)`, which returns the exit status or None for 0. The module of a command,
or its folder's `__init__`, imports the package only when it runs, so that its help is there at once.
"""

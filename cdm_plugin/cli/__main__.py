from . import script  # by either of its two names

script()

"""Methods: how components are found. One file is one method.

All of them load with the first, so that settings in files find methods and losses by the names of their classes.
"""

from tl_paramdecomp.methods import adversary, baselines, internals, l3d, losses, reconstruction, spd

__all__ = ["adversary", "baselines", "internals", "l3d", "losses", "reconstruction", "spd"]

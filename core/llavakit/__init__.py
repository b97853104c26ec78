"""LLaVA as a small core and a set of plugins. Names are loaded when they are first used.

The public names stand in `__init__.pyi`, once; `llavakit.contracts` is public, too.
"""

import lazy_loader

__version__ = "0.1.0"

# `llava-run --help` must not import torch
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

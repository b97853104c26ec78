"""Finds installed plugins and looks components up by name; what is public: `__init__.pyi`."""

import lazy_loader

# a command's entry point is found without pluggy and pydantic
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

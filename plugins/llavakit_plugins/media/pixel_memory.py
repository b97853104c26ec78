"""Gives the memory in which Pillow keeps an RGB image, without a copy.

Pillow hands it out through Arrow's C data interface: four bytes a pixel, of which the fourth means
nothing. https://arrow.apache.org/docs/format/CDataInterface.html
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL
from PIL import Image

_SHARES = tuple(map(int, PIL.__version__.split(".")[:2])) >= (11, 3)
"""Pillow 11.2 has the interface too, but never gives that memory back."""


class _Array(ctypes.Structure):
    """Arrow's `struct ArrowArray`."""


_Array._fields_ = [
    ("length", ctypes.c_int64),
    ("null_count", ctypes.c_int64),
    ("offset", ctypes.c_int64),
    ("n_buffers", ctypes.c_int64),
    ("n_children", ctypes.c_int64),
    ("buffers", ctypes.POINTER(ctypes.c_void_p)),
    ("children", ctypes.POINTER(ctypes.POINTER(_Array))),
    ("dictionary", ctypes.c_void_p),
    ("release", ctypes.c_void_p),
    ("private_data", ctypes.c_void_p),
]

_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)


def pixels_of(image: Image.Image) -> npt.NDArray[np.uint8]:
    """Return the bytes `[H, W, 4]` of an RGB image, or `[H, W, 3]`, copied, where Pillow must.

    They are for reading: what is written into them may be written into the image. They stay valid
    without the image.
    """
    if not _SHARES or image.mode != "RGB":
        return np.array(image)
    try:
        _, capsule = image.__arrow_c_array__()
    except ValueError:  # a large image, which Pillow keeps in several blocks
        return np.array(image)
    array = _Array.from_address(_pointer(capsule, b"arrow_array"))
    values = array.children[0].contents
    memory: Any = (ctypes.c_uint8 * values.length).from_address(values.buffers[1])
    memory.owner = capsule  # gives the memory back when nothing refers to it any more
    return np.frombuffer(memory, np.uint8).reshape(image.height, image.width, 4)

"""Reads NumPy's `.npz` files, checking each array before it takes memory."""

import math
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
from numpy.lib import format as npy

from xmixup_jax.errors import first_line

_MAX_GROWTH = 16  # largest ratio of the arrays' size to the file's


class NpzFileError(ValueError):
    """The file is corrupted or contains objects; says what is wrong."""


def read_npz_file(path: Path) -> dict[str, np.ndarray]:
    """Reads all arrays by their names. Dtype V2 is taken for bfloat16, as Google writes it.

    Raises:
      NpzFileError: the file is corrupted, contains objects, or would take too much memory.
      OSError: the file cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            items = [item for item in archive.infolist() if item.filename.endswith('.npy')]
            if sum(item.file_size for item in items) > _MAX_GROWTH * path.stat().st_size:
                raise NpzFileError('its arrays would take far more memory than the file has bytes')
            return {item.filename.removesuffix('.npy'): _array(archive, item) for item in items}
    except (OSError, NpzFileError):
        raise
    except Exception as error:  # a corrupted archive can raise nearly anything
        raise NpzFileError(
            f'it is corrupted or incomplete ({type(error).__name__}: {first_line(error)}): '
            'download or copy it again'
        ) from error


def _array(archive: zipfile.ZipFile, item: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(item) as file:
        version = npy.read_magic(file)
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, fortran, dtype = read(file)
        if dtype.hasobject:
            raise NpzFileError(f'its array {item.filename[:80]!r} contains objects, not numbers')
        raw = file.read()
    if any(size < 0 for size in shape) or math.prod(shape) * dtype.itemsize != len(raw):
        raise NpzFileError('an array is incomplete: download or copy it again')
    array = np.frombuffer(raw, dtype)
    array = array.reshape(shape[::-1]).T if fortran else array.reshape(shape)
    if dtype == np.dtype('V2'):
        array = array.view(ml_dtypes.bfloat16).astype(np.float32)
    return array

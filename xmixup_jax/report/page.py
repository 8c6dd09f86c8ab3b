"""Fills a template and writes one HTML file, with its pictures inside and all values escaped."""

import base64
from pathlib import Path
from typing import Any

import cv2
import jinja2
import numpy as np
import simplejpeg
from markupsafe import Markup

from xmixup_jax.files import atomic_write
from xmixup_jax.report import palette

THUMBNAIL = 96  # px, at most

templates = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
templates.globals['light'] = palette.properties(palette.LIGHT)
templates.globals['dark'] = palette.properties(palette.DARK)


def write(path: Path, template: str, **values: Any) -> None:
    """Fills a template of this folder. All values are escaped.

    Raises:
      OSError: the disk is full.
    """
    with atomic_write(path) as partial:
        text = templates.get_template(template).render(**values)
        # Names need not be valid Unicode.
        partial.write_bytes(text.encode('utf-8', 'backslashreplace'))


def image_uri(image: np.ndarray) -> str:
    """A thumbnail of uint8 RGB [S, S, 3] as a data URI."""
    if len(image) > THUMBNAIL:
        image = cv2.resize(image, (THUMBNAIL, THUMBNAIL), interpolation=cv2.INTER_AREA)
    encoded = simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality=88)
    return 'data:image/jpeg;base64,' + base64.b64encode(encoded).decode()


def figure_tag(document: str, description: str) -> Markup:
    """An <img> of an SVG document. Within an image its scripts do not run.

    Args:
      document: the SVG.
      description: the alternative text.
    """
    uri = (
        'data:image/svg+xml;base64,'
        + base64.b64encode(document.encode('utf-8', 'backslashreplace')).decode()
    )
    return Markup('<img class="plot" src="{}" alt="{}">').format(uri, description)

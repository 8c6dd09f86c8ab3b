"""Sphinx extension: formulas become MathML when the pages are built, so they need no script."""

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util import logging

log = logging.getLogger(__name__)


def _write(translator, node, block: bool) -> None:
    """Appends a formula to the page, or warns that docutils cannot translate it."""
    try:
        mathml = tex2mathml(node.astext(), as_block=block)
    except MathError as error:
        log.warning('%s in the formula %r', error, node.astext(), location=node)
    else:
        # A formula that is wider than the page scrolls, without moving the page.
        scrolling = f'<p style="overflow: auto hidden">{mathml}</p>'
        translator.body.append(scrolling if block else mathml)
    raise nodes.SkipNode


def setup(app):
    app.add_html_math_renderer(
        'mathml',
        inline_renderers=(lambda translator, node: _write(translator, node, False), None),
        block_renderers=(lambda translator, node: _write(translator, node, True), None),
    )
    return {'parallel_read_safe': True, 'parallel_write_safe': True}

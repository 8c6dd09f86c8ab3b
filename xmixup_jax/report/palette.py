"""The colours of all pages and plots, for light and dark screens."""

# Each colour is a CSS custom property of the same name. Text needs a contrast of 4.5 with what is
# behind it, lines and marks 3 (WCAG 2.2, 1.4.3 and 1.4.11); tests/test_palette.py computes both.
LIGHT = {
    'paper': '#ffffff',
    'panel': '#f4f4f5',  # behind code and the key facts
    'text': '#1c1c1e',
    'note': '#55585e',
    'link': '#0b57c2',
    'rule': '#dcdce0',  # decorative: borders and grid lines
    'axis': '#73767c',
    'target': '#1f5fa8',
    'source': '#b04310',
    'cell': '#9cc4ee',  # of a confusion matrix, behind text
}
DARK = {
    'paper': '#16181c',
    'panel': '#23262c',
    'text': '#e7e7ea',
    'note': '#a9adb6',
    'link': '#8ab4f8',
    'rule': '#3b3f47',
    'axis': '#8b8f98',
    'target': '#7fb2f0',
    'source': '#f0965f',
    'cell': '#2a5d96',
}
# The cells of a large confusion matrix are a picture, which has the same colour in both modes.
MATRIX = '#3b82d0'


def properties(colours: dict[str, str]) -> str:
    """Declares the colours as CSS custom properties.

    >>> properties({'text': '#000', 'paper': '#fff'})
    '--text: #000; --paper: #fff'
    """
    return '; '.join(f'--{name}: {colour}' for name, colour in colours.items())

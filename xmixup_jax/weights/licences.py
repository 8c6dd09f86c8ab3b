"""The licence of pre-trained weights, as far as somebody states one.

Nothing is guessed and nothing is downloaded: a licence comes from the metadata of an installed
package, or from the table below of what the authors say of weights on the Hugging Face Hub.
"""

import importlib.metadata
import re
from email.message import Message
from pathlib import Path
from typing import NamedTuple

from xmixup_jax.text import one_line
from xmixup_jax.weights.find import split_entry


class Licence(NamedTuple):
    """Under which licence weights are, and who says so."""

    weights: str
    """What they are called: without the folders of a file on this machine."""
    identifier: str
    """As on the Hugging Face Hub, such as 'apache-2.0'; '' where it is not known."""
    statement: str
    """The same in Markdown, one or more sentences, with a link."""
    on_hub: bool = False
    """Whether `weights` is a name on the Hugging Face Hub."""


# Names on the Hub, by a pattern: the identifier, and who says so.
_STATED = {
    r'timm/resnet(18|34|50|101)\.tv2?_in1k': (
        'bsd-3-clause',
        'BSD-3-Clause, the licence of [torchvision](https://github.com/pytorch/vision), whose '
        'weights these are. torchvision adds that pre-trained weights may have terms of their own '
        'that derive from their training data.',
    ),
    r'timm/resnet(18|34|50|101)d?\.(a1h?|a[23m]|b[12]k|bt|c[12]|d|ra[2m]?|ra4_e3600_r224)_in1k': (
        'apache-2.0',
        'Apache-2.0, as timm states. timm adds that one should assume that the licence of the '
        'training data applies to the weights '
        '([licences](https://github.com/huggingface/pytorch-image-models#licenses)).',
    ),
    r'timm/resnet(18|50)\.fb_(ssl|swsl)_\w+': (
        'cc-by-nc-4.0',
        'CC-BY-NC 4.0, **not for commercial use**, by their '
        '[authors](https://github.com/facebookresearch/semi-supervised-ImageNet1K-models).',
    ),
    r'timm/vit_\w+\.augreg(_in1k|_in21k|2?_in21k_ft_in1k)': (
        'apache-2.0',
        'Apache-2.0, as timm states, and the licence of the '
        '[authors\' repository](https://github.com/google-research/vision_transformer).',
    ),
    r'timm/vit_\w+_dinov2\.lvd142m|facebook/dinov2-(with-registers-)?(small|base|large)': (
        'apache-2.0',
        'Apache-2.0 for code and weights, by their '
        '[authors](https://github.com/facebookresearch/dinov2#license).',
    ),
    r'timm/vit_\w+_clip_\w*224\.openai|openai/clip-vit-(base-patch16|base-patch32|large-patch14)': (
        'mit',
        'MIT, the licence of the [authors\' repository](https://github.com/openai/CLIP), which '
        'names no other for the weights; timm states Apache-2.0 for its copy. The authors\' model '
        'card calls any deployed use out of scope.',
    ),
}  # fmt: skip

# What packages call the licences, and their identifiers on the Hub.
_IDENTIFIERS = {
    'Apache-2.0': 'apache-2.0',
    'Apache License 2.0': 'apache-2.0',
    'Apache Software License 2.0': 'apache-2.0',
    'MIT': 'mit',
    'MIT License': 'mit',
    'BSD-3-Clause': 'bsd-3-clause',
    'BSD 3-Clause License': 'bsd-3-clause',
}
_CLASSIFIER = 'License :: '
_LINE = 80  # characters of a licence's name that are shown
_UNKNOWN = 'Unknown: check it where you got the weights.'


def licence_of(weights: str) -> Licence:
    """The licence of the weights that a run began with.

    Args:
      weights: config.weights, neither '' nor 'source'.

    >>> licence_of('timm/resnet50.tv_in1k').identifier
    'bsd-3-clause'
    >>> licence_of('/home/me/weights.pth')[:3]
    ('weights.pth', '', 'Unknown: check it where you got the weights.')
    """
    place, entry = split_entry(Path(weights).expanduser())
    name = str(place)
    ending = f'#{entry}' if entry else ''
    if not place.exists():
        for pattern, (identifier, statement) in _STATED.items():
            if re.fullmatch(pattern, name):
                return Licence(name + ending, identifier, statement, on_hub=True)
        if re.fullmatch(r'[\w.-]+', name):
            return _of_package(name, ending)
        if re.fullmatch(r'[\w-][\w.-]*/[\w.-]+', name):
            return Licence(name + ending, '', _page(name), name.startswith('timm/'))
    return Licence(one_line(place.name) + ending, '', _UNKNOWN)


def _page(name: str) -> str:
    return (
        'Unknown here: if they came from the Hugging Face Hub, see '
        f'[their page](https://huggingface.co/{name}).'
    )


def _of_package(name: str, ending: str) -> Licence:
    """What the metadata of an installed package say, from the most to the least exact."""
    try:
        package = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return Licence(name + ending, '', _UNKNOWN)
    metadata = package.metadata
    assert isinstance(metadata, Message)
    classifiers = [
        each.removeprefix(_CLASSIFIER)
        for each in metadata.get_all('Classifier', [])
        if each.startswith(_CLASSIFIER)
    ]
    fields = [metadata.get('License-Expression'), metadata.get('License'), *classifiers]
    stated = [each.strip().splitlines()[0] for each in fields if each and each.strip()]
    stated = [each for each in stated if each.upper() != 'UNKNOWN']
    who = f'by the metadata of the package `{name}` {package.version}'
    if not stated:
        stated = _first_lines(package)
        who = f'by the licence file of the package `{name}` {package.version}'
    if not stated:
        return Licence(name + ending, '', _UNKNOWN)
    said = one_line(stated[0])[:_LINE]
    return Licence(name + ending, _IDENTIFIERS.get(said, ''), f'"{said}", {who}.')


def _first_lines(package: importlib.metadata.Distribution) -> list[str]:
    """The first line of each licence file that the package brings."""
    found = []
    for file in package.files or []:
        if re.match(r'(LICEN[CS]E|COPYING)', file.name, re.IGNORECASE):
            lines = (
                Path(str(file.locate())).read_text(encoding='utf-8', errors='replace').split('\n')
            )
            found += [line.strip() for line in lines if line.strip()][:1]
    return found

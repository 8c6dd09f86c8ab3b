"""The model card of an exported network: Markdown in the format of the Hugging Face Hub.

`card` turns facts into text and reads no file; `facts.read_run` finds them in the folder of a run.
The card says nothing that the folder does not say. Data sets and weights go by their last name,
without the folders that they are in.
"""

from collections.abc import Sequence
from pathlib import Path

import jinja2
from huggingface_hub import EvalResult, ModelCardData
from ml_collections import ConfigDict

from xmixup_jax.compute.augment import normalization
from xmixup_jax.config import is_probe
from xmixup_jax.data.names import readable
from xmixup_jax.data.sources import short_name
from xmixup_jax.methods.find import method_name, options_of
from xmixup_jax.models import MODELS
from xmixup_jax.report.facts import RunFacts, interval, is_of_final, scores_of
from xmixup_jax.report.papers import XMIXUP, reference
from xmixup_jax.text import first_few, one_line
from xmixup_jax.weights.licences import Licence

MARK = (
    '<!-- Written by xmixup export. If you edit this card, remove this line: the command then does '
    'not overwrite it. -->'
)
ROWS = 50  # of the table of the classes
_SHARES = ('precision', 'recall', 'f1')  # columns of it
_NAMES = 100  # class names that are listed
_FEW = 10  # fewer images of a class are worth a warning
_LIBRARIES = {'onnx': 'onnx', 'stablehlo': 'jax'}  # that load the file; else this program
_FITS = {
    'crop': 'the middle square of the image, scaled',
    'pad': 'the whole image, scaled, on a black square',
    'squash': 'the whole image, scaled to a square whatever its shape',
}
_PARTS = {'target': 'training', 'validation': 'validation', 'test': 'test', 'source': 'source'}


def card(
    config: ConfigDict,
    class_names: Sequence[str],
    network: str,
    run: RunFacts | None,
    licence: Licence | None,
    form: str,
    file: str,
    version: str,
) -> str:
    """The card of an exported network.

    Args:
      config: of the run.
      class_names: in the order of the logits.
      network: one of `predictor.NETWORKS`.
      run: None for a network whose run is not at hand.
      licence: of the weights that the run began with; None for random ones and for those that it
        trained itself.
      form: the format of the export.
      file: the name of the exported file, without its folder.
      version: of this program.
    """
    names = readable(class_names)
    scores = {} if run is None else scores_of(run, network)
    mean, std = normalization(config.model)
    method = method_name(config.method)
    limits = _limits(config, names, network, run, scores, form)
    return _template().render(
        metadata=_metadata(config, run, scores, licence, form),
        mark=MARK,
        target=_target(config, run),
        method=method,
        title='linear probe' if is_probe(config) else method,
        probe=is_probe(config),
        model=config.model.name,
        names=names[:_NAMES],
        class_count=len(names),
        form=form,
        file=file,
        version=version,
        data=[] if run is None else _data(config, run),
        training=_training(config, run, licence),
        scores=_score_rows(scores, run, network),
        rows=_class_rows(run, names) if is_of_final(run, network) else [],
        all_rows=len(run.rows) if run else 0,
        config=config,
        fit=_FITS[config.fit],
        mean=mean,
        std=std,
        limits=limits,
        licence=licence,
        reference=reference(method),
        bibtex=XMIXUP if method == 'xmixup' else '',
    )


def _code(name: object) -> str:
    """A name from outside as a span of code; it cannot end the span or the line."""
    text = one_line(name)
    fence = '`'
    while fence in text:
        fence += '`'
    padding = ' ' if '`' in text else ''
    return f'{fence}{padding}{text}{padding}{fence}'


def _cell(name: object) -> str:
    """The same in a table, where a bar would end the cell."""
    return _code(name).replace('|', '\\|')


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=False,  # noqa: S701  (it is no HTML; `code` and `cell` escape for Markdown)
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {'code': _code, 'cell': _cell, 'literal': repr}
    return environment.get_template('card.md.jinja')


def _target(config: ConfigDict, run: RunFacts | None) -> str:
    used = run.result.get('data', {}).get('target') if run else None
    return short_name(used['data'] if used else config.target.name)


def _metadata(
    config: ConfigDict,
    run: RunFacts | None,
    scores: dict[str, float],
    licence: Licence | None,
    form: str,
) -> str:
    """The YAML at the top, as huggingface_hub writes it."""
    target = one_line(_target(config, run))
    method = method_name(config.method)
    kinds = {'folder': 'imagefolder', 'csv': 'csv'}
    metrics = {
        'top1': ('accuracy', 'top-1 accuracy'),
        'top5': ('accuracy', 'top-5 accuracy'),
        'macro_f1': ('f1', 'macro F1'),
    }
    results = [
        EvalResult(
            task_type='image-classification',
            dataset_type=kinds.get(config.target.name.partition(':')[0], target),
            dataset_name=target,
            dataset_split=config.target.test_split,
            metric_type=kind,
            metric_name=words,
            metric_value=scores[key],
        )
        for key, (kind, words) in metrics.items()
        if key in scores
    ]
    return ModelCardData(
        license=licence.identifier if licence and licence.identifier else 'unknown',
        library_name=_LIBRARIES.get(form, 'xmixup-jax'),
        pipeline_tag='image-classification',
        base_model=licence.weights.partition('#')[0] if licence and licence.on_hub else None,
        tags=['image-classification', 'transfer-learning', 'jax', method],
        datasets=[target],
        metrics=sorted({each.metric_type for each in results}) or None,
        model_name=f'{target}-{config.model.name}-{method}',
        eval_results=results or None,
    ).to_yaml()


def _score_rows(
    scores: dict[str, float], run: RunFacts | None, network: str
) -> list[tuple[str, str]]:
    if run is None or 'top1' not in scores:
        return []
    words = {
        'top1': 'top-1 accuracy',
        'top5': 'top-5 accuracy',
        'macro_top1': 'mean of the classes\' accuracies',
        'macro_f1': 'macro F1',
        'ece': 'expected calibration error',
    }  # fmt: skip
    rows = [(words[key], f'{100 * scores[key]:.2f} %') for key in words if key in scores]
    images = run.result['test_images']
    rows.insert(1, ('its 95 % interval (Wilson)', interval(scores['top1'], images)))
    rows += [('cross-entropy', f'{scores["loss"]:.4f}')] if 'loss' in scores else []
    return [('test images', f'{images:,}'), *rows]


def _data(config: ConfigDict, run: RunFacts) -> list[tuple[str, str, str, str, str]]:
    """(part, data set, split, images, images of a class) of each part that was used."""
    target, source = config.target, config.source
    rest = target.test_split == 'rest'
    splits = {
        'target': target.split,
        'validation': f'a part of {target.split!r}',
        'test': f'the rest of {target.split!r}' if rest else target.test_split,
        'source': source.split,
    }
    used = run.result.get('data', {})
    rows = []
    for part, words in _PARTS.items():
        counts = run.counts.get(part)
        if not counts:
            continue
        name = (source if part == 'source' else target).name
        name = short_name(used[part]['data'] if part in used else name)
        notes = [*used.get(part, {}).get('notes', []), *_drawn(config, part)]
        images = '; '.join([f'{sum(counts):,}', *map(one_line, notes)])
        least, most = min(counts), max(counts)
        each = f'{least}' if least == most else f'{least} to {most}'
        rows.append((words, name, splits[part] or 'all images', images, each))
    return rows


def _drawn(config: ConfigDict, part: str) -> list[str]:
    """How few-shot selection chose the images of a part."""
    if part not in ('target', 'source'):
        return []
    dataset = config[part]
    if dataset.shots:
        return [f'{dataset.shots} of each class, drawn by the seed']
    if dataset.sample_rate != 1:
        return [f'{100 * dataset.sample_rate:g} % of each class, drawn by the seed']
    return []


def _training(
    config: ConfigDict, run: RunFacts | None, licence: Licence | None
) -> list[tuple[str, str]]:
    """What was done to train the network, a row each."""
    method, o = method_name(config.method), config.optimizer
    options = [
        f'{method}.{key}={value}'
        for key, value in options_of(config).items()
        if '/' not in str(value)  # a path in an option of somebody's own method
    ]
    if licence is not None:
        began = licence.weights
    elif config.weights == 'source':
        began = f'trained on {short_name(config.source.name)}, {config.pretrain.steps} steps'
    else:
        began = 'random'
    rows = [
        ('method', 'linear probe' if is_probe(config) else ' '.join([method, *options])),
        ('network', config.model.name),
        ('weights at the start', began),
        ('seed', str(config.seed)),
    ]
    if not is_probe(config):
        head = 'a linear classifier' if config.get('warm_head') else f'random ({config.head_init})'
        rows += [('head at the start', head), ('images', _augmentation(config))]
        rows += [('kept as it was', config.freeze)] if config.freeze else []
        steps = config.steps if run is None else run.result['steps']
        of = f' of {config.steps}' if steps != config.steps else ''
        rows += [
            ('steps', f'{steps}{of}, of {config.batch_size} images'),
            ('optimiser', f'{o.name}, learning rate {o.learning_rate:g}, {o.schedule}'),
            ('precision', config.precision),
        ]
        if MODELS[config.model.name].has_batch_norm:
            rows.append(('batch norm', config.batch_norm))
    if run is None:
        return rows
    where, versions = run.environment, run.environment.get('versions', {})
    used = [('python', where.get('python')), *versions.items()]
    rows += [
        ('devices', run.result.get('devices')),
        ('commit of xmixup-jax', run.result.get('commit')),
        ('versions', ', '.join(f'{name} {value}' for name, value in used if value)),
    ]
    return [(what, value) for what, value in rows if value]


def _augmentation(config: ConfigDict) -> str:
    """What training does to an image."""
    augment = config.augment
    parts = [f'random crops of {config.image_size} px from {config.resize} px']
    if config.crop_min_area:
        parts.append(f'of at least {100 * config.crop_min_area:g} % of the area')
    parts += ['mirrored at random'] if config.flip else []
    parts += [augment.policy] if augment.policy else []
    parts += [f'colour jitter {augment.color_jitter:g}'] if augment.color_jitter else []
    parts += [f'erasing {augment.erasing:g}'] if augment.erasing else []
    return ', '.join(parts)


def _class_rows(run: RunFacts | None, names: Sequence[str]) -> list[dict[str, str]]:
    """At most `ROWS` classes, those with the lowest F1, in the order of the logits."""
    if run is None or len(run.rows) != len(names):
        return []
    trained = run.counts.get('target', [''] * len(names))
    rows = [
        row | {'trained': str(n)} | {key: f'{float(row[key]):.3f}' for key in _SHARES}
        for row, n in zip(run.rows, trained, strict=True)
    ]
    worst = sorted(range(len(rows)), key=lambda c: float(run.rows[c]['f1']))[:ROWS]
    return [rows[c] for c in sorted(worst)]


def _limits(
    config: ConfigDict,
    names: Sequence[str],
    network: str,
    run: RunFacts | None,
    scores: dict[str, float],
    form: str,
) -> list[str]:
    """What follows from the facts for whoever uses the network; Markdown."""
    limits = [
        f'Every image gets one of these {len(names)} classes: there is none for anything else.'
    ]
    if run is None:
        return [*limits, 'The results of its run were not at hand: this card has no scores.']
    if 'top1' not in scores:
        limits.append('It was not tested: this card has no scores.')
    else:
        images = run.result['test_images']
        limits.append(
            f'The accuracy was measured on {images:,} images. Its 95 % interval, '
            f'{interval(scores["top1"], images)}, covers the choice of these images, not that of '
            'the seed and the training images: it is one run.'
        )
        limits.append('This card has no test on images from elsewhere.')
    if network == 'best' and not is_of_final(run, network):
        limits.append(
            'It was chosen among several by its accuracy on the test images, which is therefore '
            'higher than on new images.'
        )
    for part, words in (('target', 'training'), ('test', 'test')):
        few = [names[c] for c, n in enumerate(run.counts.get(part, [])) if n < _FEW]
        if few and 'top1' in scores:
            limits.append(
                f'{len(few)} of {len(names)} classes have fewer than {_FEW} {words} images '
                f'({first_few(list(map(_code, few)))}).'
            )
    if 'stopped_of' in run.result:
        limits.append('Its training was stopped before its end.')
    if config.test_views > 1 and 'top1' in scores and form != 'safetensors':
        limits.append(
            f'The scores average {config.test_views} views of an image; the exported network sees '
            'one, for which they may be lower.'
        )
    if config.precision != 'float32' and 'top1' in scores:
        limits.append(f'It was tested in {config.precision}, and is exported in float32.')
    return limits

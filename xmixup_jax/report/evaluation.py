"""Writes report.html of a test on other data (`xmixup evaluate`)."""

from pathlib import Path
from typing import Any

from xmixup_jax.compute.evaluation import Tested
from xmixup_jax.data.names import readable
from xmixup_jax.data.records import Records
from xmixup_jax.data.sources import short_name
from xmixup_jax.files import REPORT
from xmixup_jax.predictor import TrainedModel
from xmixup_jax.report.classes import classes_contents, classes_part
from xmixup_jax.report.page import write
from xmixup_jax.report.scores import calibration


def write_report(
    output: Path, model: TrainedModel, result: dict[str, Any], records: Records, tested: Tested
) -> None:
    """Writes report.html.

    Args:
      output: the folder for it.
      model: the network.
      result: the content of result.json.
      records: the tested images; some are read.
      tested: the network's outputs for them.
    """
    names, config = readable(model.class_names), model.config
    left_out = ', '.join(f'{count} {what}' for what, count in result['left_out'].items())
    facts = [
        ('network', result['network']),
        ('data', f'{result["data"]} {result["split"]}'.strip()),
        ('images', result['test_images']),
        ('skipped images', result['skipped_images']),
        ('left out', left_out or 'nothing'),
        ('digest of the data', result['digest']),
    ]
    classes = classes_part(tested, calibration(tested), names, records, config)
    write(
        output / REPORT,
        'evaluation.html',
        title=f'{short_name(result["data"])} · {model.path.parent.name}',
        sentence=(
            f'{100 * result["top1"]:.2f} % top-1, {100 * result["macro_top1"]:.2f} % macro top-1 '
            f'on {result["test_images"]} images of {short_name(result["data"])}'
        ),
        key_facts=[
            ('Top-1', f'{100 * result["top1"]:.2f} %'),
            ('Macro top-1', f'{100 * result["macro_top1"]:.2f} %'),
            ('Images', result['test_images']),
            ('Classes', result['num_classes']),
        ],
        contents=[*classes_contents(classes), ('configuration', 'Data and network')],
        pixelated=config.resize < 64,
        facts=facts,
        **classes,
    )

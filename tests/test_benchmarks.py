"""Whole runs of benchmarks that reach into the program."""

import csv

import pytest

from benchmarks import first_step


@pytest.mark.slow
def test_every_part_up_to_the_first_step_is_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(first_step, 'CLASSES', 4)
    table = tmp_path / 'table.csv'
    network = ['name=resnet10', 'width=4', 'stem=cifar']
    first_step.run(
        [
            'first_step',
            f'--data={tmp_path}',
            '--records=1000',
            f'--output={table}',
            '--config=configs/folder.py',
            *(f'--config.model.{each}' for each in network),
            *(f'--config.{each}' for each in ('weights=', 'resize=16', 'image_size=16')),
            *('--config.warm_head=False', '--config.batch_norm=batch'),
        ]
    )
    with table.open() as file:
        first, again = csv.DictReader(file)
    assert (first.pop('run'), again.pop('run')) == ('first', 'again')
    for row in (first, again):
        total, *parts = [float(row.pop('total')), *map(float, row.values())]
        assert min(parts) >= 0 and sum(parts) == pytest.approx(total, rel=1e-2)
    # What takes time in any run: a part that is not timed any more would be missing here.
    assert all(float(first[part]) > 0 for part in ('import', 'data', 'classes', 'network', 'step'))

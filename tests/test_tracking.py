"""Weights & Biases gets every row of metrics.csv once, in one run."""

import csv
import json
import struct
import sys

import pytest
import wandb
from wandb.proto import wandb_internal_pb2

from xmixup_jax.errors import Interrupted, UserError
from xmixup_jax.run.loop import AgreedStop
from xmixup_jax.run.train import train_and_evaluate


def records(path):
    """The records of a file in the format of LevelDB's log, after a header of 7 bytes."""
    content, record = path.read_bytes(), b''
    for start in range(0, len(content), 2**15):
        block = content[start : start + 2**15]
        place = 0 if start else 7
        while place + 7 <= len(block):
            _, length, kind = struct.unpack_from('<IHB', block, place)
            if not kind:  # padding
                break
            record += block[place + 7 : place + 7 + length]
            place += 7 + length
            if kind in (1, 4):  # a whole record, or the last part of one
                yield wandb_internal_pb2.Record.FromString(record)
                record = b''


def logged(folder):
    """(run ids, rows by step, summary) of the files that wandb wrote while offline."""
    ids, rows, summary = set(), {}, {}
    for path in sorted(folder.glob('*/offline-run-*/run-*.wandb')):
        for record in records(path):
            if record.HasField('run'):
                ids.add(record.run.run_id)
            items = {
                item.key or '.'.join(item.nested_key): json.loads(item.value_json)
                for item in (*record.history.item, *record.summary.update)
            }
            if record.HasField('history'):
                rows[items['_step']] = items
            elif record.HasField('summary'):
                summary |= items
    return ids, rows, summary


def test_rows_and_summary(config, tmp_path, monkeypatch):
    monkeypatch.setenv('WANDB_MODE', 'offline')
    config.update({'wandb': 'digits', 'method': 'finetune'})
    calls = []

    def stop_once(self, metrics):
        calls.append(metrics)
        return len(calls) == 3

    monkeypatch.setattr(AgreedStop, 'after', stop_once)
    with pytest.raises(Interrupted):
        train_and_evaluate(config, tmp_path)
    # wandb names its folders by the second in which a run begins.
    (tmp_path / 'wandb').rename(tmp_path / 'first')
    result = train_and_evaluate(config, tmp_path)
    wandb.teardown()  # its service may write the last rows after a run has finished
    ids, rows, summary = logged(tmp_path)
    assert ids == {(tmp_path / 'wandb_id').read_text()}
    with (tmp_path / 'metrics.csv').open(newline='') as file:
        expected = list(csv.DictReader(file))
    assert sorted(rows) == [int(row['step']) for row in expected]
    for row in expected:
        assert rows[int(row['step'])]['loss'] == float(row['loss'])
    assert summary['result/top1'] == result['top1'] and summary['result/steps'] == 6
    assert wandb.run is None


def test_it_is_not_there_or_refuses(config, tmp_path, monkeypatch):
    config.update({'wandb': 'digits', 'method': 'finetune'})
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, 'wandb', None)
        with pytest.raises(UserError, match='run  pip install wandb'):
            train_and_evaluate(config, tmp_path)

    def refuse(**arguments):
        raise wandb.errors.UsageError('api_key not configured')

    monkeypatch.setattr(wandb, 'init', refuse)
    with pytest.raises(UserError, match='api_key not configured; run  wandb login'):
        train_and_evaluate(config, tmp_path)

"""Class folders with names that are not valid text, from training to predictions."""

import csv
import io
import json
import os
import shlex
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from test_report import Page, check_self_contained

from xmixup_jax.cli import predict, train
from xmixup_jax.cli import report as report_command
from xmixup_jax.cli.flags import parse_flags
from xmixup_jax.errors import ConfigError
from xmixup_jax.run.train import train_and_evaluate
from xmixup_jax.text import shell_line

# Latin-1, a line break, and special characters of HTML, Matplotlib and shells.
NAMES = (b'caf\xe9', b'two\nlines', b'$x^{$ & <b>', b'-dash "quoted"')
SHOWN = ('caf\\xe9', 'two\nlines', '$x^{$ & <b>', '-dash "quoted"')


def write_images(root):
    """Images of every class, of one colour each, in root/train and root/test."""
    for split in ('train', 'test'):
        for c, name in enumerate(NAMES):
            folder = root / split / os.fsdecode(name)
            folder.mkdir(parents=True)
            for i in range(3):
                pixels = np.full((12, 12, 3), 60 * c + i, np.uint8)
                Image.fromarray(pixels).save(folder / f'{i}.png')


def strict_stdout(monkeypatch):
    """A standard output that raises on invalid text, as that of a pipe does."""
    written = io.TextIOWrapper(io.BytesIO(), 'utf-8', newline='')
    monkeypatch.setattr(sys, 'stdout', written)
    return written


def text_of(written):
    written.flush()
    return written.buffer.getvalue().decode()


def test_a_run_on_classes_with_odd_names(config, tmp_path, monkeypatch):
    root = tmp_path / os.fsdecode(b'd\xe9j\xe0 vu')
    write_images(root)
    data = {'name': f'folder:{root}', 'split': 'train', 'test_split': 'test', 'shots': 0}
    config.update({'report': True, 'eval_every': 2, 'steps': 4, 'weights': ''})
    config.target.update(data)
    config.source.update(data)
    workdir = tmp_path / "\xe9 run's"
    result = train_and_evaluate(config, workdir)
    page = Page(workdir / 'report.html')
    check_self_contained(page)
    for name in SHOWN:
        assert ' '.join(name.split()) in page.text
    assert f'{100 * result["top1"]:.2f} % top-1 on 12 test images' in page.text

    def output(command, *arguments):
        written = strict_stdout(monkeypatch)
        monkeypatch.setattr(predict, 'setup', lambda cache_dir: None)
        monkeypatch.setattr(report_command, 'setup', lambda cache_dir: None)
        command.run(['xmixup', f'--workdir={workdir}', *arguments])
        return text_of(written)

    image = str(root / 'test')
    in_json = json.loads(output(predict, '--format=json', '--top=0', image))
    assert {row['class'] for row in in_json[0]['classes']} == set(SHOWN)
    in_csv = csv.DictReader(io.StringIO(output(predict, '--format=csv', '--top=0', image)))
    assert {row['class'] for row in in_csv} == set(SHOWN)
    table = output(predict, '--top=0', image)
    assert len(table.splitlines()) == 12 * 5 and 'two\\nlines' in table
    assert output(report_command) == f'->  {workdir}/report.html\n'
    # A shell splits the printed command into the same words.
    monkeypatch.setattr(train, 'read_command', lambda argv: (config, workdir))
    printed = output(train).splitlines()[-1].split('predict  ', 1)[1]
    words = [train.program(), 'predict', f'--workdir={workdir}', 'IMAGE', '...']
    assert shlex.split(printed) == words


def test_every_command_prints_what_is_no_text():
    code = (
        'from xmixup_jax.cli.program import run_and_exit; '
        'run_and_exit(lambda argv: print("caf\\udce9"), ["x"])'
    )
    environment = os.environ | {'PYTHONIOENCODING': 'utf-8:strict'}
    done = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, check=True, env=environment
    )
    assert done.stdout == b'caf\\udce9\n' and not done.stderr


@pytest.mark.parametrize(
    'word', ['a b', "it's", '$HOME', '-x', 'caf\xe9', 'two\nlines', os.fsdecode(b"caf\xe9\\'")]
)
def test_a_shell_takes_printed_commands_apart(word):
    line = shell_line(['printf', '%s', word])
    done = subprocess.run(['bash', '-c', line], capture_output=True, check=True)
    assert done.stdout == os.fsencode(word) and len(line.splitlines()) == 1


def test_a_run_folder_whose_name_is_no_text():
    with pytest.raises(ConfigError, match=r'--workdir=.*caf\\xe9 is not valid UTF-8'):
        parse_flags(
            ['train', '--config=digits', f'--workdir={os.fsdecode(b"caf" + bytes([0xE9]))}']
        )

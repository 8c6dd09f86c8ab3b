"""The console command `xmixup`: help, progress in a terminal, and no progress in files."""

import json
import os
import pty
import re
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from environment import one_device

from xmixup_jax.cli import match
from xmixup_jax.cli.program import COMMANDS
from xmixup_jax.errors import ConfigError

COMMAND = Path(sys.executable).with_name('xmixup')
ONE_DEVICE = one_device()


def xmixup(*arguments):
    return subprocess.run(
        [COMMAND, *arguments], capture_output=True, text=True, env=ONE_DEVICE, check=False
    )


def flags(config, workdir, *more):
    values = {key: config[key] for key in ('data_dir', 'cache_dir')}
    values |= {'model.width': 4, 'weights': '', 'steps': 8, 'eval_batch_size': 512}
    given = [f'--config.{key}={value}' for key, value in values.items()]
    return ['--config=configs/digits.py', f'--workdir={workdir}', *given, *more]


def test_help_lists_every_command():
    done = xmixup()
    assert done.returncode == 0 and not done.stderr
    for name in COMMANDS:
        assert re.search(rf'^    xmixup {name} ', done.stdout, re.MULTILINE)


@pytest.mark.parametrize('name', COMMANDS)
def test_help_of_a_command_begins_with_an_example(name):
    done = xmixup(name, '--help')
    assert done.returncode == 0 and not done.stderr
    purpose, example, *rest = [part for part in done.stdout.split('\n\n') if part.strip()]
    assert purpose[0].isupper() and example.startswith(f'    xmixup {name} ')
    assert '--' in example and rest


def test_a_command_that_there_is_not():
    done = xmixup('trian')
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "no command 'trian': use train, match" in done.stderr


def test_whoever_reads_the_output_may_stop(tmp_path):
    """`| head` is not reported as an error."""
    code = (
        'from xmixup_jax.cli.program import run_and_exit; '
        'run_and_exit(lambda argv: print("x" * 10**6), ["x"])'
    )
    for command in (f'{COMMAND} train --help', f"{sys.executable} -c '{code}'"):
        done = subprocess.run(
            ['bash', '-c', f'{command} | head -c 1'],
            capture_output=True,
            text=True,
            env=ONE_DEVICE,
            check=True,
        )
        assert len(done.stdout) == 1 and not done.stderr


@pytest.mark.skipif(
    'glibc' not in (os.confstr('CS_GNU_LIBC_VERSION') or ''), reason='glibc reads the variable'
)
@pytest.mark.parametrize(
    ('setting', 'before', 'after'),
    [
        ('always [madvise] never', '', 'glibc.malloc.hugetlb=1'),
        (
            'always [madvise] never',
            'glibc.malloc.arena_max=2',
            'glibc.malloc.arena_max=2:glibc.malloc.hugetlb=1',
        ),
        ('always [madvise] never', 'glibc.malloc.hugetlb=0', 'glibc.malloc.hugetlb=0'),
        ('[always] madvise never', '', ''),
    ],
)
def test_huge_pages(tmp_path, setting, before, after):
    """The process starts again, once, with the same arguments."""
    (tmp_path / 'enabled').write_text(setting)
    code = """
import os, sys
from pathlib import Path
from xmixup_jax.cli import program
print('started', sys.argv[1:], flush=True)
program._SYSTEM_SETTING = Path(sys.argv[1])
program.use_huge_pages()
print(os.environ.get('GLIBC_TUNABLES', ''))
"""
    done = subprocess.run(
        [sys.executable, '-c', code, tmp_path / 'enabled', 'a b'],
        capture_output=True,
        text=True,
        env=ONE_DEVICE | {'GLIBC_TUNABLES': before},
        check=True,
    )
    *starts, tunables = done.stdout.splitlines()
    assert tunables == after
    assert starts == [f"started ['{tmp_path}/enabled', 'a b']"] * (1 + (before != after))


def test_in_a_terminal(config, records, tmp_path):
    """It shows progress bars, and a summary of the files at the end."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    process = subprocess.Popen(
        [COMMAND, 'train', *flags(config, tmp_path, '--config.match.images_per_class=60')],
        stdout=subprocess.PIPE,
        stderr=theirs,
        env=ONE_DEVICE,
    )
    os.close(theirs)
    seen = b''
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # Linux's signal that the other end is closed
            break
        if not part:
            break
        seen += part
    output = process.communicate()[0].decode()
    assert process.returncode == 0, seen
    bars = {line.split(':')[0] for line in re.split('[\r\n]+', seen.decode())}
    assert {'features of mnist5k', 'uci_digits xmixup', 'test uci_digits'} <= bars
    first, *lines = output.splitlines()
    assert first.startswith('xmixup  top1 ')
    for line, name in zip(lines, ('report.html', 'model.safetensors', 'metrics.csv'), strict=False):
        assert line.split()[1] == str(tmp_path / name) and (tmp_path / name).is_file()


@pytest.mark.slow
def test_without_a_terminal(config, records, tmp_path):
    done = xmixup(
        'train', *flags(config, tmp_path, '--config.method=finetune', '--config.report=False')
    )
    assert done.returncode == 0, done.stderr
    assert '\r' not in done.stderr
    # Not counting lines about training, one every half minute.
    assert len([line for line in done.stderr.splitlines() if '  step ' not in line]) <= 3
    assert len(done.stdout.splitlines()) == 5  # result, weights, rows, and two commands


def test_match_without_training(config, records, tmp_path, capsys, monkeypatch):
    # `setup` would change settings of the whole process.
    monkeypatch.setattr('xmixup_jax.cli.flags.setup', lambda cache_dir: None)
    match.run(['match', *flags(config, tmp_path, '--config.eval_batch_size=1024')])
    lines = capsys.readouterr().out.splitlines()
    rows = json.loads((tmp_path / 'match.json').read_text())
    assert len(rows) == 10 and f'->  {tmp_path / "match.json"}' in lines
    assert any(line.split() == ['class', 'train', 'test'] for line in lines)
    for row, line in zip(rows, lines, strict=False):
        assert re.fullmatch(rf'{row["target"]}  <-  {row["source"][0]} \(-?[01]\.\d\d\d\)', line)
    assert not (tmp_path / 'checkpoints').exists()
    with pytest.raises(
        ConfigError, match='finetune does not match classes: use one of cotrain, xm'
    ):
        match.run(['match', *flags(config, tmp_path, '--config.method=finetune')])

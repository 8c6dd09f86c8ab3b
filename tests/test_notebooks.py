"""The notebooks run from top to bottom in their short setting, and are stored without outputs."""

import itertools
from pathlib import Path

import nbformat
import pytest
from environment import HANGS
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / 'notebooks'
NOTEBOOKS = sorted(FOLDER.glob('*.ipynb'))


def test_there_are_two():
    assert [path.stem for path in NOTEBOOKS] == ['method_tour', 'xmixup_colab']


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_kept_without_outputs_and_with_a_badge(path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == 'code']
    assert code and not any(cell.outputs or cell.execution_count for cell in code)
    kinds = [cell.cell_type for cell in notebook.cells]
    assert ('code', 'code') not in itertools.pairwise(kinds)  # each is explained
    repository = 'https://colab.research.google.com/github/xmixup-jax/xmixup-jax'
    assert f'({repository}/blob/main/notebooks/{path.name})' in notebook.cells[0].source


@pytest.mark.slow
@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_from_top_to_bottom(path, folders, tmp_path, monkeypatch):
    values = {
        'XMIXUP_SHORT': '1',
        'XMIXUP_RUNS': str(tmp_path / 'runs'),
        'XMIXUP_CACHE': folders['cache_dir'],
        'TFDS_DATA_DIR': folders['data_dir'],
        'XLA_FLAGS': '',  # one device, as a user has it
        'MPLBACKEND': 'module://matplotlib_inline.backend_inline',
    }
    for key, value in values.items():
        monkeypatch.setenv(key, value)
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=HANGS, resources={'metadata': {'path': str(FOLDER)}})
    client.execute()
    code = [cell for cell in notebook.cells if cell.cell_type == 'code']
    assert all(cell.execution_count for cell in code)
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == 'error']
    pictures = [output for output in outputs if 'image/png' in output.get('data', {})]
    assert len(pictures) >= (3 if path.stem == 'xmixup_colab' else 9)

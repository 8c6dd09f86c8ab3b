"""The layout of the package: no import cycles, no long files, light imports stay light."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import xmixup_jax

PACKAGE = Path(xmixup_jax.__file__).parent
HEAVY = ('cv2', 'matplotlib', 'sklearn', 'tensorflow_datasets')


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for path in PACKAGE.rglob('*.py'):
        name = '.'.join(path.relative_to(PACKAGE.parent).with_suffix('').parts)
        found[name.removesuffix('.__init__')] = path
    return found


def imports() -> dict[str, set[str]]:
    """What each module imports of the package, also within functions."""
    known = modules()
    graph = {}
    for name, path in known.items():
        graph[name] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                graph[name] |= {alias.name for alias in node.names} & known.keys()
            elif isinstance(node, ast.ImportFrom) and node.module in known:
                full = {f'{node.module}.{alias.name}' for alias in node.names}
                graph[name] |= (full & known.keys()) or {node.module}
        graph[name].discard(name)
    return graph


def room(module: str) -> str:
    """The folder, or the file at the top, that a module is in."""
    return '.'.join(module.split('.')[:2])


def test_no_module_imports_itself_in_a_circle():
    order = list(graphlib.TopologicalSorter(imports()).static_order())  # raises on a cycle
    assert len(order) == len(modules())


def test_no_room_imports_itself_in_a_circle():
    rooms = {}
    for module, targets in imports().items():
        if module != 'xmixup_jax':  # it imports the public names on first use
            rooms.setdefault(room(module), set()).update(map(room, targets))
    for name, targets in rooms.items():
        targets.discard(name)
    list(graphlib.TopologicalSorter(rooms).static_order())


def test_no_file_is_long():
    lengths = {name: len(path.read_text().splitlines()) for name, path in modules().items()}
    assert {name: lines for name, lines in lengths.items() if lines > 400} == {}


def loaded(code: str) -> set[str]:
    """The heavy libraries that a program has imported."""
    code += f'\nimport sys\nprint(*(set({HEAVY}) & set(sys.modules)))'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_public_functions_import_nothing_heavy():
    assert loaded(f'from xmixup_jax import {", ".join(xmixup_jax.__all__)}') == set()


def test_help_does_not_import_jax():
    code = 'import sys; from xmixup_jax.cli.program import main; main(["train", "--help"])'
    code += '\nassert "jax" not in sys.modules and "numpy" not in sys.modules'
    subprocess.run([sys.executable, '-c', code], capture_output=True, check=True)


def test_dir_lists_the_public_names():
    assert dir(xmixup_jax) == sorted([*xmixup_jax.__all__, '__version__'])
    for name in xmixup_jax.__all__:
        assert getattr(xmixup_jax, name) is not None

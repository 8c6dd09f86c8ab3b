"""Detects the format of a weights file from its content, whatever its name."""

import zipfile
from pathlib import Path

from xmixup_jax.errors import DataError

_HEAD = 4096  # number of bytes to look at
_MAX_HEADER = 2**27  # bytes of a safetensors header; the library allows 100 MB
_AGAIN = 'download or copy it again'
_SAVE = 'convert it with the program that wrote it, to a state dict of PyTorch or to safetensors'
# (offset, bytes at the offset, what the file is and what to do about it).
_MAGIC: tuple[tuple[int, bytes, str], ...] = (
    (0, b'\x89HDF\r\n\x1a\n', f'it is an HDF5 file (Keras), which is not supported: {_SAVE}'),
    (0, b'GGUF', f'it is a GGUF file, which is not supported: {_SAVE}'),
    (4, b'TFL3', f'it is a TensorFlow Lite file, which is not supported: {_SAVE}'),
    (0, b'\x93NUMPY', 'it is a single array (.npy): give an .npz file with named arrays'),
    (0, b'\x1f\x8b', 'it is compressed with gzip: unpack it first'),
    (0, b'BZh', 'it is compressed with bzip2: unpack it first'),
    (0, b'\xfd7zXZ\x00', 'it is compressed with xz: unpack it first'),
    (0, b'\x28\xb5\x2f\xfd', 'it is compressed with Zstandard: unpack it first'),
    (0, b'7z\xbc\xaf\x27\x1c', 'it is a 7z archive: unpack it first'),
    (0, b'Rar!', 'it is a RAR archive: unpack it first'),
    (257, b'ustar', 'it is a tar archive: unpack it and give the weights file in it'),
)  # fmt: skip


def kind_of(path: Path) -> str:
    """Detects the format: 'torch', 'safetensors', 'npz', or 'orbax' for a folder.

    Raises:
      DataError: it is something else, or cannot be read; says what it is and what to do.
    """
    if path.is_dir():
        return 'orbax'
    try:
        if not path.is_file():
            raise DataError(f'weights {path} are not a regular file: give a file or a folder')
        size = path.stat().st_size
        with path.open('rb') as file:
            head = file.read(_HEAD)
        if head.startswith(b'PK\x03\x04'):
            kind, problem = _zip_kind(path)
        else:
            kind, problem = _binary_kind(head, size)
    except OSError as error:
        raise DataError(
            f'weights {path} cannot be read: {error.strerror or error}: check the file and its '
            'permissions'
        ) from error
    if problem:
        raise DataError(f'weights {path} cannot be read: {problem}')
    return kind or _refuse(path, head)


def _binary_kind(head: bytes, size: int) -> tuple[str, str]:
    """Returns (format, problem); both are '' if the format is unknown."""
    if not head:
        return '', f'it is empty: {_AGAIN}'
    if not head.strip(b'\0'):
        return '', f'it begins with zeros, like an interrupted download: {_AGAIN}'
    header = int.from_bytes(head[:8], 'little')
    # Tested before pickles, since a safetensors file, too, may begin with 0x80.
    if head[8:9] == b'{' and header < _MAX_HEADER:
        short = size < 8 + header
        return 'safetensors', f'it is an incomplete safetensors file: {_AGAIN}' * short
    if head[:1] == b'\x80' and head[1:2] <= b'\x05':
        return 'torch', ''
    for offset, magic, problem in _MAGIC:
        if head[offset:].startswith(magic):
            return '', problem
    if head[:1] == b'\x08' and (b'onnx' in head or b'pytorch' in head[:64]):
        return '', f'it is an ONNX file, which is not supported: {_SAVE}'
    return '', ''


def _zip_kind(path: Path) -> tuple[str, str]:
    """Returns (format, problem) of a zip archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError):
        return '', f'it begins like a file of PyTorch or NumPy, but its end is missing: {_AGAIN}'
    last = {name.split('/')[-1] for name in names}
    if 'data.pkl' in last and any('/code/' in f'/{name}' for name in names):
        return '', (
            'it is a TorchScript program: in PyTorch, run  '
            "torch.save(torch.jit.load(FILE).state_dict(), 'weights.pth')"
        )
    if 'archive_format' in last:
        return '', 'it is a program of torch.export: save the state_dict() of its network'
    if 'data.pkl' in last:
        return 'torch', ''
    if any(name.endswith('.npy') for name in names):
        return 'npz', ''
    if 'model.weights.h5' in last:
        return '', f'it is a Keras model, which is not supported: {_SAVE}'
    shown = ', '.join(repr(name[:80]) for name in names[:3])
    return '', (
        f'it is a zip archive of {len(names)} other files ({shown or "none"}): unpack it and give '
        'the weights file in it'
    )


def _refuse(path: Path, head: bytes) -> str:
    text = head.lstrip(b'\xef\xbb\xbf \t\r\n')
    if text.startswith(b'<'):
        problem = (
            'it is a web page, not a weights file: download the file itself (on the Hugging Face '
            'Hub, replace /blob/ by /resolve/ in the address; other sites may need a login)'
        )
    elif text.startswith(b'version https://git-lfs'):
        problem = 'it is a Git LFS pointer, not the file itself: run  git lfs pull'
    elif b'/annex/objects/' in text[:400]:
        problem = 'it is a git-annex pointer, not the file itself: run  git annex get'
    elif text.startswith((b'{', b'[')) and b'weight_map' in text:
        problem = (
            'it is the index of sharded weights, which are not supported: save them as one file '
            '(in transformers, save_pretrained with a large max_shard_size)'
        )
    elif path.suffix == '.msgpack':
        problem = f'it is a msgpack file of Flax, which is not supported: {_SAVE}'
    elif _is_text(head):
        problem = f'it is a text file that begins with {_quote(text)}: {_AGAIN}'
    else:
        problem = 'its format is unknown: give a file of safetensors, PyTorch or NumPy (.npz)'
    raise DataError(f'weights {path} cannot be read: {problem}')


def _is_text(head: bytes) -> bool:
    return all(byte >= 32 or byte in b'\t\r\n' for byte in head[:200])


def _quote(text: bytes) -> str:
    return repr(' '.join(text[:60].decode('utf-8', 'replace').split()))

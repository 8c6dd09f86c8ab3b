"""Mutated and malicious files give a result or a proper error, quickly and in little memory."""

import io
import os
import resource
import struct
import tarfile
import time
import zipfile
from collections import Counter

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file
from test_bad_images import BAD, GOOD, encode

from xmixup_jax.data import builders
from xmixup_jax.data.decode import decode
from xmixup_jax.data.sources.folder import read_classes
from xmixup_jax.data.sources.image_files import read_file
from xmixup_jax.errors import DataError
from xmixup_jax.weights.pretrained import Weights
from xmixup_jax.weights.torch_file import TorchFileError, read_torch_file

RNG = np.random.default_rng()
SECONDS = 10  # for one input, on a busy machine
MEGABYTES = 600  # for all of them


def mutated(content: bytes, others: list[bytes]) -> bytes:
    """Makes one or a few changes, as fuzzers do."""
    made = bytearray(content)
    for _ in range(RNG.geometric(0.5)):
        place = int(RNG.integers(len(made) + 1))
        kind = RNG.integers(7)
        if kind == 0 and place < len(made):
            made[place] ^= 1 << int(RNG.integers(8))
        elif kind == 1 and place < len(made):
            made[place] = RNG.choice([0, 1, 0x7F, 0x80, 0xFF])
        elif kind == 2:  # numbers at the limits of their type, in both orders of bytes
            value = int(RNG.choice([0, 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1]))
            form = RNG.choice(['<I', '>I', '<H', '>H'])
            made[place : place + struct.calcsize(form)] = struct.pack(
                form, value % 2 ** (8 * struct.calcsize(form))
            )
        elif kind == 3:
            del made[place : place + int(RNG.integers(1, 64))]
        elif kind == 4:
            made[place:place] = RNG.bytes(int(RNG.integers(1, 32)))
        elif kind == 5:  # a part of another one
            other = others[RNG.integers(len(others))]
            start = int(RNG.integers(len(other) + 1))
            made[place : place + 64] = other[start : start + 64]
        elif len(made) > 1:
            del made[max(1, place) :]
    return bytes(made)


def attack(seeds, number, read, errors):
    """Reads `number` mutations of the seeds.

    Returns:
      how often there was a result, and how often each error.
    """
    outcomes: Counter = Counter()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(number):
        content = mutated(seeds[RNG.integers(len(seeds))], seeds)
        begun = time.process_time()
        try:
            read(content)
            outcomes['read'] += 1
        except errors as error:
            assert '\n' not in str(error)
            outcomes['refused'] += 1
        assert time.process_time() - begun < SECONDS
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < MEGABYTES
    return outcomes


def count(outcomes, record_property, what):
    assert outcomes['read'] and outcomes['refused']
    record_property(
        f'mutated {what}',
        f'{outcomes.total()}, no crash: {outcomes["read"]} read, {outcomes["refused"]} refused',
    )


@pytest.mark.slow
def test_images(faults, record_property):
    pixels = np.asarray(Image.open(io.BytesIO(GOOD['jpeg'][0])))
    # OpenCV detects further formats by their content, whatever the name.
    others = [
        cv2.imencode(suffix, cv2.resize(pixels, (128, 128)))[1].tobytes()
        for suffix in ('.bmp', '.jp2', '.ras', '.hdr', '.pam', '.pfm', '.tiff', '.avif')
    ]
    seeds = [content for content, _ in GOOD.values()] + others + [b for b in BAD.values() if b]

    def read(content):
        image = decode(content, int(RNG.integers(8, 64)), 'mutant')
        assert image.dtype == np.uint8 and image.shape[2] == 3

    count(attack(seeds, 4000 * faults, read, DataError), record_property, 'images')


@pytest.mark.slow
def test_weights(tmp_path, faults, record_property):
    tensors = {'conv1.weight': torch.randn(4, 3, 3, 3), 'half': torch.randn(9).half()}
    tensors['shared'] = tensors['half']
    seeds = []
    for zipped in (True, False):
        for wrap in (tensors, {'state_dict': tensors, 'epoch': 3, 'best': 0.5, 'names': ['a']}):
            buffer = io.BytesIO()
            torch.save(wrap, buffer, _use_new_zipfile_serialization=zipped)
            seeds.append(buffer.getvalue())
    module = torch.nn.BatchNorm1d(3).state_dict()  # an OrderedDict with attributes
    buffer = io.BytesIO()
    torch.save(module, buffer)
    seeds.append(buffer.getvalue())
    path = tmp_path / 'mutant.pth'

    def read(content):
        path.write_bytes(content)
        read_torch_file(path)

    outcomes = attack(seeds, 3000 * faults, read, TorchFileError)
    count(outcomes, record_property, 'weights (.pth)')

    save_file({key: tensor.numpy() for key, tensor in tensors.items()}, tmp_path / 'seed')
    path = tmp_path / 'mutant.safetensors'

    def read(content):
        path.write_bytes(content)
        Weights(path, 'resnet10')

    outcomes = attack([(tmp_path / 'seed').read_bytes()], 2000 * faults, read, DataError)
    count(outcomes, record_property, 'weights (.safetensors)')


def pickled(code: bytes) -> bytes:
    """A PyTorch file in the old format, with this pickle as its content."""
    buffer = io.BytesIO()
    torch.save({}, buffer, _use_new_zipfile_serialization=False)
    begin = buffer.getvalue()
    return begin[: begin.index(b'.', begin.index(b'little_endian')) + 1] + code


@pytest.mark.parametrize(
    'code',
    [
        b'\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R.',
        b'\x80\x04\x8c\x08builtins\x8c\x04eval\x93\x8c\x011\x85R.',
        b'\x80\x02(ios\nsystem\n.',
        b'\x80\x02cbuiltins\nobject\n)\x81.',
        b'\x80\x02' + b')' + b'\x85' * 1_000_000 + b'K\x01s.',  # a deeply nested key
        b'\x80\x02}' + b')' + b'\x85' * 1_000_000 + b'K\x01s.',
        b'\x80\x02' + b'(' * 3_000_000 + b'.',
        b'\x80\x02}' + b'K\x00r\xff\xff\xff\xff.',  # a memory of 2**32 places
        b'\x80\x02\x8b\xff\xff\xff\x7f' + b'1' * 1000 + b'.',  # a number of 2 GB
        b'\x80\x02I' + b'9' * 1_000_000 + b'\n.',
    ],
)
def test_pickles_made_to_harm(tmp_path, code):
    path = tmp_path / 'w.pth'
    path.write_bytes(pickled(code))
    begun = time.process_time()
    with pytest.raises(TorchFileError):
        read_torch_file(path)
    assert time.process_time() - begun < SECONDS


def test_weights_that_unfold(tmp_path):
    """Tensors that share data, and archive members that share bytes, claim too much memory."""
    half = torch.zeros(100_000).half()
    torch.save({str(i): half for i in range(200)}, tmp_path / 'shared.pth')
    with pytest.raises(TorchFileError, match='far more memory than the file has'):
        read_torch_file(tmp_path / 'shared.pth')
    with zipfile.ZipFile(tmp_path / 'zip.pth', 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('w/data.pkl', b'\x80\x02}.')
        archive.writestr('w/data/0', bytes(10_000_000))
    with pytest.raises(TorchFileError, match='it is compressed'):
        read_torch_file(tmp_path / 'zip.pth')


def jpeg_of_many_scans(side, scans):
    """A progressive JPEG in which one short scan is repeated."""
    image = Image.new('L', (side, side))
    plain = encode(image, 'JPEG', progressive=True)
    first = plain.index(b'\xff\xda')
    second = plain.index(b'\xff\xda', first + 2)
    return plain[:second] + plain[first:second] * scans + b'\xff\xd9'


def test_images_made_to_take_long(tmp_path):
    begun = time.process_time()
    with pytest.raises(DataError):
        decode(jpeg_of_many_scans(8000, 1000), 32, 'endless')
    assert time.process_time() - begun < SECONDS
    assert decode(jpeg_of_many_scans(64, 20), 32, 'many scans').shape == (32, 32, 3)
    huge = tmp_path / 'huge.png'
    huge.write_bytes(GOOD['16-bit png'][0])
    with huge.open('ab') as file:
        file.truncate(2**40)  # without taking room
    with pytest.raises(DataError):
        decode(read_file(huge), 32, 'huge')


def test_pipes_and_folders_are_no_images(tmp_path):
    (tmp_path / 'a' / 'folder.jpg').mkdir(parents=True)
    (tmp_path / 'a' / 'b.jpg').write_bytes(GOOD['jpeg'][0])
    os.mkfifo(tmp_path / 'a' / 'pipe.jpg')
    assert [each.path for each in read_classes(tmp_path)['a'].images] == [str(tmp_path / 'a/b.jpg')]


def member(name, kind=tarfile.REGTYPE, link='', content=b'x'):
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, len(content)
    return info, io.BytesIO(content)


@pytest.mark.parametrize(
    'members',
    [
        [member('../out')],
        [member('a/../../out')],
        [member('a', tarfile.SYMTYPE, '..', b''), member('a/out')],
        [member('a', tarfile.SYMTYPE, '/tmp', b''), member('a/out')],  # noqa: S108
        [member('a', tarfile.LNKTYPE, '../out', b''), member('a')],
        [member('a', tarfile.CHRTYPE, content=b'')],
        [member('/out')],
    ],
    ids=['up', 'around', 'link', 'absolute link', 'hard link', 'device', 'absolute'],
)
def test_archives_write_in_their_folder_alone(tmp_path, members, caplog):
    path = tmp_path / 'deep' / 'a.tar'
    path.parent.mkdir()
    with tarfile.open(path, 'w') as tar:
        for info, content in [member('good'), *members]:
            tar.addfile(info, content)
    try:
        folder = builders._unpack(path)
    except DataError as error:
        assert 'cannot be unpacked' in str(error)
    else:
        assert (folder / 'good').read_bytes() == b'x'
        assert not any(p.is_symlink() or not (p.is_file() or p.is_dir()) for p in folder.rglob('*'))
    inside = path.with_name('a.tar.unpacked')
    outside = {p for p in tmp_path.rglob('*') if not p.is_relative_to(inside)}
    assert outside == {path.parent, path}
    assert not os.path.lexists('/out')


@pytest.mark.parametrize('kind', ['one large file', 'many small ones'])
def test_archives_that_unfold(tmp_path, kind, monkeypatch):
    path = tmp_path / 'a.tar.gz'
    with tarfile.open(path, 'w:gz') as tar:
        if kind == 'one large file':
            info = tarfile.TarInfo('zeros')
            info.size = 300_000_000
            tar.addfile(info, io.BytesIO(bytes(info.size)))
        else:
            monkeypatch.setattr(builders, '_ALWAYS_ALLOWED', 2**20)
            for i in range(20_000):
                tar.addfile(*member(f'{i // 100}', content=b''))
    with pytest.raises(DataError, match='unpacks to more than 100 times its size'):
        builders._unpack(path)
    assert list(tmp_path.iterdir()) == [path]

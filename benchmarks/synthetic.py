"""Shared by several benchmarks: synthetic data, and the peak speed of the machine."""

import contextlib
import csv
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from xmixup_jax.compute.cost import BATCHES
from xmixup_jax.data.records import Records, Store
from xmixup_jax.data.selection import Data
from xmixup_jax.devices import shard_steps
from xmixup_jax.models import create_model
from xmixup_jax.run.checkpoint import Checkpoints
from xmixup_jax.run.start import Start, begin
from xmixup_jax.run.train import train_and_evaluate
from xmixup_jax.weights.files import save_weights
from xmixup_jax.weights.pretrained import Weights

PyTree = Any
PRETRAINED_CLASSES = 1000


def photo(seed: int, width: int = 500, height: int = 375) -> bytes:
    """Returns a JPEG of a smooth random picture with grain, about as large as a photograph's."""
    rng = np.random.default_rng(seed)
    smooth = cv2.resize(rng.integers(256, size=(24, 32, 3), dtype=np.uint8), (width, height))
    grain = rng.normal(0, 12, (-(-height // 2), -(-width // 2))).astype(np.float32)
    grain = cv2.resize(grain, (width, height))
    image = np.clip(smooth + grain[..., None], 0, 255).astype(np.uint8)
    return cv2.imencode('.jpg', image, [cv2.IMWRITE_JPEG_QUALITY, 85])[1].tobytes()


def records(name: str, classes: int, images: list[bytes], count: int) -> Records:
    """Makes `count` records in `classes` classes, which cycle through `images`."""
    return Records(
        name=name,
        class_names=tuple(f'{name}{c}' for c in range(classes)),
        labels=np.arange(count, dtype=np.int32) % classes,
        read=lambda i: images[i % len(images)],
        where=lambda i: f'record {i} of {name}',
        index=np.arange(count),
        store=Store(max_bad_images=0),
        stamps=np.arange(count, dtype=np.uint64),
    )


def data(classes: int, size: int) -> Data:
    """Makes a target and a source with four images per class, of `size` px."""
    images = [photo(seed, size, size) for seed in range(8)]
    parts = [records(name, classes, images, 4 * classes) for name in ('target', 'source')]
    return Data(parts[0], None, parts[1])


def random_weights(config: ConfigDict, path: Path) -> Weights:
    """Writes a file of random weights, with a head of 1,000 classes."""
    _, params, batch_stats = create_model(config.model, PRETRAINED_CLASSES, config.image_size, 0)
    save_weights(path, config.model.name, params, batch_stats, {})
    return Weights(path, config.model.name)


def start(config: ConfigDict, name: str, weights: Weights, classes: int, folder: Path) -> Start:
    """Starts a run of the method `name`, including its preparatory phase."""
    config = config.copy_and_resolve_references()
    config.method, config.cache_dir = name, str(folder / 'cache')
    # Keep the preparatory phases short: they are not measured.
    config.seqtrain.steps, config.delta.images, config.cotuning.temperature = 1, 8, 1.0
    made = data(classes, config.resize)

    def train(auxiliary: ConfigDict, run: str, run_data: Data) -> dict:
        return train_and_evaluate(auxiliary, folder / name / run, run_data)

    checkpoints = Checkpoints(folder / name, 1)
    try:
        return begin(config, made, weights, checkpoints, train)
    finally:
        checkpoints.close()


@contextlib.contextmanager
def starts(
    config: ConfigDict, names: list[str], classes: int
) -> Iterator[tuple[dict[str, Start], list[PyTree], Path]]:
    """Prepares everything that the steps of these methods need.

    Yields:
      ({method: its start}, batches on the devices, a temporary folder).
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights = random_weights(config, folder / 'weights.safetensors')
        begun = {name: start(config, name, weights, classes, folder) for name in names}
        batches = [shard_steps([batch(config, classes, i)]) for i in range(BATCHES)]
        yield begun, batches, folder


def batch(config: ConfigDict, classes: int, seed: int) -> dict[str, np.ndarray]:
    """Makes a batch of noise, like those of `pairing.train_batches`."""
    rng = np.random.default_rng(seed)
    size, side = config.batch_size, config.resize
    return {
        'image': rng.integers(0, 256, (size, side, side, 3), np.uint8),
        'source_image': rng.integers(0, 256, (size, side, side, 3), np.uint8),
        'label': rng.integers(0, classes, size).astype(np.int32),
        'source_label': rng.integers(0, classes, size).astype(np.int32),
        'seed': rng.integers(0, 2**32, size, np.uint32),
    }


def peaks(precision: str) -> tuple[float, float]:
    """Measures one device: (10**9 operations/s in matrix products, 10**9 bytes/s in copies)."""
    side = 2048 if jax.default_backend() == 'cpu' else 8192
    a = jnp.ones((side, side), precision)
    flops = 2 * side**3 / seconds_of(jax.jit(jnp.matmul), a, a)
    state = [jnp.ones(2**26 if jax.default_backend() == 'cpu' else 2**29, jnp.float32)]
    size = state[0].nbytes
    # In place, as the first touch of new memory would cost more than the copy.
    add = jax.jit(lambda x: x + 1, donate_argnums=0)

    def step():
        state[0] = add(state[0])
        return state[0]

    return flops / 1e9, 2 * size / seconds_of(step) / 1e9


def seconds_of(function, *args) -> float:
    """Times a call: the minimum of ten, after a warm-up call."""
    jax.block_until_ready(function(*args))
    times = []
    for _ in range(10):
        begun = time.perf_counter()
        jax.block_until_ready(function(*args))
        times.append(time.perf_counter() - begun)
    return min(times)


def write_table(rows: list[dict], path: Path | None) -> None:
    """Prints the rows as a table, and writes them as CSV if there is a path."""
    keys = list(rows[0])
    cells = [keys, *([_cell(row[key]) for key in keys] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(keys))]
    for line in cells:
        print('  '.join(text.rjust(width) for text, width in zip(line, widths, strict=True)))
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open('w', newline='') as file:
            writer = csv.DictWriter(file, keys, lineterminator='\n')
            writer.writeheader()
            writer.writerows({key: _cell(value) for key, value in row.items()} for row in rows)


def _cell(value) -> str:
    return f'{value:.4g}' if isinstance(value, float) else str(value)

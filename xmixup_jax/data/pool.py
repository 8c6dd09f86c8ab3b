"""Keeps all decoded images of a run on the devices, sharded across them."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from xmixup_jax.data.pairing import worker_threads
from xmixup_jax.data.records import Records
from xmixup_jax.data.sources import short_name
from xmixup_jax.devices import shard

PyTree = Any


def fill_pool(config: ConfigDict, used: dict[str, Records]) -> dict[str, jax.Array]:
    """Decodes every image once and puts it on one of the devices.

    Args:
      config: configuration of the run.
      used: records by the name of their images in a batch; see `cache.used_records`.

    Returns:
      uint8 [local devices, n, R, R, 3] by name: record i is on device i // n (counted over all
      processes), at position i % n. `look_up` reads it.
    """
    pool = {}
    for name, records in used.items():
        n = -(-len(records) // jax.device_count())
        local = jax.local_device_count() * n
        first = jax.process_index() * local
        wanted = range(min(first, len(records)), min(first + local, len(records)))
        images = np.zeros((local, config.resize, config.resize, 3), np.uint8)

        def put(i, records=records, images=images, first=first):
            images[i - first] = records.image_or_next(i, config.resize, config.fit)

        title = f'loading {short_name(records.name)} onto the devices'
        with ThreadPoolExecutor(worker_threads(config.num_threads)) as threads:
            list(tqdm(threads.map(put, wanted), title, len(wanted), unit='image', disable=None))
        pool[name] = shard(images)
    return pool


def look_up(pool: PyTree, batch: PyTree) -> PyTree:
    """Replaces the positions in a batch by images from the pool, on mapped devices.

    Args:
      pool: this device's part of the pool, uint8 [n, R, R, 3] by name.
      batch: this device's part of the batch, with int32 [b] positions under the pool's names.

    Returns:
      the batch with uint8 [b, R, R, 3] under those names.
    """

    def images_of(part, positions):
        wanted = jax.lax.all_gather(positions, 'batch', tiled=True)
        local = wanted - jax.lax.axis_index('batch') * len(part)
        here = (local >= 0) & (local < len(part))
        images = jnp.where(here[:, None, None, None], part[jnp.where(here, local, 0)], 0)
        # Each image is on one device; the others contribute zeros.
        return jax.lax.psum_scatter(images, 'batch', tiled=True)

    return batch | {name: images_of(part, batch[name]) for name, part in pool.items()}

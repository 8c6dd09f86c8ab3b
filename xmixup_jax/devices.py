"""Putting arrays on the devices, and how many programs may wait for them."""

import contextlib
from collections import deque
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

PyTree = Any


def _mesh() -> Mesh:
    return Mesh(jax.local_devices(), ('batch',))


@contextlib.contextmanager
def on_host() -> Iterator[None]:
    """Within it the CPU computes what no array of an accelerator has a part in.

    For values of many shapes, such as a network's first ones: on an accelerator each shape is a
    program to compile.
    """
    if jax.default_backend() == 'cpu':
        yield
        return
    try:
        cpu = jax.local_devices(backend='cpu')[0]
    except RuntimeError:  # left out of JAX_PLATFORMS
        yield
        return
    with jax.default_device(cpu):
        yield


def replicate(tree: PyTree) -> PyTree:
    """Puts a copy of `tree` on every local device.

    The copies are new buffers, so that donating them leaves the caller's arrays alone.
    """
    tree = jax.tree.map(np.array, tree)
    return jax.device_put(tree, NamedSharding(_mesh(), PartitionSpec()))


def everywhere(tree: PyTree) -> PyTree:
    """Descriptions of a tree's leaves, replicated over the devices of all processes."""
    sharding = NamedSharding(_global_mesh(), PartitionSpec())
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
    )


def global_arrays(state: PyTree) -> PyTree:
    """A replicated tree over the devices of all processes, which orbax writes together."""
    if jax.process_count() == 1:
        return state
    return multihost_utils.host_local_array_to_global_array(state, _global_mesh(), PartitionSpec())


def local_arrays(state: PyTree) -> PyTree:
    """The inverse of `global_arrays`."""
    if jax.process_count() == 1:
        return state
    return multihost_utils.global_array_to_host_local_array(state, _global_mesh(), PartitionSpec())


def _global_mesh() -> Mesh:
    return Mesh(jax.devices(), ('batch',))


def shard(batch: PyTree) -> PyTree:
    """Host arrays [b, ...] to device arrays [local devices, b / local devices, ...]."""
    return _put(jax.tree.map(_divide, batch))


def shard_steps(batches: list[PyTree]) -> PyTree:
    """The batches of several steps to device arrays [local devices, steps, b, ...]."""
    if len(batches) == 1:  # without a copy
        return _put(jax.tree.map(lambda x: _divide(x)[:, None], batches[0]))
    return _put(jax.tree.map(lambda *xs: np.stack([_divide(x) for x in xs], axis=1), *batches))


def _divide(x: np.ndarray) -> np.ndarray:
    return x.reshape(jax.local_device_count(), -1, *x.shape[1:])


def _put(tree: PyTree) -> PyTree:
    return jax.device_put(tree, NamedSharding(_mesh(), PartitionSpec('batch')))


class InFlight:
    """Programs that were dispatched and may not have ended: few enough that their inputs do not
    fill the devices, and enough that the devices never wait for the host.

    None where several devices are simulated on one CPU: two collective programs in flight can
    starve each other of threads there and hang (seen with JAX 0.10.2 and 8 devices on 2 cores).
    """

    def __init__(self) -> None:
        simulated = jax.default_backend() == 'cpu' and jax.local_device_count() > 1
        self._limit = 0 if simulated else 2
        self._outputs: deque[PyTree] = deque()

    def add(self, outputs: PyTree) -> list[PyTree]:
        """Takes the outputs of one more program.

        Returns:
          the outputs of those that have ended meanwhile; waits for them if there are too many.
        """
        self._outputs.append(outputs)
        ended = []
        while len(self._outputs) > self._limit:
            ended.append(jax.block_until_ready(self._outputs.popleft()))
        return ended

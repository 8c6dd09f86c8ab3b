"""Puts arrays on the devices, and limits the number of programs in flight."""

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


DEVICE_GROUPS = ('all', 'host', 'device')


def device_groups(kind: str) -> tuple[tuple[int, ...], ...] | None:
    """The groups of devices that share something.

    Args:
      kind: one of DEVICE_GROUPS: all devices share it, those of a process, or each has its own.

    Returns:
      positions in `jax.devices()` of each group; None if all devices are one.
    """
    if kind == 'all':
        return None
    groups: dict[int, tuple[int, ...]] = {}
    for i, device in enumerate(jax.devices()):
        owner = device.process_index if kind == 'host' else i
        groups[owner] = (*groups.get(owner, ()), i)
    return tuple(groups.values()) if len(groups) > 1 else None


PRECISIONS = ('auto', 'float32', 'bfloat16')


def chosen_precision(precision: str) -> str:
    """Replaces 'auto', one of PRECISIONS, by what suits the devices: bfloat16 on GPUs and TPUs."""
    if precision != 'auto':
        return precision
    return 'float32' if jax.default_backend() == 'cpu' else 'bfloat16'


@contextlib.contextmanager
def on_host() -> Iterator[None]:
    """A context in which computations without accelerator arrays run on the CPU.

    It suits values of many shapes, such as a network's initial parameters: an accelerator would
    have to compile a program for each shape.
    """
    if jax.default_backend() == 'cpu':
        yield
        return
    try:
        cpu = jax.local_devices(backend='cpu')[0]
    except RuntimeError:  # JAX_PLATFORMS excludes the CPU
        yield
        return
    with jax.default_device(cpu):
        yield


def replicate(tree: PyTree) -> PyTree:
    """Copies `tree` to every local device.

    The copies are new buffers, so donating them does not affect the caller's arrays.
    """
    tree = jax.tree.map(np.array, tree)
    return jax.device_put(tree, NamedSharding(_mesh(), PartitionSpec()))


def replicated_shapes(tree: PyTree) -> PyTree:
    """Shapes and dtypes of a tree, with a sharding that replicates over all processes' devices."""
    sharding = NamedSharding(_global_mesh(), PartitionSpec())
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
    )


def global_arrays(state: PyTree) -> PyTree:
    """Converts a locally replicated tree to global arrays, which orbax needs for checkpoints."""
    if jax.process_count() == 1:
        return state
    return multihost_utils.host_local_array_to_global_array(state, _global_mesh(), PartitionSpec())


def local_arrays(state: PyTree) -> PyTree:
    """Inverts `global_arrays`."""
    if jax.process_count() == 1:
        return state
    return multihost_utils.global_array_to_host_local_array(state, _global_mesh(), PartitionSpec())


def _global_mesh() -> Mesh:
    return Mesh(jax.devices(), ('batch',))


def shard(batch: PyTree) -> PyTree:
    """Splits host arrays [b, ...] into device arrays [local devices, b / local devices, ...]."""
    return _put(jax.tree.map(_split, batch))


def shard_steps(batches: list[PyTree]) -> PyTree:
    """Splits the batches of several steps into device arrays [local devices, steps, b, ...]."""
    if len(batches) == 1:  # avoid the copy
        return _put(jax.tree.map(lambda x: _split(x)[:, None], batches[0]))
    return _put(jax.tree.map(lambda *xs: np.stack([_split(x) for x in xs], axis=1), *batches))


def _split(x: np.ndarray) -> np.ndarray:
    return x.reshape(jax.local_device_count(), -1, *x.shape[1:])


def _put(tree: PyTree) -> PyTree:
    return jax.device_put(tree, NamedSharding(_mesh(), PartitionSpec('batch')))


class InFlight:
    """A queue of dispatched programs that may still be running.

    Its limit of two keeps the devices busy without filling their memory with inputs. The limit is
    zero if one CPU simulates several devices: two collective programs in flight can starve each
    other of threads and hang (seen with JAX 0.10.2 and 8 devices on 2 cores).
    """

    def __init__(self) -> None:
        simulated = jax.default_backend() == 'cpu' and jax.local_device_count() > 1
        self._limit = 0 if simulated else 2
        self._outputs: deque[PyTree] = deque()

    def add(self, outputs: PyTree) -> list[PyTree]:
        """Adds the outputs of a program, and waits for the oldest ones above the limit.

        Returns:
          the outputs of the programs that it waited for.
        """
        self._outputs.append(outputs)
        finished = []
        while len(self._outputs) > self._limit:
            finished.append(jax.block_until_ready(self._outputs.popleft()))
        return finished

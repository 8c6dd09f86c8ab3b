"""Maps per-device functions over all devices; no other module does.

All that the functions know of the mapping is the name of its axis, 'batch'. `jax.pmap` is in
maintenance mode: since JAX 0.8 it is a `jit` of a `shard_map`. Once JAX drops it, change the line
`over_devices = by_pmap` to `over_devices = by_shard_map`, a tested replacement.

Replicated arguments and results have no leading device axis (`None` in `in_axes`), as in
`shard_map`, so nothing is ever indexed by device.
"""

from collections.abc import Callable

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, PartitionSpec

Axes = tuple[int | None, ...]
"""For each argument, 0: split across devices along its first axis; None: replicated."""


TRAIN_AXES: Axes = (None, None, 0, 0)
"""The axes of (constants, state, pool, batches)."""


def by_pmap(function: Callable, in_axes: Axes, donate_argnums: tuple[int, ...] = ()) -> Callable:
    """Maps `function` over all devices.

    Args:
      function: takes one device's share of the split arguments, and returns the same results on
        all devices.
      in_axes: see `Axes`. Split arguments are [local devices, ...].
      donate_argnums: positions of arguments whose memory the results may reuse.
    """
    return jax.pmap(
        function,
        axis_name='batch',
        in_axes=in_axes,
        out_axes=None,
        donate_argnums=donate_argnums,
    )


def by_shard_map(
    function: Callable,
    in_axes: Axes,
    donate_argnums: tuple[int, ...] = (),
    devices: list[jax.Device] | None = None,
) -> Callable:
    """Does the same as `by_pmap` with a `jit` of a `shard_map`, over all devices or these."""
    mesh = Mesh(devices or jax.devices(), ('batch',))
    replicated, split = PartitionSpec(), PartitionSpec('batch')
    specs = tuple(replicated if axis is None else split for axis in in_axes)

    def on_one_device(*arguments):
        own = (
            argument if axis is None else jax.tree.map(lambda x: x[0], argument)
            for argument, axis in zip(arguments, in_axes, strict=True)
        )
        return function(*own)

    mapped = jax.jit(
        jax.shard_map(
            on_one_device, mesh=mesh, in_specs=specs, out_specs=replicated, check_vma=False
        ),
        donate_argnums=donate_argnums,
    )
    if jax.process_count() == 1:
        return mapped

    def from_local_arrays(*arguments):
        given = multihost_utils.host_local_array_to_global_array(arguments, mesh, specs)
        return multihost_utils.global_array_to_host_local_array(mapped(*given), mesh, replicated)

    return from_local_arrays


over_devices = by_pmap


def map_train_steps(step_fn: Callable) -> Callable:
    """Maps (constants, state, pool, batches) -> (state, metrics), and donates the old state."""
    return over_devices(step_fn, TRAIN_AXES, donate_argnums=(1,))


def map_eval_step(step_fn: Callable) -> Callable:
    """Maps (state, batch) -> results that `step_fn` sums over or gathers from all devices."""
    return over_devices(step_fn, (None, 0))


def map_input_step(step_fn: Callable) -> Callable:
    """Maps (constants, batch) -> results that `step_fn` gathers from all devices."""
    return over_devices(step_fn, (None, 0))

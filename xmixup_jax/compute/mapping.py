"""The one place where functions of one device are mapped over all devices.

The functions know nothing of it but the name of the axis, 'batch'. `pmap` is in maintenance: since
JAX 0.8 it is a `jit` of a `shard_map`. For the JAX that drops it there is a twin: change the line
`over_devices = by_pmap` to `by_shard_map`.

Replicated arguments and results have no leading device axis (`None` in `in_axes`), the natural form
for `shard_map`, so that nothing is ever indexed by device.
"""

from collections.abc import Callable

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, PartitionSpec

Axes = tuple[int | None, ...]
"""For each argument 0, divided over the devices along its first axis, or None, replicated."""


TRAIN_AXES: Axes = (None, None, 0, 0)
"""Of (constants, state, pool, batches)."""


def by_pmap(function: Callable, in_axes: Axes, donate_argnums: tuple[int, ...] = ()) -> Callable:
    """Maps `function` over all devices.

    Args:
      function: of one device's share of the divided arguments. Its results are the same on all
        devices.
      in_axes: see `Axes`. Divided arguments are [local devices, ...].
      donate_argnums: arguments whose memory the results may take.
    """
    return jax.pmap(
        function,
        axis_name='batch',
        in_axes=in_axes,
        out_axes=None,
        donate_argnums=donate_argnums,
    )


def by_shard_map(
    function: Callable, in_axes: Axes, donate_argnums: tuple[int, ...] = ()
) -> Callable:
    """Like `by_pmap`, as a `jit` of a `shard_map`."""
    mesh = Mesh(jax.devices(), ('batch',))
    replicated, divided = PartitionSpec(), PartitionSpec('batch')
    specs = tuple(replicated if axis is None else divided for axis in in_axes)

    def of_one_device(*arguments):
        own = (
            argument if axis is None else jax.tree.map(lambda x: x[0], argument)
            for argument, axis in zip(arguments, in_axes, strict=True)
        )
        return function(*own)

    mapped = jax.jit(
        jax.shard_map(
            of_one_device, mesh=mesh, in_specs=specs, out_specs=replicated, check_vma=False
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
    """Maps (constants, state, pool, batches) -> (state, metrics); donates the old state."""
    return over_devices(step_fn, TRAIN_AXES, donate_argnums=(1,))


def map_eval_step(step_fn: Callable) -> Callable:
    """Maps (state, batch) -> anything summed over, or gathered from, all devices."""
    return over_devices(step_fn, (None, 0))


def map_input_step(step_fn: Callable) -> Callable:
    """Maps batch -> anything gathered from all devices."""
    return over_devices(step_fn, (0,))

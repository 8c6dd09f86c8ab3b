"""Measures what a training step costs: compile time, median time after warm-up, and memory."""

import contextlib
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import ConfigDict
from tqdm import tqdm

from xmixup_jax.compute import step as step_lib
from xmixup_jax.compute.mapping import map_train_steps
from xmixup_jax.methods.find import method_of

PyTree = Any
WARM_UP = 3
ROUNDS = (5, 30)  # minimum and maximum number of timed rounds
SECONDS = 120.0  # after this time, stop at the minimum
BATCHES = 4


class StepCost(NamedTuple):
    """The cost of one method's training step."""

    compile_seconds: float
    step_ms: float
    """Median, with the data already on the device."""
    step_ms_spread: float
    """Interquartile range."""
    memory_mb: float
    """MiB of the compiled step on one device: arguments, outputs and temporaries."""
    gbytes: float = 0.0
    """Memory traffic in 10**9 bytes: what the kernels of the compiled step read and write. Library
    kernels (on a GPU, cuDNN's convolutions) are not counted."""


class StepInputs(Protocol):
    """Everything a step needs except its batches, such as `run.start.Start`."""

    @property
    def task(self) -> step_lib.Task: ...

    @property
    def state(self) -> step_lib.TrainState: ...

    @property
    def constants(self) -> PyTree: ...


def measure_steps(starts: Mapping[str, StepInputs], batches: list[PyTree]) -> dict[str, StepCost]:
    """Measures one training step of each method.

    The methods take turns, so that a slow moment of the machine affects all of them alike.

    Args:
      starts: the inputs of each method's step, by the method's name.
      batches: on the devices, each from `devices.shard_steps` of one step, with the entries that
        any of the methods uses.
    """
    costs, steps, states = {}, {}, {}
    for name, start in tqdm(starts.items(), desc='compiling', unit='method', disable=None):
        inputs = drop_unused(batches[0], start.task.config)
        begun = time.perf_counter()
        with _no_compilation_cache():
            # `Task.train_steps` may be compiled already; a new mapping is not.
            mapped: Any = map_train_steps(partial(step_lib.train_steps, start.task))
            steps[name] = mapped.lower(start.constants, start.state, {}, inputs).compile()
        compile_seconds = time.perf_counter() - begun
        bytes_accessed = (steps[name].cost_analysis() or {}).get('bytes accessed', 0.0)
        costs[name] = StepCost(
            compile_seconds,
            step_ms=0.0,
            step_ms_spread=0.0,
            memory_mb=memory_mib(steps[name]),
            gbytes=bytes_accessed / 1e9,
        )
        states[name] = start.state

    def run(name: str, i: int) -> None:
        inputs = drop_unused(batches[i % len(batches)], starts[name].task.config)
        states[name], metrics = steps[name](starts[name].constants, states[name], {}, inputs)
        jax.block_until_ready((states[name], metrics))

    times = in_turns({name: partial(run, name) for name in steps})
    for name, values in times.items():
        low, median, high = np.percentile(values, (25, 50, 75))
        costs[name] = costs[name]._replace(step_ms=median, step_ms_spread=high - low)
    return costs


def memory_mib(compiled: jax.stages.Compiled) -> float:
    """The memory that a compiled program needs on each device, in MiB."""
    memory: Any = compiled.memory_analysis()
    total = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
    )
    return total / 2**20


def gflop(function: Callable, *args: PyTree) -> float:
    """Counts the floating-point operations of a function, in 10**9.

    XLA counts them in the lowered program for a CPU. JAX offers this count before compilation on
    CPUs only, and a compiled GPU program hides the operations inside cuDNN.

    Args:
      function: lowered for the count, but not called.
      args: its arguments, or their shapes and dtypes.
    """
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)
    with jax.default_device(jax.local_devices(backend='cpu')[0]):
        cost = jax.jit(function).lower(*shapes).cost_analysis()
    assert cost is not None  # XLA counts on CPUs
    return cost['flops'] / 1e9


def in_turns(actions: dict[str, Callable[[int], None]]) -> dict[str, list[float]]:
    """Times every action once a round, in random order, since each may slow down the next one.

    Each action is called twice in its turn, and the second call is timed: in the first one, caches
    and memory are still those of another action.

    Args:
      actions: by name; each is called with the number of the round.

    Returns:
      the times of each action in ms, without the WARM_UP rounds.
    """
    times: dict[str, list[float]] = {name: [] for name in actions}
    least, most = ROUNDS
    rng = np.random.default_rng(0)
    started = time.perf_counter()
    for i in tqdm(range(WARM_UP + most), desc='timing', unit='round', disable=None):
        if i >= WARM_UP + least and time.perf_counter() - started > SECONDS:
            break
        for name in rng.permutation(list(actions)):
            actions[name](i)
            begun = time.perf_counter()
            actions[name](i)
            times[name].append(1e3 * (time.perf_counter() - begun))
    return {name: values[WARM_UP:] for name, values in times.items()}


@contextlib.contextmanager
def _no_compilation_cache():
    """Disables JAX's cache of compiled programs on disk."""
    enabled = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]  # dynamic
    try:
        jax.config.update('jax_enable_compilation_cache', False)
        compilation_cache.reset_cache()  # JAX reads the setting only once otherwise
        yield
    finally:
        jax.config.update('jax_enable_compilation_cache', enabled)
        compilation_cache.reset_cache()


def drop_unused(batch: PyTree, config: ConfigDict) -> PyTree:
    """Drops the source images and labels from a batch if the method does not use them."""
    if method_of(config).pairs:
        return batch
    return {key: value for key, value in batch.items() if not key.startswith('source_')}

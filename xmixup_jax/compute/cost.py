"""What a training step costs: compile time apart, median time after warm-up, memory."""

import contextlib
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from tqdm import tqdm

from xmixup_jax.compute import step as step_lib
from xmixup_jax.compute.mapping import map_train_steps
from xmixup_jax.methods.find import method_of

PyTree = Any
WARM_UP = 3
ROUNDS = (5, 30)  # at least and at most, and no more than the least after so many seconds
SECONDS = 120.0
BATCHES = 4


class StepCost(NamedTuple):
    """The cost of one method's training step."""

    compile_seconds: float
    step_ms: float
    """Median, data on the device already."""
    step_ms_spread: float
    """Interquartile range."""
    memory_mb: float
    """Of the compiled step on one device: arguments, outputs and temporaries, in 2**20 bytes."""
    gbytes: float = 0.0
    """10**9 bytes that the kernels of the compiled step read and write, without those of libraries
    (on a GPU cuDNN's convolutions)."""


class Stepped(Protocol):
    """What a step runs on, such as `run.start.Start`."""

    @property
    def task(self) -> step_lib.Task: ...

    @property
    def state(self) -> step_lib.TrainState: ...

    @property
    def constants(self) -> PyTree: ...


def measure_steps(starts: Mapping[str, Stepped], batches: list[PyTree]) -> dict[str, StepCost]:
    """Times one step of each method, in turns, so that a slow moment of the machine hits all alike.

    Args:
      starts: what each method's step runs on.
      batches: on the devices, `devices.shard_steps` of one step each, with what any method uses.
    """
    costs, steps, states = {}, {}, {}
    for name, start in tqdm(starts.items(), desc='compiling', unit='method', disable=None):
        inputs = only_used(batches[0], start)
        begun = time.perf_counter()
        with _no_compilation_cache():
            # A mapping of its own, which this process has not compiled yet.
            mapped: Any = map_train_steps(partial(step_lib.train_steps, start.task))
            steps[name] = mapped.lower(start.constants, start.state, {}, inputs).compile()
        compile_seconds = time.perf_counter() - begun
        memory = steps[name].memory_analysis()
        bytes_accessed = (steps[name].cost_analysis() or {}).get('bytes accessed', 0.0)
        total = (
            memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            + memory.temp_size_in_bytes
            - memory.alias_size_in_bytes
        )
        costs[name] = StepCost(
            compile_seconds,
            step_ms=0.0,
            step_ms_spread=0.0,
            memory_mb=total / 2**20,
            gbytes=bytes_accessed / 1e9,
        )
        states[name] = start.state

    def run(name: str, i: int) -> None:
        inputs = only_used(batches[i % len(batches)], starts[name])
        states[name], metrics = steps[name](starts[name].constants, states[name], {}, inputs)
        jax.block_until_ready((states[name], metrics))

    times = in_turns({name: partial(run, name) for name in steps})
    for name, values in times.items():
        low, median, high = np.percentile(values, (25, 50, 75))
        costs[name] = costs[name]._replace(step_ms=median, step_ms_spread=high - low)
    return costs


def gflop(function: Callable, *args: PyTree) -> float:
    """10**9 floating-point operations of a function, as XLA counts them in its program for a CPU.

    Counted before it is compiled, which JAX does for a CPU alone: of a GPU's compiled program those
    inside cuDNN are not known.

    Args:
      function: is lowered, not called.
      args: its arguments, or their shapes and types.
    """
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)
    with jax.default_device(jax.local_devices(backend='cpu')[0]):
        cost = jax.jit(function).lower(*shapes).cost_analysis()
    assert cost is not None  # XLA counts on CPUs
    return cost['flops'] / 1e9


def in_turns(actions: dict[str, Callable[[int], None]]) -> dict[str, list[float]]:
    """Times each action in each round, in a new order: one is slower after another that has filled
    the caches.

    Args:
      actions: called with the number of the round.

    Returns:
      the times in ms, without those of WARM_UP rounds.
    """
    times: dict[str, list[float]] = {name: [] for name in actions}
    least, most = ROUNDS
    rng = np.random.default_rng(0)
    started = time.perf_counter()
    for i in tqdm(range(WARM_UP + most), desc='timing', unit='round', disable=None):
        if i >= WARM_UP + least and time.perf_counter() - started > SECONDS:
            break
        for name in rng.permutation(list(actions)):
            begun = time.perf_counter()
            actions[name](i)
            times[name].append(1e3 * (time.perf_counter() - begun))
    return {name: values[WARM_UP:] for name, values in times.items()}


@contextlib.contextmanager
def _no_compilation_cache():
    """Nothing is found in, or added to, the compiled programs on disk."""
    enabled = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]  # dynamic
    try:
        jax.config.update('jax_enable_compilation_cache', False)
        compilation_cache.reset_cache()  # JAX looks at the setting once
        yield
    finally:
        jax.config.update('jax_enable_compilation_cache', enabled)
        compilation_cache.reset_cache()


def only_used(batch: PyTree, start: Stepped) -> PyTree:
    """The batch without pairs, if the method uses none."""
    if method_of(start.task.config).pairs:
        return batch
    return {key: value for key, value in batch.items() if not key.startswith('source_')}

"""Compares XLA's and cuDNN's attention in a vision transformer, forward and backward:

    python -m benchmarks.attention --config=configs/aircraft.py --config.model.name=vit_b16 \\
        --config.batch_size=128 --config.precision=bfloat16

One row per form, of one layer: milliseconds for the value with its gradients (minimum of ten), the
ratio to XLA's, and the largest difference of output and gradients from float32 arithmetic, relative
to their largest value. cuDNN's form needs a GPU and bfloat16; elsewhere its row is missing.

  --config   experiment file, and any --config.KEY=VALUE; the network is a vision transformer
  --output   CSV file to write
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import synthetic
from xmixup_jax.cli.flags import read_command
from xmixup_jax.cli.program import run_and_exit
from xmixup_jax.devices import chosen_precision
from xmixup_jax.errors import ConfigError
from xmixup_jax.models.vit import VARIANTS


def both(form: str, qkv: jax.Array, grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns attention, [B, N, heads, D], and the gradient by qkv, [3, B, N, heads, D]."""
    attention = partial(jax.nn.dot_product_attention, implementation=form)
    out, vjp = jax.vjp(lambda qkv: attention(*qkv), qkv)
    return out, vjp(grad)[0]


def measure(form: str, qkv: jax.Array, grad: jax.Array, expected) -> dict[str, float | str]:
    """The row of a form; `expected` is what `both` returns in float32."""
    function = jax.jit(partial(both, form))
    milliseconds = 1e3 * synthetic.seconds_of(function, qkv, grad)
    differences = [
        float(jnp.abs(ours.astype(jnp.float32) - theirs).max() / jnp.abs(theirs).max())
        for ours, theirs in zip(function(qkv, grad), expected, strict=True)
    ]
    return {'form': form, 'ms': milliseconds, 'difference': max(differences)}


def run(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog='attention', add_help=False)
    parser.add_argument('--output', type=Path)
    args, rest = parser.parse_known_args(argv)
    config, _ = read_command(rest)
    variant = VARIANTS.get(config.model.name)
    if variant is None:
        raise ConfigError(
            f'config.model.name={config.model.name} has no attention: use one of '
            f'{", ".join(VARIANTS)}'
        )
    precision = chosen_precision(config.precision)
    tokens = 1 + variant.registers + (config.image_size // variant.patch) ** 2
    shape = (config.batch_size, tokens, variant.heads, variant.width // variant.heads)
    rng = np.random.default_rng(0)
    qkv, grad = (jnp.asarray(rng.normal(size=size), precision) for size in ((3, *shape), shape))
    with jax.default_matmul_precision('highest'):
        exact = jax.jit(partial(both, 'xla'))(*(x.astype(jnp.float32) for x in (qkv, grad)))
    forms = ['xla']
    if jax.default_backend() == 'gpu' and precision == 'bfloat16':
        forms.append('cudnn')
    rows = [measure(form, qkv, grad, exact) for form in forms]
    rows = [row | {'ratio': row['ms'] / rows[0]['ms']} for row in rows]
    print(f'{config.model.name}: {shape}, {precision}, {jax.devices()[0].device_kind}')
    synthetic.write_table(rows, args.output)


if __name__ == '__main__':
    run_and_exit(run, sys.argv)

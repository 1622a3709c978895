"""How long a run will take, said before it starts, and in what it multiplies."""

import contextlib
import functools
import json
import os
import pathlib
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from models import chips

# Share of the machine's own product rate that a whole step reaches: what is not a product
# (attention's softmax, norms, the optimizer) costs the rest. Of SmolLM2 on 2 CPU
# cores; runs took 0.8 to 1.6 times what it predicts, compilation included.
STEP_EFFICIENCY = 0.4


@functools.cache
def product_rate(dtype: str) -> float:
  """FLOP/s of one product with operands of `dtype` on the default device, timed in under 1 s.

  Timed once in a process.
  """
  size = 1024 if jax.default_backend() == 'cpu' else 8192
  x = jnp.ones((size, size), dtype)
  product = jax.jit(lambda x: jnp.dot(x, x, preferred_element_type=jnp.float32))
  product(x).block_until_ready()
  best = float('inf')
  for _ in range(5):
    start = time.perf_counter()
    product(x).block_until_ready()
    best = min(best, time.perf_counter() - start)
  return 2 * size**3 / best


def settle_dtype(
  dtype: str, workdir: str | os.PathLike | None = None, *,
  key: str = 'dtype', own_kernels: Callable[[], bool] = lambda: False,
) -> str:
  """What a run multiplies in where its config says 'auto', 'bfloat16' or 'float32'.

  A CPU whose instructions have no bfloat16 multiplies float32 faster (two cores with AVX2: 170
  against 105 GFLOP/s; with AVX-512 and bfloat16: 440 against 960), but decodes bfloat16 three times
  as fast where the kernels of `models.native` do it. A run keeps what it began with, also on
  another machine, or its second half would not be that of an uninterrupted one.

  Args:
    dtype: of the config.
    workdir: the run's folder, whose config.json says what an earlier start took; None: there is
      none.
    key: under which it says so.
    own_kernels: whether those of `models.native` multiply, asked on a CPU alone.
  """
  if dtype != 'auto':
    return dtype
  before = None
  if workdir is not None:
    # A broken one is said where the folder is opened.
    with contextlib.suppress(OSError, ValueError, AttributeError):
      before = json.loads((pathlib.Path(workdir) / 'config.json').read_text()).get(key)
  if before in ('bfloat16', 'float32'):
    return before
  if jax.default_backend() != 'cpu' or own_kernels():
    return 'bfloat16'
  return max(('bfloat16', 'float32'), key=product_rate)


def peak_rate(dtype: str, measured: float) -> float | None:
  """FLOP/s of one device at its best, of which a step's share is its MFU; None: not known.

  Args:
    dtype: operands of the products.
    measured: of `product_rate`; a CPU's, whose makers state none.
  """
  if jax.default_backend() == 'cpu':
    return measured
  return chips.peak_flops(jax.devices()[0].device_kind) if dtype == 'bfloat16' else None


def predict_seconds(flops: float, rate: float) -> float:
  """Seconds that a run of so many FLOPs takes, without compilation.

  Args:
    flops: as `cost.train_flops` counts them.
    rate: FLOP/s of a product on all devices together.
  """
  return flops / (rate * STEP_EFFICIENCY)

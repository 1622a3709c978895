"""How long a run will take, said before it starts."""

import time

import jax
import jax.numpy as jnp

from models import chips

# Share of the machine's own product rate that a whole step reaches: what is not a product
# (attention's softmax, norms, the optimizer) costs the rest. Of SmolLM2 on 2 CPU
# cores; runs took 0.8 to 1.6 times what it predicts, compilation included.
STEP_EFFICIENCY = 0.4


def product_rate(dtype: str) -> float:
  """FLOP/s of one product with operands of `dtype` on the default device, timed in under 1 s."""
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

"""How long a run will take, said before it starts."""

import time

import jax
import jax.numpy as jnp

from models.decoder import DecoderConfig
from models.lora import LoraConfig

# Share of the machine's own product rate that a whole step reaches: what is not a product
# (attention's softmax, norms, the optimizer) costs the rest. Of SmolLM2 on 2 CPU
# cores; runs took 0.8 to 1.6 times what it predicts, compilation included.
STEP_EFFICIENCY = 0.4

# Dense bfloat16 products of one JAX device, by its `device_kind`, as the makers state them.
PEAKS = {
  'TPU v4': 275e12,
  'TPU v5 lite': 197e12,
  'TPU v5': 459e12,
  'TPU v6 lite': 918e12,
  'NVIDIA A100-SXM4-80GB': 312e12,
  'NVIDIA H100 80GB HBM3': 989e12,
  'NVIDIA H200': 989e12,
}


def train_flops(
  config: DecoderConfig,
  lora: LoraConfig | None,
  num_places: int,
  num_loss_places: int,
  row_len: int,
) -> float:
  """Floating point operations of the products in training.

  Forward and input gradients of the blocks, all three products of the adapter, attention, and the
  head with its input gradient for the loss tokens; the kernels' gradients where they are trained.

  Args:
    config: the architecture.
    lora: the adapter; None where there is none.
    num_places: places of all rows, padding included.
    num_loss_places: places of all loss budgets.
    row_len: places of one row.
  """
  heads, kv_heads = (n * config.head_dim for n in (config.num_heads, config.num_kv_heads))
  embed, mlp = config.embed_dim, config.mlp_dim
  shapes = {
    'q': (embed, heads),
    'k': (embed, kv_heads),
    'v': (embed, kv_heads),
    'o': (heads, embed),
    'gate': (embed, mlp),
    'up': (embed, mlp),
    'down': (mlp, embed),
  }
  products = 4 if config.frozen else 6
  layer = sum(products * a * b for a, b in shapes.values())
  if lora is not None:
    layer += sum(6 * (a + b) * lora.rank for name, (a, b) in shapes.items() if name in lora.targets)
  layer += 6 * 2 * row_len * heads
  head = products * embed * config.vocab_size
  return num_places * config.num_layers * layer + num_loss_places * head


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
  return PEAKS.get(jax.devices()[0].device_kind) if dtype == 'bfloat16' else None


def predict_seconds(flops: float, rate: float) -> float:
  """Seconds that a run of so many FLOPs takes, without compilation.

  Args:
    flops: as `train_flops` counts them.
    rate: FLOP/s of a product on all devices together.
  """
  return flops / (rate * STEP_EFFICIENCY)

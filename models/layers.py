"""Building blocks of the decoder: products, projections with adapters, norms, rotary positions.

Axes: B batch, T new tokens, N query heads, K key-value heads, H head width, D embedding,
F feed-forward width, V vocabulary, R adapter rank, L layers.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from models import lora as lora_lib


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """Llama 3.1's stretching of the low rotary frequencies (`rope_type: llama3`)."""

  factor: float
  low_freq_factor: float
  high_freq_factor: float
  original_max_position: int


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _fast_product(x: jax.Array, kernel: jax.Array, frozen: bool) -> jax.Array:
  """bfloat16 x bfloat16 -> float32; see `matmul`."""
  return _dot(x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16))


def _dot(x: jax.Array, kernel: jax.Array) -> jax.Array:
  return jax.lax.dot_general(
    x, kernel, (((x.ndim - 1,), (0,)), ((), ())), preferred_element_type=jnp.float32
  )


def _fast_product_fwd(x, kernel, frozen):
  x16, kernel16 = x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)
  return _dot(x16, kernel16), (None if frozen else x16, kernel16)


def _fast_product_bwd(frozen, residuals, grad):
  x16, kernel16 = residuals
  grad16 = grad.astype(jnp.bfloat16)
  contract_out = (((grad.ndim - 1,), (1,)), ((), ()))
  dx = jax.lax.dot_general(grad16, kernel16, contract_out, preferred_element_type=jnp.float32)
  if frozen:
    return dx, None
  x16 = x16.reshape(-1, x16.shape[-1])
  grad16 = grad16.reshape(-1, grad16.shape[-1])
  contract_rows = (((0,), (0,)), ((), ()))
  return dx, jax.lax.dot_general(x16, grad16, contract_rows, preferred_element_type=jnp.float32)


_fast_product.defvjp(_fast_product_fwd, _fast_product_bwd)


def matmul(x: jax.Array, kernel: jax.Array, dtype: str, *, frozen: bool) -> jax.Array:
  """x [..., in] times kernel [in, out] -> float32 [..., out], in the compute dtype.

  With 'bfloat16' all three products (forward, input gradient, kernel gradient) take bfloat16
  operands and accumulate in float32: the cotangent of such a product is float32, and without a rule
  that casts it the backward products would leave the fast path.

  Args:
    x: float32 activations.
    kernel: [in, out], any float dtype.
    dtype: 'float32' or 'bfloat16', the dtype of the operands.
    frozen: the kernel is a constant of training: its gradient is never formed and reads as zero.
  """
  if dtype == 'float32':
    return _dot(x, jax.lax.stop_gradient(kernel).astype(dtype) if frozen else kernel)
  if math.prod(x.shape[:-1]) == 1 and jax.default_backend() == 'cpu':
    # XLA's bfloat16 matrix-vector product on CPU converts the kernel to float32 first. 576 x 1536,
    # kernels streamed from memory, us a product (bfloat16 / float32): 1 row 1517 / 121, 2 rows
    # 133 / 182, 8 rows 163 / 275, 32 rows 214 / 411, 1024 rows 3822 / 7714. A second, empty row
    # is all it takes.
    rows = jnp.concatenate([x.reshape(1, -1), jnp.zeros((1, x.shape[-1]), x.dtype)])
    y = _fast_product(rows, kernel, frozen)[:1]
    return y.reshape(*x.shape[:-1], kernel.shape[1])
  return _fast_product(x, kernel, frozen)


class Linear(nnx.Module):
  """A frozen projection, optionally with a bias and a trained low-rank adapter."""

  def __init__(
    self,
    in_dim: int,
    out_dim: int,
    axes: tuple[str, str],
    *,
    config,
    lora: lora_lib.LoraConfig | None,
    bias: bool = False,
    rngs: nnx.Rngs,
  ):
    self.dtype = config.dtype
    self.lora = lora
    kernel = jax.random.normal(rngs.params(), (in_dim, out_dim), jnp.float32) * in_dim**-0.5
    self.kernel = nnx.Param(kernel.astype(config.weight_dtype), out_sharding=axes)
    self.bias = nnx.Param(jnp.zeros((out_dim,)), out_sharding=axes[1:]) if bias else None
    if lora is not None:
      lora_a = lora_lib.init_lora_a(rngs.params(), in_dim, lora.rank)
      self.lora_a = nnx.LoRAParam(lora_a, out_sharding=(axes[0], 'rank'))
      self.lora_b = nnx.LoRAParam(jnp.zeros((lora.rank, out_dim)), out_sharding=('rank', axes[1]))

  def __call__(self, x: jax.Array, adapter_x: jax.Array | None = None) -> jax.Array:
    """float32 [..., in] -> float32 [..., out]; `adapter_x` is x after the adapter's dropout."""
    y = matmul(x, self.kernel.get_value(), self.dtype, frozen=True)
    if self.bias is not None:
      y += self.bias.get_value()
    if self.lora is not None:
      inner = x if adapter_x is None else adapter_x
      inner = matmul(inner, self.lora_a.get_value(), self.dtype, frozen=False)
      y += matmul(inner * self.lora.scale, self.lora_b.get_value(), self.dtype, frozen=False)
    return y


class RMSNorm(nnx.Module):
  """Root mean square norm (arXiv 1910.07467) in float32."""

  def __init__(self, dim: int, eps: float):
    self.eps = eps
    self.scale = nnx.Param(jnp.ones((dim,)), out_sharding=('embed',))

  def __call__(self, x: jax.Array) -> jax.Array:
    x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
    return x * self.scale.get_value()


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> jax.Array:
  """Inverse frequencies, float32 [H/2], with Llama 3.1's scaling if asked for."""
  freqs = 1.0 / theta ** (jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
  if scaling is None:
    return freqs
  wavelength = 2 * math.pi / freqs
  low = scaling.original_max_position / scaling.low_freq_factor
  high = scaling.original_max_position / scaling.high_freq_factor
  smooth = (scaling.original_max_position / wavelength - scaling.low_freq_factor) / (
    scaling.high_freq_factor - scaling.low_freq_factor
  )
  blended = (1 - smooth) * freqs / scaling.factor + smooth * freqs
  scaled = jnp.where(wavelength > low, freqs / scaling.factor, freqs)
  return jnp.where((wavelength <= low) & (wavelength >= high), blended, scaled)


def rope_tables(
  positions: jax.Array, head_dim: int, theta: float, scaling: RopeScaling | None
) -> tuple[jax.Array, jax.Array]:
  """cos and sin, float32 [B, T, 1, H/2], of positions int32 [B, T]."""
  angles = positions[..., None, None] * rope_frequencies(head_dim, theta, scaling)
  return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
  """Rotates x [B, T, heads, H]; the two halves of H are the pairs (the Hugging Face layout)."""
  cos, sin = tables
  first, second = jnp.split(x, 2, axis=-1)
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

"""Building blocks of the decoder: products, projections with adapters, norms.

Axes: B batch, T new tokens, N query heads, K key-value heads, H head width, D embedding,
F feed-forward width, V vocabulary, R adapter rank, L layers.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from models import lora as lora_lib
from models import platform, quantise


def to_bits(x: jax.Array) -> jax.Array:
  """A bfloat16 array as uint16 on CPU, for what crosses a loop's boundary; else the array.

  XLA's CPU backend slices, gathers and updates bfloat16 by converting the whole array to float32
  and back: a stack of L residuals is then converted L times, L x L residuals in all.
  """
  if x.dtype == jnp.bfloat16 and platform.name() == 'cpu':
    return jax.lax.bitcast_convert_type(x, jnp.uint16)
  return x


def from_bits(x: jax.Array) -> jax.Array:
  """Undoes `to_bits`."""
  return jax.lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x


def _dot(x: jax.Array, kernel: jax.Array) -> jax.Array:
  return jax.lax.dot_general(
    x, kernel, (((x.ndim - 1,), (0,)), ((), ())), preferred_element_type=jnp.float32
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _product(x: jax.Array, kernel: jax.Array, dtype: str, frozen: bool) -> jax.Array:
  """`matmul` with operands of `dtype`."""
  kernel = from_bits(kernel).astype(dtype)
  return _precise_dot(x, kernel) if dtype == 'float32' else _dot(x.astype(dtype), kernel)


def _product_fwd(x, kernel, dtype, frozen):
  # A kernel stays as it came, so that a scan does not copy it; of x, what the gradient multiplies.
  kept = None if frozen else to_bits(x.astype(dtype))
  return _product(x, kernel, dtype, frozen), (kept, kernel)


def _product_bwd(dtype, frozen, residuals, grad):
  x, kernel = residuals
  kernel = from_bits(kernel).astype(dtype)
  grad = grad.astype(dtype)
  contract_out = (((grad.ndim - 1,), (1,)), ((), ()))
  dx = jax.lax.dot_general(grad, kernel, contract_out, preferred_element_type=jnp.float32)
  if frozen:
    return dx, None
  x = from_bits(x)
  return dx, sum_over_rows(x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1]))


def sum_over_rows(x: jax.Array, grad: jax.Array) -> jax.Array:
  """The transpose of x [rows, in] times grad [rows, out] -> float32 [in, out].

  On CPU the narrower factor, which an adapter's makes cheap, is `transposed`. 2304 rows, 16 x 1536,
  one core: 1.0 ms instead of 3.4.
  """
  if platform.name() != 'cpu':
    contract_rows = (((0,), (0,)), ((), ()))
    return jax.lax.dot_general(x, grad, contract_rows, preferred_element_type=jnp.float32)
  if x.shape[1] <= grad.shape[1]:
    return _dot(transposed(x), grad)
  return jax.lax.optimization_barrier(_dot(transposed(grad), x)).T


def transposed(x: jax.Array) -> jax.Array:
  """x [..., rows, n] -> [..., n, rows], the left factor of a product of bfloat16 on CPU.

  XLA's CPU backend multiplies bfloat16 where both factors lie row by row, and float32 copies of
  them where one does not. It undoes a transposition that it sees, hence the barrier, and lays the
  result of a plain one out as the input lies, which a reshape ends.
  """
  shape = (*x.shape[:-2], x.shape[-1], x.shape[-2])
  moved = jnp.moveaxis(x[..., None, :, :], -1, -3)
  return jax.lax.optimization_barrier(moved.reshape(shape))


_product.defvjp(_product_fwd, _product_bwd)


def _precise_dot(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """A float32 product; on CPU, long sums are added up in four parts.

  float32 is the precision in which other implementations are compared with. XLA's CPU backend adds
  up all of a sum in one order, and SmolLM2's first token has activations in the thousands: its
  logits came out 1.8e-4 from float64's, in four parts 0.8e-4, as PyTorch's do.
  """
  length = kernel.shape[0]
  if length < 512 or length % 4 or platform.name() != 'cpu':
    return _dot(x, kernel)
  parts = zip(jnp.split(x, 4, axis=-1), jnp.split(kernel, 4), strict=True)
  a, b, c, d = (_dot(*part) for part in parts)
  return (a + b) + (c + d)


def matmul(x: jax.Array, kernel: jax.Array, dtype: str, *, frozen: bool) -> jax.Array:
  """x [..., in] times kernel [in, out] -> float32 [..., out], in the compute dtype.

  With 'bfloat16' all three products (forward, input gradient, kernel gradient) take bfloat16
  operands and accumulate in float32: the cotangent of such a product is float32, and without a rule
  that casts it the backward products would leave the fast path.

  Args:
    x: float32 activations.
    kernel: [in, out], any float dtype, or bits.
    dtype: 'float32' or 'bfloat16', the dtype of the operands.
    frozen: the kernel is a constant of training: its gradient is never formed and reads as zero.
  """
  if math.prod(x.shape[:-1]) == 1 and dtype == 'bfloat16' and platform.name() == 'cpu':
    # XLA's bfloat16 matrix-vector product on CPU converts the kernel to float32 first. 576 x 1536,
    # kernels streamed from memory, us a product (bfloat16 / float32): 1 row 1517 / 121, 2 rows
    # 133 / 182, 8 rows 163 / 275, 32 rows 214 / 411, 1024 rows 3822 / 7714. A second, empty row
    # is all it takes.
    rows = jnp.concatenate([x.reshape(1, -1), jnp.zeros((1, x.shape[-1]), x.dtype)])
    y = _product(rows, kernel, dtype, frozen)[:1]
    return y.reshape(*x.shape[:-1], kernel.shape[1])
  return _product(x, kernel, dtype, frozen)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def quantised_matmul(
  x: jax.Array, codes: jax.Array, scale: jax.Array, kind: str, dtype: str
) -> jax.Array:
  """`matmul` with a frozen kernel that is kept as `quantise.quantise` gives it.

  The kernel is made in each direction anew, so that a scan over layers keeps the codes alone.
  """
  kernel = quantise.dequantise(codes, from_bits(scale), kind).astype(dtype)
  return matmul(x, kernel, dtype, frozen=True)


def _quantised_matmul_fwd(x, codes, scale, kind, dtype):
  return quantised_matmul(x, codes, scale, kind, dtype), (codes, scale)


def _quantised_matmul_bwd(kind, dtype, residuals, grad):
  codes, scale = residuals
  kernel = quantise.dequantise(codes, from_bits(scale), kind).astype(dtype)
  contract_out = (((grad.ndim - 1,), (1,)), ((), ()))
  dx = jax.lax.dot_general(
    grad.astype(dtype), kernel, contract_out, preferred_element_type=jnp.float32)
  return dx, None, None


quantised_matmul.defvjp(_quantised_matmul_fwd, _quantised_matmul_bwd)


def matmul_transposed(x: jax.Array, kernel: jax.Array, dtype: str) -> jax.Array:
  """x [..., in] times the transpose of kernel [out, in] -> float32 [..., out]; no gradient rule.

  A tied head contracted where it lies: through `matmul` XLA's CPU backend writes the transpose out
  first, 14.5 instead of 8.9 ms a core for 32 rows x 49,152 tokens.
  """
  rows = x.reshape(-1, x.shape[-1])
  count = rows.shape[0]
  if count == 1 and dtype == 'bfloat16' and platform.name() == 'cpu':
    rows = jnp.concatenate([rows, jnp.zeros_like(rows)])  # see `matmul`
  y = jax.lax.dot_general(
    rows.astype(dtype),
    kernel.astype(dtype),
    (((1,), (1,)), ((), ())),
    preferred_element_type=jnp.float32,
  )
  return y[:count].reshape(*x.shape[:-1], kernel.shape[0])


class Linear(nnx.Module):
  """A projection, optionally with a bias and a trained low-rank adapter."""

  def __init__(
    self,
    in_dim: int,
    out_dim: int,
    axes: tuple[str, str],
    *,
    config,
    lora: lora_lib.LoraConfig | None,
    bias: bool = False,
    quantization: str = 'none',
    rngs: nnx.Rngs,
  ):
    self.dtype, self.frozen = config.dtype, config.frozen
    self.lora, self.quantization = lora, quantization
    kernel = jax.random.normal(rngs.params(), (in_dim, out_dim), jnp.float32) * in_dim**-0.5
    if quantization == 'none':
      self.kernel = nnx.Param(kernel.astype(config.weight_dtype), out_sharding=axes)
    else:
      codes, scale = quantise.quantise(kernel, quantization)
      self.kernel = nnx.Param(codes, out_sharding=axes)
      self.kernel_scale = nnx.Param(scale, out_sharding=axes)
    self.bias = nnx.Param(jnp.zeros((out_dim,)), out_sharding=axes[1:]) if bias else None
    if lora is not None:
      lora_a = lora_lib.init_lora_a(rngs.params(), in_dim, lora.rank)
      self.lora_a = nnx.LoRAParam(lora_a, out_sharding=(axes[0], 'rank'))
      self.lora_b = nnx.LoRAParam(jnp.zeros((lora.rank, out_dim)), out_sharding=('rank', axes[1]))

  def __call__(
    self, x: jax.Array, adapter_x: jax.Array | None = None, gates: jax.Array | None = None
  ) -> jax.Array:
    """float32 [..., in] -> float32 [..., out]; the rest as for `project`."""
    return project((self,), x, adapter_x, gates)[0]

  def base(self, x: jax.Array) -> jax.Array:
    """What comes out without the adapter."""
    kernel = self.kernel.get_value()
    if self.quantization == 'none':
      y = matmul(x, kernel, self.dtype, frozen=self.frozen)
    else:
      scale = self.kernel_scale.get_value()
      y = quantised_matmul(x, kernel, scale, self.quantization, self.dtype)
    return y if self.bias is None else y + self.bias.get_value()


def project(
  linears: Sequence[Linear],
  x: jax.Array,
  adapter_x: jax.Array | None = None,
  gates: jax.Array | None = None,
) -> list[jax.Array]:
  """The results of projections that read the same input: q, k and v, or gate and up.

  Their adapters' first factors, side by side, are one product, forward and backward; each keeps its
  own, as PEFT has it. The kernels stay apart: one of both would save nothing (2048 rows, gate and
  up of SmolLM2, bfloat16, one CPU core: 20.5 against 19.4 ms forward, 52 against 22 ms backward,
  where the two gradients are first to be laid side by side), and queries, keys and values side by
  side would have to be interleaved for `tensor` to split each by its heads.

  Args:
    linears: with the same config; those with adapters have them of the same shape.
    x: float32 [..., in].
    adapter_x: x after the adapters' dropout; None is x.
    gates: float32 [..., R], what each row multiplies the columns between the factors by, where an
      adapter is several (`models.adapters`).

  Returns:
    float32 [..., out] of each.
  """
  results = [linear.base(x) for linear in linears]
  adapted = [i for i, linear in enumerate(linears) if linear.lora is not None]
  if not adapted:
    return results
  first = linears[adapted[0]]
  kernels = [linears[i].lora_a.get_value() for i in adapted]
  kernel = kernels[0] if len(kernels) == 1 else jnp.concatenate(kernels, axis=1)
  inner = matmul(x if adapter_x is None else adapter_x, kernel, first.dtype, frozen=False)
  parts = jnp.split(inner * first.lora.scale, len(adapted), axis=-1)
  for i, part in zip(adapted, parts, strict=True):
    part = part if gates is None else part * gates
    results[i] += matmul(part, linears[i].lora_b.get_value(), first.dtype, frozen=False)
  return results


# Elementwise work is cheaper done again in the backward pass than kept: a norm keeps its input, the
# gate its two.
@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=2)
def _rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
  return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps) * scale


def _gate(gate: jax.Array, up: jax.Array, activation: str) -> jax.Array:
  if activation == 'gelu_tanh':
    return jax.nn.gelu(gate, approximate=True) * up
  return jax.nn.silu(gate) * up


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def gated(gate: jax.Array, up: jax.Array, activation: str, dtype: str) -> jax.Array:
  """silu(gate) * up (SwiGLU, arXiv 2002.05202), or with GELU's tanh form ('gelu_tanh').

  Args:
    gate: float32 [..., F].
    up: float32 [..., F].
    activation: 'silu' or 'gelu_tanh'.
    dtype: in which the two are kept for the backward pass: that of the products' operands.

  Returns:
    float32 [..., F].
  """
  return _gate(gate, up, activation)


def _gated_fwd(gate, up, activation, dtype):
  return _gate(gate, up, activation), (to_bits(gate.astype(dtype)), to_bits(up.astype(dtype)))


def _gated_bwd(activation, dtype, residuals, grad):
  del dtype
  gate, up = (from_bits(x).astype(jnp.float32) for x in residuals)
  return jax.vjp(functools.partial(_gate, activation=activation), gate, up)[1](grad)


gated.defvjp(_gated_fwd, _gated_bwd)


class RMSNorm(nnx.Module):
  """Root mean square norm (arXiv 1910.07467) in float32."""

  def __init__(self, dim: int, config, axis: str = 'embed'):
    """Of vectors of `dim` numbers, which lie along the logical axis `axis`."""
    self.eps, self.offset = config.norm_eps, config.norm_offset
    scale = jnp.zeros((dim,)) if self.offset else jnp.ones((dim,))
    self.scale = nnx.Param(scale, out_sharding=(axis,))

  def __call__(self, x: jax.Array) -> jax.Array:
    scale = self.scale.get_value()
    return _rms_norm(x, 1 + scale if self.offset else scale, self.eps)

"""Building blocks of the decoder: products, projections with adapters, norms.

Axes: B batch, T new tokens, N query heads, K key-value heads, H head width, D embedding,
F feed-forward width, V vocabulary, R adapter rank, L layers.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from models import lora as lora_lib
from models import native, platform, quantise


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


def _dot_transposed(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """x [..., out] times the transpose of kernel [in, out]."""
  return jax.lax.dot_general(
    x, kernel, (((x.ndim - 1,), (1,)), ((), ())), preferred_element_type=jnp.float32
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _product(x: jax.Array, kernel: jax.Array, dtype: str, frozen: bool) -> jax.Array:
  """`matmul` with operands of `dtype`."""
  kernel = from_bits(kernel).astype(dtype)
  return _precise_dot(x, kernel) if dtype == 'float32' else _dot(x.astype(dtype), kernel)


def _product_fwd(x, kernel, dtype, frozen):
  # In four parts, which the forward rules around this one (`recomputed`, `quantised_matmul`) still
  # take, a float32 training step takes 9 % longer on two cores with AVX2, and its losses
  # are no nearer to another implementation's.
  product = _dot(x.astype(dtype), from_bits(kernel).astype(dtype))
  # A kernel stays as it came, so that a scan does not copy it; of x, what the gradient multiplies.
  kept = None if frozen else to_bits(x.astype(dtype))
  return product, (kept, kernel)


def _product_bwd(dtype, frozen, residuals, grad):
  x, kernel = residuals
  kernel = from_bits(kernel).astype(dtype)
  grad = grad.astype(dtype)
  dx = _dot_transposed(grad, kernel)
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
  """x [..., rows, n] -> [..., n, rows], `rearranged` for a product."""
  return rearranged(x, (*range(x.ndim - 2), x.ndim - 1, x.ndim - 2))


def rearranged(x: jax.Array, axes: Sequence[int]) -> jax.Array:
  """x with its axes in another order, as a factor of a product of bfloat16 on CPU.

  XLA's CPU backend multiplies bfloat16 where both factors lie row by row, and float32 copies of
  them where one does not. It undoes a transposition that it sees, hence the barrier, and lays the
  result of a plain one out as the input lies, which a reshape ends.
  """
  moved = jnp.transpose(x, axes)
  if platform.name() != 'cpu':
    return moved
  # A unit axis before the first one that moves, and behind it in the end.
  first = next(i for i, axis in enumerate(axes) if axis != i)
  place = [axis + (axis >= first) for axis in axes]
  place.insert(first + 1, first)
  return jax.lax.optimization_barrier(
    jnp.transpose(jnp.expand_dims(x, first), place).reshape(moved.shape))


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
  return _dot_transposed(grad.astype(dtype), kernel), None, None


quantised_matmul.defvjp(_quantised_matmul_fwd, _quantised_matmul_bwd)


def matmul_native(
  x: jax.Array,
  kernels: Sequence[jax.Array],
  *,
  norm: tuple[jax.Array, float] | None = None,
  residual: jax.Array | None = None,
  activation: str = '',
  counts: jax.Array | None = None,
) -> list[jax.Array]:
  """`native.products` of x float32 [..., in]; by XLA for more rows than it is made for.

  What `counts` [...] leaves out may be anything finite.
  """
  rows = math.prod(x.shape[:-1])
  if rows <= native.max_rows():
    if residual is not None:
      residual = residual.reshape(rows, -1)
    if counts is not None:
      counts = counts.reshape(rows)
    results = native.products(
      x.reshape(rows, -1), kernels, norm=norm, residual=residual, activation=activation,
      counts=counts)
    return [y.reshape(*x.shape[:-1], -1) for y in results]
  if norm is not None:
    x = _rms_norm(x, *norm)
  results = [matmul_transposed(x, from_bits(kernel), 'bfloat16') for kernel in kernels]
  if activation:
    results = [gated(*results, activation)]
  return results if residual is None else [residual + y for y in results]


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
    transposed: bool = False,
    rngs: nnx.Rngs,
  ):
    """A kernel [in, out] with logical `axes`; `transposed`: [out, in], for `matmul_native`."""
    self.transposed = transposed
    self.dtype, self.frozen = config.dtype, config.frozen
    self.lora, self.quantization = lora, quantization
    kernel = jax.random.normal(rngs.params(), (in_dim, out_dim), jnp.float32) * in_dim**-0.5
    if transposed:
      self.kernel = nnx.Param(kernel.T.astype(config.weight_dtype), out_sharding=axes[::-1])
    elif quantization == 'none':
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
    """What comes out without adapter and bias."""
    kernel = self.kernel.get_value()
    if self.quantization == 'none':
      return matmul(x, kernel, self.dtype, frozen=self.frozen)
    scale = self.kernel_scale.get_value()
    return quantised_matmul(x, kernel, scale, self.quantization, self.dtype)

  def biased(self, y: jax.Array) -> jax.Array:
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
  adapted = [i for i, linear in enumerate(linears) if linear.lora is not None]
  if gates is None and _joins(linears, x):
    return _joined(linears, x, adapter_x)
  if linears[0].transposed:
    results = matmul_native(x, [linear.kernel.get_value() for linear in linears])
  else:
    results = [linear.base(x) for linear in linears]
  results = [linear.biased(y) for linear, y in zip(linears, results, strict=True)]
  if not adapted:
    return results
  first = linears[adapted[0]]
  kernel = _side_by_side([linears[i].lora_a.get_value() for i in adapted])
  inner = matmul(x if adapter_x is None else adapter_x, kernel, first.dtype, frozen=False)
  parts = jnp.split(inner * first.lora.scale, len(adapted), axis=-1)
  for i, part in zip(adapted, parts, strict=True):
    part = part if gates is None else part * gates
    results[i] += matmul(part, linears[i].lora_b.get_value(), first.dtype, frozen=False)
  return results


def _side_by_side(kernels: Sequence[jax.Array]) -> jax.Array:
  return kernels[0] if len(kernels) == 1 else jnp.concatenate(kernels, axis=1)


# On CPU, where memory is what a step waits for, a product of an adapter's rank costs little, and
# its result, as large as the kernel's, a lot: kernel and factor, one behind the other along the
# summed axis, are one product. For fewer rows, copying the kernel would cost more.
_JOINED_ROWS = 512
_JOINED_MULTIPLE = 32  # Of the summed axis, for which the CPU's matrix instructions are made.


def _joins(linears: Sequence[Linear], x: jax.Array) -> bool:
  # On a mesh kernel and factor may be split otherwise.
  one_cpu = platform.name() == 'cpu' and jax.sharding.get_abstract_mesh().size <= 1
  return one_cpu and math.prod(x.shape[:-1]) >= _JOINED_ROWS and all(
    linear.lora is not None and linear.quantization == 'none' and not linear.transposed
    and linear.frozen and linear.dtype == 'bfloat16' for linear in linears)


def _joined(
  linears: Sequence[Linear], x: jax.Array, adapter_x: jax.Array | None
) -> list[jax.Array]:
  """`project` with joined products."""
  rows = lambda z: z.reshape(-1, z.shape[-1])
  kernels = tuple(linear.kernel.get_value() for linear in linears)
  a = _side_by_side([linear.lora_a.get_value() for linear in linears])
  b = tuple(linear.lora_b.get_value() for linear in linears)
  scale = linears[0].lora.scale
  if len(linears) == 1 and adapter_x is None:
    results = [_adapted_product(rows(x), kernels[0], a, b[0], scale)]
  else:
    adapter_x = None if adapter_x is None else rows(adapter_x)
    results = _adapted_products(rows(x), adapter_x, kernels, a, b, scale)
  results = [y.reshape(*x.shape[:-1], -1) for y in results]
  return [linear.biased(y) for linear, y in zip(linears, results, strict=True)]


def _operand(x: jax.Array) -> jax.Array:
  """x in bfloat16. The barrier: XLA would put two of them together first and then convert."""
  return jax.lax.optimization_barrier(x.astype(jnp.bfloat16))


def _beside(first: jax.Array, second: jax.Array, axis: int) -> jax.Array:
  """Two factors of bfloat16 as one along a summed axis, filled up with zeros."""
  widths = [(0, 0), (0, 0)]
  widths[axis] = (0, -(first.shape[axis] + second.shape[axis]) % _JOINED_MULTIPLE)
  return jnp.concatenate([first, jnp.pad(second, widths)], axis=axis)


def _joined_kernels(
  kernels: Sequence[jax.Array], b: Sequence[jax.Array]
) -> list[jax.Array]:
  """Each kernel with its factor below, in the factor's rows of all: [in + n R and more, out]."""
  joined, rank = [], b[0].shape[0]
  for i, (kernel, own) in enumerate(zip(kernels, b, strict=True)):
    own = jnp.pad(own.astype(jnp.bfloat16), ((i * rank, (len(b) - 1 - i) * rank), (0, 0)))
    joined.append(_beside(from_bits(kernel).astype(jnp.bfloat16), own, 0))
  return joined


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _adapted_products(x, adapter_x, kernels, a, b, scale: float):
  """x kernel_i + scale (adapter_x a_i) b_i of several projections.

  Args:
    x: float32 [rows, in].
    adapter_x: likewise; None is x.
    kernels: n times [in, out_i], frozen.
    a: float32 [in, n R].
    b: n times float32 [R, out_i].
    scale: static.

  Returns:
    n times float32 [rows, out_i].
  """
  return _adapted_products_fwd(x, adapter_x, kernels, a, b, scale)[0]


def _adapted_products_fwd(x, adapter_x, kernels, a, b, scale):
  x, adapter_x = _operand(x), None if adapter_x is None else _operand(adapter_x)
  read = x if adapter_x is None else adapter_x
  inner = _operand(_dot(read, a.astype(jnp.bfloat16)) * scale)
  both = _beside(x, inner, 1)
  results = [_dot(both, kernel) for kernel in _joined_kernels(kernels, b)]
  kept = (to_bits(x), None) if adapter_x is None else (None, to_bits(adapter_x))
  return results, (*kept, to_bits(inner), kernels, a, b)


def _adapted_products_bwd(scale, residuals, grads):
  x, adapter_x, inner, kernels, a, b = residuals
  grads = [grad.astype(jnp.bfloat16) for grad in grads]
  both = sum(map(_dot_transposed, grads, _joined_kernels(kernels, b)))
  width = kernels[0].shape[0]
  dx, dinner = both[:, :width], both[:, width:width + a.shape[1]]
  dinner = (dinner * scale).astype(jnp.bfloat16)
  dadapter = _dot_transposed(dinner, a.astype(jnp.bfloat16))
  da = sum_over_rows(from_bits(x if adapter_x is None else adapter_x), dinner)
  rank = b[0].shape[0]
  db = tuple(
    sum_over_rows(from_bits(inner), grad)[i * rank:(i + 1) * rank] for i, grad in enumerate(grads))
  if adapter_x is None:
    dx, dadapter = dx + dadapter, None
  return dx, dadapter, tuple(None for _ in kernels), da, db


_adapted_products.defvjp(_adapted_products_fwd, _adapted_products_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _adapted_product(x, kernel, a, b, scale: float) -> jax.Array:
  """x kernel + scale (x a) b of one projection: float32 [rows, in] -> float32 [rows, out]."""
  return _adapted_product_fwd(x, kernel, a, b, scale)[0]


def _adapted_product_fwd(x, kernel, a, b, scale):
  x = _operand(x)
  inner = (_dot(x, a.astype(jnp.bfloat16)) * scale).astype(jnp.bfloat16)
  y = _dot(x, from_bits(kernel).astype(jnp.bfloat16)) + _dot(inner, b.astype(jnp.bfloat16))
  return y, (to_bits(x), to_bits(inner), kernel, a, b)


def _adapted_product_bwd(scale, residuals, grad):
  x, inner, kernel, a, b = residuals
  grad = _operand(grad)
  dinner = _operand(_dot_transposed(grad, b.astype(jnp.bfloat16)) * scale)
  kernel = _beside(from_bits(kernel).astype(jnp.bfloat16), a.astype(jnp.bfloat16), 1)
  dx = _dot_transposed(_beside(grad, dinner, 1), kernel)
  return dx, None, sum_over_rows(from_bits(x), dinner), sum_over_rows(from_bits(inner), grad)


_adapted_product.defvjp(_adapted_product_fwd, _adapted_product_bwd)


# Elementwise work is cheaper done again in the backward pass than kept: a norm keeps its input, the
# feed-forward its two.
@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=2)
def _rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
  return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps) * scale


def gated(gate: jax.Array, up: jax.Array, activation: str) -> jax.Array:
  """silu(gate) * up (SwiGLU, arXiv 2002.05202), or with GELU's tanh form ('gelu_tanh').

  float32 [..., F], all three.
  """
  if activation == 'gelu_tanh':
    return jax.nn.gelu(gate, approximate=True) * up
  return jax.nn.silu(gate) * up


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def recomputed(
  function: Callable[..., jax.Array], dtype: str, activations: Sequence[jax.Array], rest: Any
) -> jax.Array:
  """function(activations, rest), of which nothing but the arguments is kept for the backward pass.

  Args:
    function: closes over no array.
    dtype: in which the activations are kept: that of the products' operands.
    activations: float32 arrays.
    rest: the other arguments, kept as they come.
  """
  return function(activations, rest)


def _recomputed_fwd(function, dtype, activations, rest):
  kept = [to_bits(x.astype(dtype)) for x in activations]
  return function(activations, rest), (kept, rest)


def _recomputed_bwd(function, dtype, residuals, grad):
  del dtype
  kept, rest = residuals
  activations = [from_bits(x).astype(jnp.float32) for x in kept]
  return jax.vjp(function, activations, rest)[1](grad)


recomputed.defvjp(_recomputed_fwd, _recomputed_bwd)


class RMSNorm(nnx.Module):
  """Root mean square norm (arXiv 1910.07467) in float32."""

  def __init__(self, dim: int, config, axis: str = 'embed'):
    """Of vectors of `dim` numbers, which lie along the logical axis `axis`."""
    self.eps, self.offset = config.norm_eps, config.norm_offset
    scale = jnp.zeros((dim,)) if self.offset else jnp.ones((dim,))
    self.scale = nnx.Param(scale, out_sharding=(axis,))

  @property
  def factors(self) -> tuple[jax.Array, float]:
    """The scale, float32 [dim], and what is added to the mean of the squares."""
    scale = self.scale.get_value()
    return 1 + scale if self.offset else scale, self.eps

  def __call__(self, x: jax.Array) -> jax.Array:
    return _rms_norm(x, *self.factors)

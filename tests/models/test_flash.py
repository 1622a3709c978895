"""The kernel for GPUs, interpreted, against plain attention; and what compilers make of it."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import flash, sharding
from tests.models.test_attention import plain


def draw(batch, width, heads, kv_heads, head_dim):
  rng = np.random.default_rng(0)
  shapes = [(batch, width, n, head_dim) for n in (heads, kv_heads, kv_heads)]
  return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def segments_of(batch, width):
  """A short segment, one that crosses blocks, one token alone, and what is filled up."""
  ends = np.array([width // 5, width - 9, width - 8])
  rows = [np.searchsorted(ends - 3 * row, np.arange(width), side='right') for row in range(batch)]
  return np.stack(rows).astype(np.int32)


def kernel(q, k, v, segment_ids, window=0):
  q = (q * q.shape[-1] ** -0.5).astype(k.dtype)
  out = flash.flash_attention(q, k, v, segment_ids, window=window, interpret=True)
  assert out.dtype == k.dtype
  return out.astype(jnp.float32)


def check(q, k, v, *, window=0, dtype=jnp.float32, value_atol=1e-5, atol=1e-4):
  segment_ids = segments_of(*q.shape[:2])
  weight = np.random.default_rng(9).normal(size=q.shape).astype(np.float32)
  q, k, v = (x.astype(dtype).astype(np.float32) for x in (q, k, v))

  def loss(function):
    def run(q, k, v):
      out = function(q, k, v)
      return jnp.sum(weight * out), out

    return jax.jit(jax.value_and_grad(run, (0, 1, 2), has_aux=True))

  ours = lambda q, k, v: kernel(q, k.astype(dtype), v.astype(dtype), segment_ids, window)
  theirs = functools.partial(plain, segment_ids=segment_ids, window=window)
  (_, got), grads = loss(ours)(q, k, v)
  (_, want), want_grads = loss(theirs)(q, k, v)
  np.testing.assert_allclose(got, want, atol=value_atol)
  for ours, theirs in zip(grads, want_grads, strict=True):
    np.testing.assert_allclose(ours, theirs, atol=atol)


def test_value_and_gradient_equal_plain():
  check(*draw(2, 150, heads=6, kv_heads=2, head_dim=16), window=40)


@pytest.mark.slow
@pytest.mark.parametrize(
  ('width', 'heads', 'kv_heads', 'head_dim', 'window'),
  [(1, 2, 1, 64, 0), (200, 6, 2, 16, 0), (64, 1, 1, 64, 0), (127, 4, 4, 64, 0), (385, 7, 1, 128, 0),
   (300, 4, 2, 48, 0), (300, 4, 2, 48, 130), (200, 2, 1, 256, 0), (200, 2, 1, 8, 1)])
def test_other_shapes_equal_plain(width, heads, kv_heads, head_dim, window):
  q, k, v = draw(1, width, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
  check(q, k, v, window=window, atol=3e-4)


@pytest.mark.slow
@pytest.mark.parametrize(('head_dim', 'window'), [(64, 0), (128, 150), (256, 0)])
def test_bfloat16_equals_plain_within_its_rounding(head_dim, window):
  q, k, v = draw(2, 300, heads=4, kv_heads=2, head_dim=head_dim)
  check(q, k, v, window=window, dtype=jnp.bfloat16, value_atol=0.03, atol=0.08)


def test_nothing_leaks_between_segments():
  q, k, v = draw(1, 200, heads=2, kv_heads=1, head_dim=16)
  segment_ids = np.repeat([1, 2, 0], [70, 100, 30])[None]
  attend = jax.jit(functools.partial(kernel, segment_ids=segment_ids))
  before = attend(q, k, v)
  others = np.repeat([100.0, 0.0, -100.0], [70, 100, 30])[None, :, None, None]
  after = attend(q, *(np.where(others, others, x).astype(np.float32) for x in (k, v)))
  np.testing.assert_array_equal(before[:, 70:170], after[:, 70:170])
  assert np.isfinite(after).all() and not np.allclose(before[:, :70], after[:, :70])


def test_a_leak_would_be_seen(monkeypatch):
  intervals = flash._intervals

  def leaky(segment_ids, window):
    low, high = intervals(segment_ids, window)
    return jnp.maximum(low - 1, 0), high

  monkeypatch.setattr(flash, '_intervals', leaky)
  q, k, v = draw(1, 60, heads=1, kv_heads=1, head_dim=16)
  segment_ids = segments_of(1, 60)
  got = jax.jit(kernel)(q, k, v, segment_ids)
  with pytest.raises(AssertionError):
    np.testing.assert_allclose(got, jax.jit(plain)(q, k, v, segment_ids), atol=1e-2)


@pytest.mark.parametrize('window', [0, 7])
def test_a_row_is_described_by_intervals(window):
  segment_ids = np.array([[1] * 5 + [2] * 30 + [3] + [0] * 4, [7] * 40])
  low, high = jax.jit(flash._intervals, static_argnums=1)(jnp.asarray(segment_ids), window)
  keys, queries = np.arange(40), np.arange(40)[:, None]
  seen = (segment_ids[:, :, None] == segment_ids[:, None]) & (keys <= queries)
  if window:
    seen &= keys > queries - window
  np.testing.assert_array_equal(low, seen.argmax(axis=2))
  np.testing.assert_array_equal(high, 40 - seen[:, ::-1].argmax(axis=1))
  # On this the bounds of the loops rely.
  assert (np.diff(low) >= 0).all() and (np.diff(high) >= 0).all()


@pytest.mark.slow
def test_keys_outside_the_blocks_of_a_segment_are_not_read():
  q, k, v = draw(1, 256, heads=1, kv_heads=1, head_dim=16)
  segment_ids = np.repeat([1, 2], 128)[None]
  weight = np.repeat([0.0, 1.0], 128)[None, :, None, None]
  loss = lambda *qkv: jnp.sum(weight * kernel(*qkv, segment_ids))
  gradient = jax.jit(jax.grad(loss, (0, 1, 2)))
  want = gradient(q, k, v)
  others = np.repeat([np.nan, 0.0], 128).astype(np.float32)[None, :, None, None]
  got = gradient(q, k + others, v + others)
  for ours, theirs in zip(got, want, strict=True):
    np.testing.assert_array_equal(ours[:, 128:], theirs[:, 128:])


@pytest.mark.slow
def test_on_a_mesh_each_device_computes_its_rows_and_heads():
  q, k, v = draw(4, 150, heads=4, kv_heads=2, head_dim=16)
  segment_ids = segments_of(4, 150)
  loss = lambda q, k, v: jnp.sum(jnp.sin(kernel(q, k, v, segment_ids)))
  both = lambda q, k, v: (kernel(q, k, v, segment_ids), jax.grad(loss, (0, 1, 2))(q, k, v))
  want = jax.jit(both)(q, k, v)
  with jax.set_mesh(sharding.make_mesh(2, 2, 2)):
    got = jax.jit(both)(q, k, v)
  for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
  assert got[0].sharding.spec[2] == 'tensor'


def lower_for_cuda(width, heads, kv_heads, head_dim, dtype):
  shapes = [
    jax.ShapeDtypeStruct((1, width, n, head_dim), dtype) for n in (heads, kv_heads, kv_heads)]
  segment_ids = jax.ShapeDtypeStruct((1, width), jnp.int32)
  loss = lambda q, k, v, s: flash.flash_attention(q, k, v, s).astype(jnp.float32).sum()
  traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*shapes, segment_ids)
  return traced.lower(lowering_platforms=('cuda',)).as_text()


# Later versions of jax compile kernels as they lower, which takes the compiler of the CUDA plugin.
@pytest.mark.skipif(
  jax.__version_info__ >= (0, 11) and not importlib.util.find_spec('jax_plugins'),
  reason='this jax lowers for CUDA only where its plugin is installed')
@pytest.mark.parametrize(
  ('width', 'head_dim', 'dtype'),
  [(4096, 128, 'bfloat16'), (1000, 64, 'bfloat16'), (4096, 128, 'float32')])
def test_it_lowers_for_cuda(width, head_dim, dtype):
  text = lower_for_cuda(width, 28, 4, head_dim, jnp.dtype(dtype))
  assert text.count('triton') >= 3  # Three kernels, the custom calls that hold them.
  for name in ('flash_forward', 'flash_dq', 'flash_dkv'):
    assert name in text


@pytest.mark.parametrize(('head_dim', 'window'), [(64, 0), (128, 0), (128, 300), (256, 0)])
def test_on_a_gpu(head_dim, window):
  if jax.default_backend() != 'gpu':
    pytest.skip('needs a GPU')
  q, k, v = draw(2, 1000, heads=14, kv_heads=2, head_dim=head_dim)
  segment_ids = segments_of(2, 1000)
  weight = np.random.default_rng(9).normal(size=q.shape).astype(np.float32)
  q, k, v = (x.astype(jnp.bfloat16).astype(np.float32) for x in (q, k, v))

  def ours(q, k, v):
    q, k, v = (x.astype(jnp.bfloat16) for x in (q * head_dim**-0.5, k, v))
    return flash.flash_attention(q, k, v, segment_ids, window=window).astype(jnp.float32)

  def gradient(function):
    return jax.jit(jax.grad(lambda *qkv: jnp.sum(weight * function(*qkv)), (0, 1, 2)))(q, k, v)

  with jax.default_matmul_precision('highest'):
    want = gradient(functools.partial(plain, segment_ids=segment_ids, window=window))
  for got, true in zip(gradient(ours), want, strict=True):
    np.testing.assert_allclose(got, true, atol=0.02 * float(jnp.abs(true).max()))

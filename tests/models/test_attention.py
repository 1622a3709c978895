import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import attention as attention_lib
from models import sharding
from models.attention import attention, cached_attention, decode_attention
from models.kv_cache import OUTSIDE


def draw(batch, width, heads=6, kv_heads=2, head_dim=8, seed=0):
  keys = jax.random.split(jax.random.key(seed), 3)
  shapes = [(batch, width, n, head_dim) for n in (heads, kv_heads, kv_heads)]
  return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def plain(q, k, v, segment_ids=None, window=None):
  """Repeated keys and values, the whole square, as in a textbook."""
  groups = q.shape[2] // k.shape[2]
  k, v = jnp.repeat(k, groups, axis=2), jnp.repeat(v, groups, axis=2)
  scores = jnp.einsum('btnh,bsnh->bnts', q, k) / jnp.sqrt(q.shape[-1])
  mask = jnp.tril(jnp.ones(scores.shape[-2:], bool))[None]
  if window:
    mask &= jnp.triu(jnp.ones(scores.shape[-2:], bool), 1 - window)[None]
  if segment_ids is not None:
    mask &= segment_ids[:, :, None] == segment_ids[:, None, :]
  weights = jax.nn.softmax(jnp.where(mask[:, None], scores, -jnp.inf), axis=-1)
  return jnp.einsum('bnts,bsnh->btnh', weights, v)


@pytest.mark.parametrize('width', [1, 7, 128, 300])
@pytest.mark.parametrize('packed', [False, True])
def test_value_and_gradient_equal_plain(width, packed):
  q, k, v = draw(2, width)
  segment_ids = None
  if packed:
    segment_ids = jnp.stack([jnp.arange(width) // 50, jnp.minimum(jnp.arange(width) // 110, 1)])
  weight = jax.random.normal(jax.random.key(9), q.shape)

  def value(function):
    return lambda *qkv: jnp.sum(weight * function(*qkv, segment_ids=segment_ids))

  got = jax.jit(attention)(q, k, v, segment_ids=segment_ids)
  np.testing.assert_allclose(got, plain(q, k, v, segment_ids), atol=1e-5)
  for ours, theirs in zip(
    jax.jit(jax.grad(value(attention), (0, 1, 2)))(q, k, v),
    jax.jit(jax.grad(value(plain), (0, 1, 2)))(q, k, v),
    strict=True,
  ):
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize('batch', [1, 2, 3])
def test_blocks_by_ones_and_by_twos_equal_plain(batch):
  """An odd number of blocks is visited one by one; two that read unequally many keys, together."""
  q, k, v = draw(batch, 300)
  lengths = np.random.default_rng(batch).integers(1, 170, (batch, 300))
  ends = lengths.cumsum(axis=1)
  segment_ids = jnp.array([np.searchsorted(own, np.arange(300), side='right') for own in ends])
  weight = jax.random.normal(jax.random.key(9), q.shape)
  loss = lambda function: lambda *qkv: jnp.sum(weight * function(*qkv, segment_ids=segment_ids))
  got, want = (
    jax.jit(jax.value_and_grad(loss(function), (0, 1, 2)))(q, k, v)
    for function in (attention, plain))
  for ours, theirs in zip(*map(jax.tree.leaves, (got, want)), strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-4)


def test_rows_of_very_many_blocks_equal_plain(monkeypatch):
  # As a row of 12,800 tokens is cut: 25 blocks, of which some read one and some read all.
  monkeypatch.setattr(attention_lib, 'MAX_BLOCK', 4)
  assert attention_lib._blocks(100) == (4, 25)
  q, k, v = draw(2, 100)
  segment_ids = jnp.asarray(np.stack([np.arange(100) // 70, np.minimum(np.arange(100) // 9, 1)]))
  weight = jax.random.normal(jax.random.key(9), q.shape)
  loss = lambda function: lambda *qkv: jnp.sum(weight * function(*qkv, segment_ids=segment_ids))
  want = jax.jit(jax.value_and_grad(loss(plain), (0, 1, 2)))(q, k, v)
  got = jax.jit(jax.value_and_grad(loss(attention), (0, 1, 2)))(q, k, v)
  for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_memory_of_long_rows_is_linear_in_their_length():
  def temporaries(width):
    """Bytes that value and gradient of a row take besides their arguments and results."""
    shapes = [jax.ShapeDtypeStruct((1, width, n, 16), jnp.float32) for n in (2, 1, 1)]
    loss = lambda *qkv: jnp.sum(attention(*qkv))
    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*shapes).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  short, long = temporaries(2**14), temporaries(2**15)
  assert long < 2.1 * short
  assert long < 2**33 / 16  # all scores at once would take 8 GiB


def test_nothing_leaks_between_segments():
  q, k, v = draw(1, 200)
  segment_ids = jnp.asarray(np.repeat([1, 2, 0], [70, 100, 30])[None])
  attend = jax.jit(attention)
  before = attend(q, k, v, segment_ids=segment_ids)
  k, v = (x.at[:, :70].set(100.0).at[:, 170:].set(-100.0) for x in (k, v))
  after = attend(q, k, v, segment_ids=segment_ids)
  np.testing.assert_array_equal(before[:, 70:170], after[:, 70:170])
  assert np.isfinite(after).all()


def test_blocks_before_a_segment_are_not_read():
  q, k, v = draw(2, 512)
  # The second row's segments begin one block later: each row goes by its own.
  segment_ids = jnp.asarray(
    np.stack([np.repeat([1, 2], [first, 512 - first]) for first in (256, 384)]))
  weight = jax.random.normal(jax.random.key(9), q.shape)
  attend = functools.partial(attention, segment_ids=segment_ids)
  loss = lambda *qkv: jnp.sum((weight * attend(*qkv))[0, 256:])
  gradient = jax.jit(jax.grad(loss, (0, 1, 2)))
  want = gradient(q, k, v)
  got = gradient(q, k, v.at[0, :256].set(jnp.nan))
  for ours, theirs in zip(got, want, strict=True):
    np.testing.assert_array_equal(ours[0, 256:], theirs[0, 256:])


def test_layers_do_not_keep_the_masks_of_all_blocks():
  q, k, v = draw(1, 384)
  segment_ids = jnp.arange(384)[None] // 100

  def layers(q, k, v):
    body = lambda x, _: (attention(x, k, v, segment_ids=segment_ids), None)
    return jax.lax.scan(body, q, None, length=2)[0].sum()

  text = str(jax.make_jaxpr(jax.grad(layers, (0, 1, 2)))(q, k, v))
  assert '[1,2,3,128,384]' in text  # a block's own scores
  assert not re.search(r'\[3,1,2,3,128,(128|256|384)\]', text)  # three blocks of them


def test_rows_on_a_mesh_equal_plain():
  q, k, v = draw(4, 300)
  segment_ids = jnp.asarray(np.arange(300) // np.array([[40], [130], [170], [300]]))
  mesh = sharding.make_mesh(2, 2, 1)
  loss = lambda function: lambda *qkv: jnp.sum(jnp.sin(function(*qkv, segment_ids=segment_ids)))
  want = jax.jit(jax.value_and_grad(loss(plain), (0, 1, 2)))(q, k, v)
  with jax.set_mesh(mesh):
    place = sharding.batch_sharding(mesh)
    got = jax.jit(jax.value_and_grad(loss(attention), (0, 1, 2)))(*jax.device_put((q, k, v), place))
  for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=1e-4)


def test_bfloat16_operands_float32_result():
  q, k, v = draw(1, 150)
  got = jax.jit(attention)(q, k.astype(jnp.bfloat16), v.astype(jnp.bfloat16))
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(got, plain(q, k, v), atol=0.03)


def test_cached_rows_of_different_lengths():
  q, k, v = draw(3, 40)
  want = plain(q, k, v)
  lengths = jnp.asarray([0, 17, 36])
  new = jnp.stack([jax.lax.dynamic_slice_in_dim(q[b], lengths[b], 4) for b in range(3)])
  got = jax.jit(cached_attention)(new, k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3), lengths)
  for b in range(3):
    np.testing.assert_allclose(got[b], want[b, lengths[b] : lengths[b] + 4], atol=1e-5)


@pytest.mark.parametrize(('width', 'window'), [(300, 140), (40, 3), (40, 1), (40, 40), (40, 99)])
def test_a_sliding_window_equals_plain(width, window):
  q, k, v = draw(1, width)
  segment_ids = jnp.arange(width)[None] // 170
  weight = jax.random.normal(jax.random.key(9), q.shape)

  def loss(function, **options):
    return lambda *qkv: jnp.sum(
      weight * function(*qkv, segment_ids=segment_ids, window=window, **options))

  want, want_grad = jax.jit(jax.value_and_grad(loss(plain), (0, 1, 2)))(q, k, v)
  for options in ({}, {'is_local': jnp.bool_(True)}):
    got, grad = jax.jit(jax.value_and_grad(loss(attention, **options), (0, 1, 2)))(q, k, v)
    np.testing.assert_allclose(got, want, rtol=1e-4)
    for ours, theirs in zip(grad, want_grad, strict=True):
      np.testing.assert_allclose(ours, theirs, atol=1e-4)
  attend = jax.jit(functools.partial(attention, window=window))
  got = attend(q, k, v, segment_ids=segment_ids, is_local=jnp.bool_(False))
  np.testing.assert_allclose(got, plain(q, k, v, segment_ids), atol=1e-5)


@pytest.mark.parametrize('window', [1, 5, 18, 60])
def test_a_sliding_window_over_a_cache_equals_plain(window):
  q, k, v = draw(3, 40)
  want = plain(q, k, v, window=window)
  keys, values = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)
  lengths = jnp.asarray([0, 17, 36])
  new = jnp.stack([jax.lax.dynamic_slice_in_dim(q[b], lengths[b], 4) for b in range(3)])
  got = jax.jit(functools.partial(cached_attention, window=window))(new, keys, values, lengths)
  for b in range(3):
    np.testing.assert_allclose(got[b], want[b, lengths[b] : lengths[b] + 4], atol=1e-5)
  # A prefix of 30, then a tail: the token at index 30 + step.
  lengths = jnp.full(3, 30)
  prefix, tail = (keys[..., :30], values[:, :, :30]), (keys[..., 30:], values[:, :, 30:])
  attend = jax.jit(functools.partial(decode_attention, window=window))
  for step in (0, 7):
    got = attend(q[:, 30 + step][:, None], prefix, tail, lengths, step)
    np.testing.assert_allclose(got[:, 0], want[:, 30 + step], atol=1e-5)
  # Three tokens at once, behind columns with holes: drafts that were rejected.
  columns = jnp.asarray([0, 3, 4, 9, 10, 11])
  places = jnp.full((3, 12), OUTSIDE).at[:, columns].set(30 + jnp.arange(6))
  tail = (jnp.full((*keys.shape[:3], 12), 5.0).at[..., columns].set(keys[..., 30:36]),
          jnp.full((3, values.shape[1], 12, values.shape[3]), 5.0)
          .at[:, :, columns].set(values[:, :, 30:36]))
  got = decode_attention(q[:, 33:36], prefix, tail, lengths, 9, places, window=window)
  np.testing.assert_allclose(got, want[:, 33:36], atol=1e-5)

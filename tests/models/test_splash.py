"""Splash attention, interpreted, against our blocked attention: values, gradients, on a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import attention, sharding, splash


def _inputs(batch, width, heads, kv_heads, head_dim, seed=0):
  rng = np.random.default_rng(seed)
  q, k, v = (jnp.asarray(rng.normal(size=(batch, width, n, head_dim)), jnp.float32)
             for n in (heads, kv_heads, kv_heads))
  segments = np.zeros((batch, width), np.int32)
  segments[:, :width // 3], segments[:, width // 3:-5] = 1, 2
  return q, k, v, jnp.asarray(segments)


def _splash(q, k, v, segments, window=0):
  q = q * q.shape[-1]**-0.5
  return splash.splash_attention(q, k, v, segments, window=window, interpret=True)


def _blocked(q, k, v, segments, window=0):
  return attention.attention(q, k, v, segment_ids=segments, window=window)


@pytest.mark.parametrize(
  ('shape', 'window'),
  [((2, 128, 4, 2, 64), 0), ((1, 200, 3, 1, 128), 0), ((1, 200, 2, 1, 128), 17)])
def test_values_and_gradients_equal_the_blocked_path(shape, window):
  *qkv, segments = _inputs(*shape)
  target = jnp.asarray(np.random.default_rng(1).normal(size=qkv[0].shape), jnp.float32)
  real = (segments > 0)[..., None, None]

  def value_and_grad(function):
    return jax.value_and_grad(
      lambda *qkv: jnp.sum(jnp.where(real, function(*qkv, segments, window), 0) * target),
      argnums=(0, 1, 2))(*qkv)

  (ours, our_grads), (theirs, their_grads) = map(value_and_grad, (_blocked, _splash))
  np.testing.assert_allclose(theirs, ours, rtol=1e-4)
  for a, b in zip(their_grads, our_grads):
    np.testing.assert_allclose(a, b, atol=2e-4)


def test_no_segment_sees_another():
  q, k, v, segments = _inputs(1, 128, 2, 1, 64)
  before = _splash(q, k, v, segments)
  first = segments[0] == 1
  changed = _splash(q, k.at[0, first].add(3.0), v.at[0, first].add(3.0), segments)
  np.testing.assert_array_equal(before[0, ~first], changed[0, ~first])
  assert not np.allclose(before[0, first], changed[0, first])


def test_on_a_mesh_each_device_computes_its_rows_and_heads():
  *qkv, segments = _inputs(4, 128, 4, 2, 64)
  expected = _splash(*qkv, segments)
  mesh = sharding.make_mesh(2, 2, 2)
  with jax.set_mesh(mesh):
    sharded = jax.jit(_splash)(*qkv, segments)
  np.testing.assert_allclose(sharded, expected, atol=1e-6)
  assert sharded.sharding.spec[2] == 'tensor'

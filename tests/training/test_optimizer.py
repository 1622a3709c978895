"""Schedules, AdamW and Muon."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from data.errors import UserError
from training import optimizer


def test_linear_schedule_warms_up_and_ends_near_zero():
  schedule = optimizer.make_schedule('linear', 1e-3, 100, 0.1)
  rates = np.array([schedule(i) for i in range(100)])
  assert rates[0] == pytest.approx(1e-4) and rates.argmax() in (9, 10)
  assert rates.max() == pytest.approx(1e-3)
  assert (np.diff(rates[:10]) > 0).all() and (np.diff(rates[10:]) < 0).all()
  assert 0 < rates[-1] < 2e-5


def test_other_schedules():
  constant = optimizer.make_schedule('constant', 5e-5, 100, 0.0)
  assert [constant(i) for i in (0, 50, 99)] == pytest.approx([5e-5] * 3)
  cosine = optimizer.make_schedule('cosine', 1.0, 10, 0.2)
  assert float(cosine(1)) == pytest.approx(1.0) and float(cosine(6)) == pytest.approx(0.5)
  with pytest.raises(UserError, match='schedule'):
    optimizer.make_schedule('step', 1.0, 10, 0.0)
  with pytest.raises(UserError, match='warmup'):
    optimizer.make_schedule('linear', 1.0, 10, 1.0)


def test_adamw_clips_and_decays():
  schedule = optimizer.make_schedule('constant', 0.1, 10, 0.0)
  params, grads = {'a': jnp.array([2.0, 0.0])}, {'a': jnp.array([0.0, 30.0])}
  for clip_norm in (0.0, 1.0):
    adamw = optimizer.make_optimizer(schedule, weight_decay=0.5, clip_norm=clip_norm)
    updates, _ = adamw.update(grads, adamw.init(params), params)
    np.testing.assert_allclose(updates['a'], [-0.1 * 0.5 * 2.0, -0.1], rtol=1e-4)


def test_muon_moves_all_directions_of_a_matrix_alike():
  rng = np.random.default_rng(0)
  schedule = optimizer.make_schedule('constant', 0.1, 10, 0.0)
  # Two layers of 24 x 8 kernels, gradients with singular values from 1 to 1e-2.
  left, right = np.linalg.qr(rng.normal(size=(2, 24, 8)))[0], np.linalg.qr(
    rng.normal(size=(2, 8, 8)))[0]
  grads = {
    'q': {'kernel': jnp.array(left * np.geomspace(1, 1e-2, 8) @ right)},
    'k': {'bias': jnp.array(rng.normal(size=(2, 8)))},
    'embed': {'embedding': jnp.array(rng.normal(size=(5, 8)))},
    'attn_norm': {'scale': jnp.array(rng.normal(size=(2, 8)))}}
  params = jax.tree.map(jnp.zeros_like, grads)
  options = dict(weight_decay=0.0, clip_norm=0.0)
  muon = optimizer.make_optimizer(schedule, name='muon', **options)
  updates, _ = muon.update(grads, muon.init(params), params)
  step = np.asarray(updates['q']['kernel'])
  values = np.linalg.svd(step, compute_uv=False)
  assert values.min() > 0.4 * values.max()
  assert np.vdot(step, grads['q']['kernel']) < 0  # Downhill.
  # As long as AdamW's steps: 0.4 of the rate, in every layer.
  assert np.sqrt((step ** 2).mean((1, 2))) == pytest.approx([0.04] * 2, rel=0.2)
  adamw = optax.nadamw(schedule, weight_decay=0.0)
  expected, _ = adamw.update(grads, adamw.init(params), params)
  for group in ('k', 'embed', 'attn_norm'):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5),
                 updates[group], expected[group])
  with pytest.raises(UserError, match="optimizer='sgd': choose adamw, muon"):
    optimizer.make_optimizer(schedule, name='sgd', **options)

"""Schedules and AdamW."""

import jax.numpy as jnp
import numpy as np
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

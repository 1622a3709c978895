"""Draws against the distributions they are meant to follow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data.errors import UserError
from inference.sampling import SamplingConfig, _filtered, draw, sample


def keys(n):
  return jax.random.split(jax.random.key(0), n)


def test_greedy_takes_the_first_of_equals_and_gives_the_models_logprob():
  logits = jnp.asarray([[0.0, 3.0, 3.0, -1.0], [5.0, 1.0, 2.0, 0.0]])
  tokens, logprobs = sample(logits, SamplingConfig(), keys(2))
  assert tokens.tolist() == [1, 0] and tokens.dtype == jnp.int32
  want = jax.nn.log_softmax(logits)[jnp.arange(2), tokens]
  np.testing.assert_allclose(logprobs, want, rtol=1e-6)


@pytest.mark.parametrize('config', [
  SamplingConfig(temperature=1.0),
  SamplingConfig(temperature=0.7, top_k=5),
  SamplingConfig(temperature=1.3, top_p=0.8),
  SamplingConfig(temperature=0.9, top_k=40, top_p=0.6),
])
def test_frequencies_follow_the_filtered_distribution(config):
  vocab, draws = 600, 20000
  logits = np.random.default_rng(0).normal(size=vocab).astype(np.float32) * 2.5
  want = reference(logits, config)
  tokens, logprobs = sample(jnp.broadcast_to(logits, (draws, vocab)), config, keys(draws))
  counts = np.bincount(np.asarray(tokens), minlength=vocab)
  assert not counts[want == 0].any()
  # Total variation of an exact sampler with as many draws is about half of sum sqrt(p / n).
  assert np.abs(counts / draws - want).sum() / 2 < np.sqrt(want / draws).sum()
  np.testing.assert_allclose(
    logprobs, np.asarray(jax.nn.log_softmax(logits))[np.asarray(tokens)], atol=1e-5)


def reference(logits, config):
  """Temperature, then top-k, then top-p, by sorting (Holtzman et al., arXiv 1904.09751)."""
  p = np.exp(logits.astype(np.float64) / config.temperature)
  order = np.argsort(-p)
  if config.top_k:
    p[order[config.top_k:]] = 0
  p /= p.sum()
  if config.top_p < 1:
    mass = np.cumsum(p[order])
    p[order[np.searchsorted(mass, config.top_p) + 1:]] = 0
  return p / p.sum()


def test_top_k_keeps_ties_and_one_token_at_the_least():
  weights = jnp.asarray([[1.0, 0.5, 0.5, 0.25], [1.0, 0.0, 0.0, 0.0]])
  kept = _filtered(weights, SamplingConfig(temperature=1.0, top_k=2))
  np.testing.assert_array_equal(kept, [[1.0, 0.5, 0.5, 0.0], [1.0, 0.0, 0.0, 0.0]])
  kept = _filtered(weights, SamplingConfig(temperature=1.0, top_p=1e-6))
  np.testing.assert_array_equal(kept[0], [1.0, 0.0, 0.0, 0.0])


def test_draw_inverts_the_cumulative_distribution_and_never_takes_weight_zero():
  weights = np.zeros((4, 1000), np.float32)
  weights[:, [3, 255, 256, 999]] = [1, 2, 3, 4]
  tokens = draw(jnp.asarray(weights), jnp.asarray([0.0, 0.15, 0.59, 1 - 2**-23], jnp.float32))
  assert tokens.tolist() == [3, 255, 256, 999]
  grid = jnp.linspace(0, 1, 4001)[:-1]
  tokens = np.asarray(draw(jnp.broadcast_to(weights[0], (4000, 1000)), grid))
  np.testing.assert_allclose(
    np.bincount(tokens)[[3, 255, 256, 999]] / 4000, [0.1, 0.2, 0.3, 0.4], atol=1e-3)


@pytest.mark.parametrize('field', [
  dict(temperature=-1.0), dict(temperature=float('nan')), dict(top_p=0.0), dict(top_p=1.5),
  dict(top_k=-1)])
def test_bad_settings_are_named(field):
  with pytest.raises(UserError, match=next(iter(field))):
    SamplingConfig(**field)

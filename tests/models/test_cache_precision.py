"""What a narrower cache costs SmolLM2-135M: its logits over a game, against a float32 cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agents import episode as episode_lib
from agents import expert_episodes, policy
from envs import get_suite
from models import decoder, incremental
from models.kv_cache import KVCache

CHUNK = 64


def logits_of(model, tokens, dtype):
  """float32 [n, V], the tokens read in chunks, each of which attends to what the cache kept."""
  cache = KVCache.init(model.config, 1, len(tokens), dtype)
  step = jax.jit(
    functools.partial(incremental.forward_cached, model.graphdef, model.lora),
    static_argnames='attend_len')
  rows = []
  for start in range(0, len(tokens), CHUNK):
    hidden, cache = step(
      model.frozen, jnp.asarray(tokens[None, start : start + CHUNK]), cache, jnp.asarray([start]),
      jnp.asarray([CHUNK]), attend_len=len(tokens))
    rows.append(decoder.logits(model.graphdef, model.frozen, hidden[0]))
  return np.concatenate(rows)


@pytest.mark.slow
def test_logits_over_narrower_caches(capsys):
  base = policy.load_base('smollm2_135m', dtype='float32')
  suite = get_suite('household', skills='official', num_train=4)
  games = [
    expert_episodes.expert_episode(
      suite, task, base.tokenizer, episode_lib.AgentSpec('react'),
      episode_lib.Labels('expert', 'expert', 'train', 0))
    for task in suite.tasks('train')[:4]]
  tokens = np.asarray(max((game.tokens for game in games), key=len), np.int32)
  tokens = tokens[: len(tokens) // CHUNK * CHUNK]
  assert len(tokens) >= 2 * CHUNK
  model = incremental.prepare_for_decode(base.model())
  exact = logits_of(model, tokens, 'float32')
  log_p = jax.nn.log_softmax(exact)
  for dtype, most in (('bfloat16', 0.02), ('int8', 0.02)):
    found = logits_of(model, tokens, dtype)
    error = np.abs(found - exact)
    divergence = jnp.sum(jnp.exp(log_p) * (log_p - jax.nn.log_softmax(found)), axis=-1)
    same = (found.argmax(-1) == exact.argmax(-1)).mean()
    with capsys.disabled():
      print(
        f'\n{dtype} cache, {len(tokens)} tokens: logits differ by {error.mean():.4f} on average, '
        f'{error.max():.3f} at most; KL {float(divergence.mean()):.2e} nats; '
        f'{100 * same:.1f} % of the first choices equal')
    assert float(divergence.mean()) < most and same > 0.95

"""The frozen-head cross entropy equals the dense one, value and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import hlo, sharding
from training import losses

SHARDS, TOKENS, WIDTH, VOCAB = 2, 11, 16, 37


def dense(hidden, kernel, targets, weights, smoothing):
  logits = jnp.einsum('gmd,vd->gmv', hidden, kernel, precision='highest')
  logprobs = jax.nn.log_softmax(logits)
  wanted = (1 - smoothing) * jax.nn.one_hot(targets, VOCAB) + smoothing / VOCAB
  loss = (-(wanted * logprobs).sum(-1) * weights).sum()
  return loss, ((logits.argmax(-1) == targets) * weights).sum()


@pytest.fixture(scope='module')
def inputs():
  keys = jax.random.split(jax.random.key(0), 3)
  hidden = jax.random.normal(keys[0], (SHARDS, TOKENS, WIDTH)) * 3
  kernel = jax.random.normal(keys[1], (VOCAB, WIDTH))
  targets = jax.random.randint(keys[2], (SHARDS, TOKENS), 0, VOCAB)
  weights = jnp.ones((SHARDS, TOKENS)).at[:, -2:].set(0).at[0, 0].set(0.5)
  return hidden, kernel, targets, weights


def run(function, inputs):
  hidden, *rest = inputs
  value = lambda h: function(h, *rest)
  (loss, correct), grad = jax.jit(jax.value_and_grad(value, has_aux=True))(hidden)
  return np.asarray(loss), np.asarray(correct), np.asarray(grad)


@pytest.mark.parametrize('smoothing', [0.0, 0.1])
@pytest.mark.parametrize('chunk,tile', [(1024, None), (4, 8), (4, 37), (11, 36), (1, 1)])
def test_equals_dense_in_float32(inputs, smoothing, chunk, tile):
  def ours(*args):
    return losses.frozen_head_cross_entropy(
      *args, label_smoothing=smoothing, token_chunk=chunk, vocab_tile=tile
    )

  want = run(lambda *args: dense(*args, smoothing), inputs)
  got = run(ours, inputs)
  np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
  assert got[1] == want[1]
  assert np.abs(got[2] - want[2]).max() <= 1e-5 * np.abs(want[2]).max()


@pytest.mark.parametrize('smoothing', [0.0, 0.1])
def test_a_trained_head_has_the_dense_gradient_too(inputs, smoothing):
  hidden, kernel, *rest = inputs

  def ours(h, k):
    return losses.trained_head_cross_entropy(h, k, *rest, label_smoothing=smoothing)

  value = lambda function: jax.value_and_grad(function, (0, 1), has_aux=True)(hidden, kernel)
  (loss, correct), grads = value(ours)
  (want_loss, want_correct), want = value(lambda h, k: dense(h, k, *rest, smoothing))
  np.testing.assert_allclose(loss, want_loss, rtol=1e-5)
  assert correct == want_correct
  for grad, wanted in zip(grads, want, strict=True):
    assert np.abs(grad - wanted).max() <= 1e-5 * np.abs(wanted).max()
  # The same in bfloat16 products, and the frozen head's loss and gradient.
  ours16 = lambda h, k: losses.trained_head_cross_entropy(
    h, k, *rest, dtype='bfloat16', label_smoothing=smoothing)
  for grad, wanted in zip(value(ours16)[1], want, strict=True):
    assert np.abs(grad - wanted).max() < 3e-2 * np.abs(wanted).max()
  frozen = lambda h, k: losses.frozen_head_cross_entropy(h, k, *rest, label_smoothing=smoothing)
  assert np.abs(value(frozen)[1][0] - grads[0]).max() <= 1e-5 * np.abs(grads[0]).max()


def test_gradient_scales_with_the_cotangent(inputs):
  hidden, *rest = inputs
  twice = lambda h: 2.5 * losses.frozen_head_cross_entropy(h, *rest)[0]
  once = lambda h: losses.frozen_head_cross_entropy(h, *rest)[0]
  np.testing.assert_allclose(jax.grad(twice)(hidden), 2.5 * jax.grad(once)(hidden), rtol=1e-6)


def test_head_is_frozen_and_zero_weights_count_for_nothing(inputs):
  hidden, kernel, targets, weights = inputs
  loss = lambda h, k: losses.frozen_head_cross_entropy(h, k, targets, weights)[0]
  grad_hidden, grad_kernel = jax.grad(loss, (0, 1))(hidden, kernel)
  assert not np.asarray(grad_kernel).any()
  assert not np.asarray(grad_hidden)[:, -2:].any()


def test_large_logits_stay_finite(inputs):
  hidden, kernel, targets, weights = inputs
  loss, _, grad = run(
    lambda *args: losses.frozen_head_cross_entropy(*args, vocab_tile=8),
    (hidden * 1e4, kernel, targets, weights),
  )
  assert np.isfinite(loss) and np.isfinite(grad).all()


def test_bfloat16_is_close_and_takes_bfloat16_products(inputs):
  hidden, kernel, targets, weights = inputs
  kernel16 = kernel.astype(jnp.bfloat16)
  ours = lambda *args: losses.frozen_head_cross_entropy(*args, dtype='bfloat16', vocab_tile=8)
  got = run(ours, (hidden, kernel16, targets, weights))
  want = run(lambda *args: dense(*args, 0.0), (hidden, kernel16.astype('float32'), *inputs[2:]))
  np.testing.assert_allclose(got[0], want[0], rtol=2e-2)
  assert np.abs(got[2] - want[2]).max() < 3e-2 * np.abs(want[2]).max()
  grad = jax.grad(lambda h: ours(h, kernel16, targets, weights)[0])
  operands = jax.jit(grad).lower(hidden).as_text()
  assert 'tensor<2x11x16xbf16>, tensor<8x16xbf16>' in operands


def test_never_holds_logits_of_all_tokens():
  """Temporaries stay far below (tokens, vocabulary) float32."""
  tokens, vocab = 512, 8192
  hidden, kernel = jnp.zeros((1, tokens, WIDTH)), jnp.zeros((vocab, WIDTH))
  targets, weights = jnp.zeros((1, tokens), jnp.int32), jnp.ones((1, tokens))
  loss = lambda h: losses.frozen_head_cross_entropy(
    h, kernel, targets, weights, token_chunk=64, vocab_tile=512
  )[0]
  memory = jax.jit(jax.value_and_grad(loss)).lower(hidden).compile().memory_analysis()
  assert memory.temp_size_in_bytes < tokens * vocab * 4 / 8


@pytest.mark.parametrize('smoothing', [0.0, 0.1])
def test_a_vocabulary_in_shards_is_neither_gathered_nor_are_its_logits(smoothing):
  mesh = sharding.make_mesh(2, 1, 4)
  vocab = 4096
  keys = jax.random.split(jax.random.key(0), 3)
  place = lambda axes, x: jax.device_put(
    x, jax.sharding.NamedSharding(mesh, sharding.spec(axes, x.shape, mesh)))
  hidden = place(('batch', None, None), jax.random.normal(keys[0], (2, 64, WIDTH)))
  kernel = place(('vocab', 'embed'), jax.random.normal(keys[1], (vocab, WIDTH)))
  targets = place(('batch', None), jax.random.randint(keys[2], (2, 64), 0, vocab))
  weights = place(('batch', None), jnp.ones((2, 64)))
  assert kernel.sharding.shard_shape(kernel.shape) == (vocab // 4, WIDTH)
  loss = lambda h, k: losses.frozen_head_cross_entropy(
    h, k, targets, weights, label_smoothing=smoothing, token_chunk=32,
    vocab_tile=losses.default_vocab_tile(vocab, mesh.size))[0]
  with jax.set_mesh(mesh):
    compiled = jax.jit(jax.value_and_grad(loss)).lower(hidden, kernel).compile()
  sent = sum(t.sent for t in hlo.collectives(compiled.as_text(), mesh.size))
  # Sums of a few numbers and of a head row a token; a device's part of the head alone is 64 kB.
  assert 0 < sent < 32_000 < kernel.nbytes / 4 < hidden[..., 0].size * vocab * 4
  value, grad = compiled(hidden, kernel)

  def dense_loss(hidden):
    logits = jnp.matmul(hidden, np.asarray(kernel).T, precision='highest')
    logprobs = jax.nn.log_softmax(logits)
    picked = jnp.take_along_axis(logprobs, np.asarray(targets)[..., None], -1)
    return -((1 - smoothing) * picked.sum() + smoothing * logprobs.mean(-1).sum())

  wanted, wanted_grad = jax.value_and_grad(dense_loss)(np.asarray(hidden))
  np.testing.assert_allclose(value, wanted, rtol=1e-5)
  assert np.abs(grad - wanted_grad).max() <= 1e-5 * np.abs(wanted_grad).max()

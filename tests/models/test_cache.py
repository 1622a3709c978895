import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import decoder, incremental, kv_cache, registry
from models.kv_cache import KVCache
from models.layers import from_bits

SLOTS, MAX_LEN, WIDTH = 3, 24, 8


@functools.cache
def setup(name='qwen25_7b', dtype='float32'):
  config = registry.shrink(registry.get_config(name, dtype=dtype))
  model = decoder.create(config)
  prepared = incremental.prepare_for_decode(model)
  step = jax.jit(
    functools.partial(incremental.forward_cached, prepared.graphdef, prepared.lora),
    static_argnames='attend_len',
  )
  whole = jax.jit(functools.partial(decoder.forward, model.graphdef, model.lora))
  return model, functools.partial(step, prepared.frozen), functools.partial(whole, model.frozen)


def reference(whole, tokens):
  """Hidden states of one sequence of at most MAX_LEN tokens, computed at once: [n, D]."""
  padded = np.zeros((1, MAX_LEN), np.int32)
  padded[0, : len(tokens)] = tokens
  return np.asarray(whole(jnp.asarray(padded), jnp.arange(MAX_LEN)[None]))[0, : len(tokens)]


chunks = st.lists(
  st.tuples(*[st.integers(0, WIDTH)] * SLOTS), min_size=1, max_size=8
)


@hypothesis.settings(max_examples=40)
@hypothesis.given(chunks=chunks, seed=st.integers(0, 2**16), by_slots=st.booleans())
def test_any_split_in_any_composition_equals_the_whole(chunks, seed, by_slots):
  model, step, whole = setup()
  rng = np.random.default_rng(seed)
  sequences = rng.integers(0, 256, (SLOTS, MAX_LEN))
  cache = KVCache.init(model.config, SLOTS, MAX_LEN)
  # What is left from an earlier episode must never be seen.
  cache = jax.tree.map(lambda x: x + 7.0, cache)
  done = np.zeros(SLOTS, np.int32)
  hidden = [np.zeros((0, model.config.embed_dim))] * SLOTS
  for counts in chunks:
    counts = np.minimum(counts, MAX_LEN - done).astype(np.int32)
    tokens = rng.integers(0, 256, (SLOTS, WIDTH))  # The padding is noise.
    for slot in range(SLOTS):
      tokens[slot, : counts[slot]] = sequences[slot, done[slot] : done[slot] + counts[slot]]
    order = rng.permutation(SLOTS) if by_slots else np.arange(SLOTS)
    slots = jnp.asarray(order) if by_slots else None
    out, cache = step(
      jnp.asarray(tokens[order]),
      cache,
      jnp.asarray(done[order]),
      jnp.asarray(counts[order]),
      attend_len=MAX_LEN,
      slots=slots,
    )
    for row, slot in enumerate(order):
      hidden[slot] = np.concatenate([hidden[slot], out[row, : counts[slot]]])
    done += counts
  for slot in range(SLOTS):
    want = reference(whole, sequences[slot, : done[slot]])
    np.testing.assert_allclose(hidden[slot], want, atol=2e-5)


def extend(step, cache, tokens, lengths, counts, attend_len=MAX_LEN, slots=None):
  arrays = (jnp.asarray(x, jnp.int32) for x in (tokens, lengths, counts))
  tokens, lengths, counts = arrays
  slots = None if slots is None else jnp.asarray(slots, jnp.int32)
  return step(tokens, cache, lengths, counts, attend_len=attend_len, slots=slots)


def positions_that_differ(before, after):
  """[slots, max_len] bool: any key or value of any layer changed."""
  pairs = zip(before.v, after.v, strict=True)
  changed = np.stack([np.any(np.asarray(a != b), axis=(1, 3)) for a, b in pairs]).any(0)
  pairs = zip(before.k, after.k, strict=True)
  return changed | np.stack([np.any(np.asarray(a != b), axis=(1, 2)) for a, b in pairs]).any(0)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_only_the_valid_new_positions_change(dtype):
  model, step, _ = setup()
  cache = KVCache.init(model.config, SLOTS, MAX_LEN, dtype)
  tokens = np.ones((SLOTS, WIDTH))
  _, after = extend(step, cache, tokens, lengths=[0, 5, 20], counts=[3, 0, 8])
  want = np.zeros((SLOTS, MAX_LEN), bool)
  want[0, :3] = True
  want[2, 20:] = True  # Four of eight fit; the others are dropped, not wrapped or clamped.
  np.testing.assert_array_equal(positions_that_differ(cache, after), want)
  _, again = extend(step, after, tokens, lengths=[3, 0, 24], counts=[0, 0, 8])
  assert not positions_that_differ(after, again).any()


@pytest.mark.parametrize('compute', ['float32', 'bfloat16'])
def test_int8_keeps_every_number_to_half_a_code(compute):
  config = registry.shrink(registry.get_config('qwen25_7b', dtype=compute))
  (layer, *_) = KVCache.init(config, SLOTS, MAX_LEN, 'int8').layers
  rng = np.random.default_rng(0)
  shape = (SLOTS, WIDTH, config.num_kv_heads, config.head_dim)
  # Heads and positions of very different sizes, one of them all zero.
  sizes = 10.0 ** rng.uniform(-4, 3, shape[:3])
  sizes[0, 0] = 0
  new = (rng.normal(size=(2, *shape)) * sizes[..., None]).astype(np.float32)
  counts = jnp.full(SLOTS, WIDTH, jnp.int32)
  layer = kv_cache.extend(layer, *jnp.asarray(new), 0 * counts, counts, None)
  assert layer.k.dtype == layer.v.dtype == jnp.int8
  held = kv_cache.read(layer, WIDTH, None)
  assert held.k_scale.dtype == compute
  k_scale, v_scale = (np.asarray(scale, np.float32) for scale in held[2:])
  found = (np.asarray(held.k).transpose(0, 3, 1, 2) * k_scale.transpose(0, 2, 1)[..., None],
           np.asarray(held.v).transpose(0, 2, 1, 3) * v_scale.transpose(0, 2, 1)[..., None])
  largest = np.abs(new).max(-1, keepdims=True)
  for got, want, top in zip(found, new, largest, strict=True):
    assert (np.abs(got - want) <= 0.51 / 127 * top).all()


def test_int8_logits_are_close_to_full_precision():
  model, step, whole = setup()
  tokens = np.random.default_rng(0).integers(0, 256, (SLOTS, 2 * WIDTH))
  cache = KVCache.init(model.config, SLOTS, MAX_LEN, 'int8')
  outs = []
  for start in (0, WIDTH):
    lengths = [start] * SLOTS
    out, cache = extend(step, cache, tokens[:, start : start + WIDTH], lengths, [WIDTH] * SLOTS)
    outs.append(out)
  hidden = np.concatenate(outs, axis=1)
  for slot in range(SLOTS):
    logits = [
      np.asarray(decoder.logits(model.graphdef, model.frozen, jnp.asarray(rows)))
      for rows in (hidden[slot], reference(whole, tokens[slot]))]
    error = np.abs(logits[0] - logits[1])
    # Not equal: the codes were read; and within a hundredth of the logits' spread.
    assert 0 < error.max() < 0.05 * logits[1].std()
    assert error.mean() < 0.01 * logits[1].std()


def test_rows_of_few_slots():
  model, step, whole = setup()
  rng = np.random.default_rng(0)
  sequence = rng.integers(0, 256, 2 * WIDTH)
  cache = KVCache.init(model.config, SLOTS, MAX_LEN)
  # Two rows of one slot: a long prompt in one call.
  out, after = extend(
    step, cache, sequence.reshape(2, WIDTH), [0, WIDTH], [WIDTH, WIDTH], slots=[2, 2]
  )
  np.testing.assert_allclose(
    np.asarray(out).reshape(2 * WIDTH, -1), reference(whole, sequence), atol=2e-5
  )
  assert positions_that_differ(cache, after).nonzero()[0].tolist() == [2] * 2 * WIDTH


def test_attend_len_is_only_faster():
  model, step, _ = setup()
  tokens = np.random.default_rng(0).integers(0, 256, (SLOTS, WIDTH))
  cache = KVCache.init(model.config, SLOTS, MAX_LEN)
  lengths, counts = [0, 0, 0], [8, 5, 1]
  full, full_cache = extend(step, cache, tokens, lengths, counts)
  short, short_cache = extend(step, cache, tokens, lengths, counts, attend_len=8)
  for slot, count in enumerate(counts):
    np.testing.assert_allclose(full[slot, :count], short[slot, :count], atol=1e-5)
  for a, b in zip(jax.tree.leaves(full_cache), jax.tree.leaves(short_cache), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(
  'dtype', ['float32', 'bfloat16', pytest.param('int8', marks=pytest.mark.slow)])
def test_a_loop_of_steps_equals_one_call(dtype):
  model, step, _ = setup()
  prepared = incremental.prepare_for_decode(model)
  tokens = np.random.default_rng(0).integers(0, 256, (SLOTS, WIDTH))
  cache = KVCache.init(model.config, SLOTS, MAX_LEN, dtype)
  _, cache = extend(step, cache, tokens, [0, 0, 0], [8, 5, 0])
  lengths, counts = jnp.asarray([8, 5, 0], jnp.int32), jnp.asarray([4, 0, 2], jnp.int32)
  want, want_cache = extend(step, cache, tokens[:, :4], lengths, counts)
  prefix, tail = cache.prefix(8), cache.tail(4)
  assert prefix.max_len == 8 and tail.max_len == 4
  once = jax.jit(functools.partial(incremental.forward_step, prepared.graphdef, prepared.lora))
  for i in range(4):
    new, tail = once(prepared.frozen, jnp.asarray(tokens[:, i]), prefix, tail, lengths, i)
    for slot in range(SLOTS):
      if i < counts[slot]:
        np.testing.assert_allclose(
          new[slot], want[slot, i], atol=0.1 if dtype == 'bfloat16' else 1e-5)
  got = cache.absorb(tail, kv_cache.places(lengths, counts, 4))
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want_cache), strict=True):
    # Codes of int8 may differ by one where a value lies between two.
    atol = 1 if a.dtype == jnp.int8 else 0.1 if dtype == 'bfloat16' else 1e-5
    a, b = (from_bits(x).astype(jnp.float32) for x in (a, b))
    np.testing.assert_allclose(a, b, atol=atol)


def test_bfloat16_model_and_cache_are_close():
  model, step, _ = setup('smollm2_135m', 'bfloat16')
  exact, exact_step, _ = setup('smollm2_135m')
  tokens = np.random.default_rng(0).integers(0, 256, (SLOTS, WIDTH))
  outs = []
  for run, config in ((step, model.config), (exact_step, exact.config)):
    cache = KVCache.init(config, SLOTS, MAX_LEN, config.dtype)
    assert kv_cache.read(cache.layers[0], 4, None).k.dtype == config.dtype
    _, cache = extend(run, cache, tokens, [0] * 3, [8] * 3)
    outs.append(extend(run, cache, tokens[:, :1], [8] * 3, [1] * 3)[0])
  difference = np.abs(np.asarray(outs[0] - outs[1]))
  assert difference.max() < 0.15 * np.abs(outs[1]).max()


def test_prepared_equals_stacked():
  model, step, _ = setup()
  tokens = np.random.default_rng(0).integers(0, 256, (SLOTS, WIDTH))
  cache = KVCache.init(model.config, SLOTS, MAX_LEN)
  prepared, _ = extend(step, cache, tokens, [0] * 3, [8] * 3)
  stacked = jax.jit(incremental.forward_cached, static_argnums=0, static_argnames='attend_len')
  ones = jnp.zeros(3, jnp.int32)
  out, _ = stacked(
    model.graphdef,
    model.lora,
    model.frozen,
    jnp.asarray(tokens),
    cache,
    ones,
    ones + 8,
    attend_len=MAX_LEN,
  )
  np.testing.assert_allclose(out, prepared, atol=1e-5)

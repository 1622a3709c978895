"""The CPU's own kernels against XLA's products and attention."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inference import Engine, LookupConfig
from models import decoder, incremental, kv_cache, layers, native, rope
from models.attention import decode_attention
from models.families import DecoderConfig

needs_compiler = pytest.mark.skipif(
  shutil.which('g++') is None and shutil.which('clang++') is None, reason='no C++ compiler')

CONFIG = DecoderConfig(
  name='native', family='llama', vocab_size=96, embed_dim=64, num_layers=2, num_heads=6,
  num_kv_heads=2, head_dim=64, mlp_dim=96, rope_theta=1e4, tie_embeddings=True, dtype='bfloat16')


def numbers(rng, *shape, dtype=jnp.float32):
  return jnp.asarray(rng.standard_normal(shape), dtype)


@needs_compiler
@settings(max_examples=40, deadline=None)
@given(
  rows=st.integers(1, 100), width=st.sampled_from([32, 96, 576, 800, 1536]),
  outs=st.lists(st.sampled_from([32, 64, 160]), min_size=1, max_size=3), norm=st.booleans(),
  residual=st.booleans(), activation=st.sampled_from(native.ACTIVATIONS),
  share=st.sampled_from([None, 0.0, 0.3, 0.9]), seed=st.integers(0, 99))
def test_products_are_xla_s(rows, width, outs, norm, residual, activation, share, seed):
  rng = np.random.default_rng(seed)
  if activation or residual:
    outs = outs[:1] * (2 if activation else 1)
  x = numbers(rng, rows, width)
  kernels = [numbers(rng, out, width, dtype=jnp.bfloat16) for out in outs]
  options = {
    'norm': (numbers(rng, width), 1e-5) if norm else None,
    'residual': numbers(rng, rows, outs[0]) if residual else None}
  counts = None if share is None else jnp.asarray(rng.random(rows) < share)
  own = jax.jit(
    lambda: native.products(x, kernels, activation=activation, counts=counts, **options))()
  if norm:
    x = layers._rms_norm(x, *options['norm'])
  x = x.astype(jnp.bfloat16).astype(jnp.float32)
  wanted = [jnp.matmul(x, k.astype(jnp.float32).T, precision='highest') for k in kernels]
  if activation:
    wanted = [layers.gated(*wanted, activation)]
  if counts is not None:
    wanted = [jnp.where(counts[:, None], y, 0.0) for y in wanted]
  if residual:
    wanted = [y + options['residual'] for y in wanted]
  for y, want in zip(own, wanted, strict=True):
    # A norm whose last bit differs rounds a few numbers of x to the other side.
    tolerance = (3e-3 if norm else 2e-5) * float(jnp.abs(want).max()) + 1e-30
    np.testing.assert_allclose(y, want, rtol=0, atol=tolerance)


@needs_compiler
@pytest.mark.parametrize('width', [576, 800, 1536])
def test_a_row_s_product_does_not_depend_on_how_many_others_there_are(width):
  rng = np.random.default_rng(0)
  x, kernel = numbers(rng, 20, width), numbers(rng, 64, width, dtype=jnp.bfloat16)
  multiply = jax.jit(lambda counts: native.products(x, [kernel], counts=counts)[0][0])
  alone, *others = (multiply(jnp.arange(20) < count) for count in (1, 2, 3, 5, 20))
  for own in others:
    np.testing.assert_array_equal(own, alone)


@needs_compiler
def test_what_does_not_fit_is_refused():
  x, kernel = jnp.zeros((3, 64)), jnp.zeros((32, 64), jnp.bfloat16)
  refused = lambda name: pytest.raises(ValueError, match=f'^{name} .* does not fit')
  for other in (kernel.astype(jnp.float32), kernel[:, :32], kernel[:20]):
    with refused('kernel'):
      native.products(x, [other])
  with refused('counts'):
    native.products(x, [kernel], counts=jnp.ones(4, bool))
  q, k = jnp.zeros((2, 1, 4, 64)), jnp.zeros((2, 1, 2, 64))
  cache = jnp.zeros((2, 2, 64, 8), jnp.uint16), jnp.zeros((2, 2, 8, 64), jnp.uint16)
  tail = jnp.zeros((2, 2, 64, 3), jnp.bfloat16), jnp.zeros((2, 2, 3, 64), jnp.bfloat16)
  good = {'lengths': jnp.zeros(2, jnp.int32), 'places': jnp.zeros((2, 3), jnp.int32),
          'counts': jnp.ones(2, bool), 'step': jnp.int32(2)}
  attend = lambda **change: jax.jit(
    lambda given: native.cache_attention(q, k, k, cache, tail, **given)[0])({**good, **change})
  assert attend().shape == q.shape
  for name in ('lengths', 'places', 'counts'):
    with refused(name):
      attend(**{name: good[name][:1]})
  with pytest.raises(jax.errors.JaxRuntimeError, match='no columns for these tokens'):
    jax.block_until_ready(attend(step=jnp.int32(3)))


@needs_compiler
@settings(max_examples=40, deadline=None)
@given(
  data=st.data(), tokens=st.sampled_from([1, 1, 3, 16]), groups=st.integers(1, 7),
  heads=st.integers(1, 3), width=st.sampled_from([64, 128]), room=st.sampled_from([40, 64, 700]),
  window=st.sampled_from([0, 0, 5, 90]), rotated=st.booleans(), seed=st.integers(0, 99))
def test_attention_is_xla_s_over_what_a_slot_holds(
    data, tokens, groups, heads, width, room, window, rotated, seed):
  rng = np.random.default_rng(seed)
  batch, slots, columns = 3, 5, 2 * tokens + 1
  lengths = np.array([data.draw(st.integers(0, room)) for _ in range(batch)], np.int32)
  step = np.int32(data.draw(st.integers(0, columns - tokens)))
  rows = np.array(data.draw(st.permutations(range(slots)))[:batch], np.int32)
  # What a slot does not hold must not matter: not even where it is not a number.
  held_k, held_v = (np.array(numbers(rng, slots, heads, room, width)) for _ in range(2))
  for row, length in zip(rows, lengths, strict=True):
    held_k[row, :, length:], held_v[row, :, length:] = np.nan, np.nan
  bits = lambda x: jnp.asarray(x, jnp.bfloat16).view(jnp.uint16)
  cache = bits(np.swapaxes(held_k, 2, 3)), bits(held_v)
  tail = (
    numbers(rng, batch, heads, width, columns, dtype=jnp.bfloat16),
    numbers(rng, batch, heads, columns, width, dtype=jnp.bfloat16))
  q = numbers(rng, batch, tokens, heads * groups, width)
  k, v = (numbers(rng, batch, tokens, heads, width) for _ in range(2))
  places = jnp.asarray(lengths[:, None] + np.arange(columns, dtype=np.int32))
  tables = rope.tables(places[:, step:step + tokens], width, 1e4, None)
  counts = jnp.array(data.draw(st.sampled_from([[True] * 3, [True, False, True], [False] * 3])))
  own, own_tail = jax.jit(native.cache_attention, static_argnames='window')(
    q, k, v, cache, tail, lengths, step, places, rows, tables=None if rotated else tables[:2],
    counts=counts, window=window)
  if not rotated:
    q, k = tables.rotate(q), tables.rotate(k)
  layer = kv_cache.put(kv_cache.Layer(*tail), k, v, step)
  for x, before, after in zip(own_tail, tail, layer[:2], strict=True):
    want = jnp.where(counts[:, None, None, None], after, before)
    np.testing.assert_allclose(x.astype(jnp.float32), want.astype(jnp.float32), rtol=1e-2)
  exact = lambda x: jnp.nan_to_num(
    x.view(jnp.bfloat16)[rows].astype(jnp.float32), posinf=0.0, neginf=0.0)
  want = decode_attention(
    q, tuple(map(exact, cache)), tuple(x.astype(jnp.float32) for x in own_tail), lengths, step,
    places, window=window)
  want = jnp.where(counts[:, None, None, None], want, 0.0)
  # Several queries are rounded to bfloat16, as XLA's are.
  few = tokens * groups <= 2
  np.testing.assert_allclose(own, want, rtol=0, atol=2e-5 if few else 0.03)


@needs_compiler
@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 5), vocab=st.integers(1, 300), seed=st.integers(0, 99))
def test_peaks_are_those_of_the_rows(rows, vocab, seed):
  rng = np.random.default_rng(seed)
  logits = jnp.round(3 * numbers(rng, rows, vocab))  # Ties are frequent.
  peak, place, total = jax.jit(native.peaks)(logits)
  np.testing.assert_array_equal(peak, logits.max(axis=1))
  np.testing.assert_array_equal(place, jnp.argmax(logits, axis=1))
  np.testing.assert_allclose(
    total, jnp.exp(logits - peak[:, None]).sum(axis=1), rtol=1e-5)


@needs_compiler
def test_a_tail_is_absorbed_where_it_belongs_and_nowhere_else():
  rng = np.random.default_rng(0)
  config = dataclasses.replace(CONFIG, num_layers=1)
  held = kv_cache.KVCache.init(config, 3, 40, 'bfloat16')
  tail = jax.tree.map(lambda x: numbers(rng, *x.shape, dtype=x.dtype), held.tail(4))
  places = jnp.array([[0, 1, 2, 3], [37, 38, 39, 40], [5, kv_cache.OUTSIDE, 6, kv_cache.OUTSIDE]])
  own = jax.jit(lambda: held.absorb(tail, places, in_place=True))()
  want = jax.jit(lambda: held.absorb(tail, places))()
  jax.tree.map(np.testing.assert_array_equal, own, want)


def greedy(model, **options):
  engine = Engine(
    model, num_slots=3, max_len=90, stop_ids=(), decode_steps=4, block_len=8, **options)
  rng = np.random.default_rng(0)
  replies = []
  for turn in range(2):
    for slot, count in enumerate((5, 19, 33)):
      engine.submit(slot, rng.integers(0, CONFIG.vocab_size, count), 9, reset=turn == 0)
    replies += sorted(engine.run_until_complete(), key=lambda done: done.slot)
  return engine, replies


@needs_compiler
@pytest.mark.parametrize('options', [{}, {'lookup': LookupConfig(draft_len=2)}])
@pytest.mark.parametrize('window', [0, 12])
def test_an_engine_s_log_probabilities_are_those_without_the_kernels(monkeypatch, options, window):
  config = dataclasses.replace(CONFIG, sliding_window=window)
  model = decoder.create(config, seed=0)
  own, replies = greedy(model, **options)
  assert own._in_place
  monkeypatch.setattr(native, 'available', lambda: False)
  plain, wanted = greedy(model, **options)
  assert not plain._in_place
  parted = set()
  for reply, want in zip(replies, wanted, strict=True):
    if reply.slot in parted:
      continue
    same = np.cumprod(reply.tokens == want.tokens).astype(bool)
    # What parts them is a near tie, which has the same log-probability; what follows differs.
    compared = same | (np.cumsum(~same) == 1)
    np.testing.assert_allclose(reply.logprobs[compared], want.logprobs[compared], atol=0.03)
    if not same.all():
      parted.add(reply.slot)
  assert len(parted) < 3


@needs_compiler
def test_a_dispatch_has_one_program_whatever_the_lengths_are():
  engine, _ = greedy(decoder.create(CONFIG, seed=0))
  traces = engine.stats.traces
  for slot, count in enumerate((1, 60, 20)):
    engine.submit(slot, np.ones(count, np.int32), 20, reset=True)
  engine.run_until_complete()
  assert engine._programs.traces['decode'] == 1
  assert engine._programs.traces['prefix'] == 0
  assert engine.stats.traces - traces <= 1  # A prefill of another size.


@pytest.mark.parametrize('change', [
  {'dtype': 'float32'}, {'base_quantization': 'int8'}, {'vocab_size': 90}])
def test_what_the_kernels_cannot_take_stays_with_xla(change):
  model = incremental.prepare_for_decode(
    decoder.create(dataclasses.replace(CONFIG, **change), seed=0))
  cache = kv_cache.KVCache.init(model.config, 1, 8, model.config.dtype)
  assert not incremental.reads_in_place(model.graphdef, cache)


def test_without_a_compiler_one_sentence_says_so(monkeypatch, tmp_path, caplog):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  monkeypatch.setenv('CXX', str(tmp_path / 'no-compiler'))
  assert native._library.__wrapped__() is None
  assert 'no-compiler' in caplog.text and 'slower' in caplog.text
  monkeypatch.setenv('HINTSIGHT_NATIVE', '0')
  caplog.clear()
  assert native._library.__wrapped__() is None
  assert not caplog.text

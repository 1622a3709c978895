"""The engine against recomputation from scratch, on a tiny model."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inference import ContextOverflow, Engine, SamplingConfig
from inference.lengths import affordable, attend_buckets
from models import decoder, memory, registry, sharding
from models.lora import LoraConfig

SLOTS, MAX_LEN, VOCAB, STOP = 3, 48, 61, (0, 1, 2, 3, 4, 5, 6, 7)
# Two attended lengths and two bucket sizes: few enough programs to compile in a test.
SHAPES = dict(
  num_slots=SLOTS, max_len=MAX_LEN, decode_steps=3, block_len=4, block_buckets=(2, 6),
  attend_step=32)
CONFIG = registry.shrink(
  registry.get_config('smollm2_135m'), vocab_size=VOCAB, embed_dim=32, head_dim=8, mlp_dim=48)


@functools.cache
def tiny_model(lora=None):
  model = decoder.create(CONFIG, lora, seed=1)
  if lora is not None:
    # B is zero at init: give the adapter an effect.
    noise = lambda x: x + 0.1 * jax.random.normal(jax.random.key(5), x.shape)
    lora_state = jax.tree.map(noise, model.lora)
    model = decoder.Model(CONFIG, lora, model.graphdef, lora_state, model.frozen)
  return model


@functools.cache
def scratch(lora=None):
  """Log-probabilities [MAX_LEN, V] of a whole row, without cache and without the engine."""
  model = tiny_model(lora)

  @jax.jit
  def run(tokens):
    hidden = decoder.forward(
      model.graphdef, model.lora, model.frozen, tokens[None], jnp.arange(MAX_LEN)[None])
    return jax.nn.log_softmax(decoder.logits(model.graphdef, model.frozen, hidden[0]))

  pad = lambda tokens: np.asarray([*tokens, *[0] * MAX_LEN][:MAX_LEN], np.int32)
  return lambda tokens: np.asarray(run(pad(tokens)))


def engine(**overrides):
  return Engine(tiny_model(), **SHAPES | dict(stop_ids=STOP) | overrides)


def assert_greedy(history, completion, budget, lora=None):
  """The completion is what recomputing `history` token by token gives; extends `history`."""
  tokens = completion.tokens.tolist()
  logprobs = scratch(lora)(history + tokens)
  for offset, token in enumerate(tokens):
    row = logprobs[len(history) + offset - 1]
    assert row[token] >= row.max() - 1e-5
    np.testing.assert_allclose(completion.logprobs[offset], row[token], atol=2e-4)
  assert completion.tokens.dtype == np.int32 and completion.logprobs.dtype == np.float32
  stopped = tokens[-1] in STOP
  assert not set(tokens[:-1]) & set(STOP)
  assert completion.stop_reason == ('stop' if stopped else 'length')
  assert stopped or len(tokens) == budget
  history += tokens


TURN = st.tuples(
  st.lists(st.integers(8, VOCAB - 1), min_size=1, max_size=11), st.integers(1, 7))
CONVERSATION = st.lists(TURN, min_size=1, max_size=4)


@functools.cache
def shared_engine():
  return engine()


@settings(max_examples=15)
@given(conversations=st.lists(CONVERSATION, min_size=1, max_size=6), data=st.data())
def test_greedy_equals_recomputation_in_any_batch_composition(conversations, data):
  eng, queue = shared_engine(), list(conversations)
  turns = [[] for _ in range(SLOTS)]
  histories = [[] for _ in range(SLOTS)]
  budgets = [0] * SLOTS
  free, done = set(range(SLOTS)), 0
  while len(free) < SLOTS or queue or any(turns):
    for slot in sorted(free):
      reset = not turns[slot]
      if reset and not queue:
        continue
      if data.draw(st.booleans()) and len(free) < SLOTS:
        continue  # this slot waits for a later step
      if reset:
        turns[slot], histories[slot] = list(queue.pop()), []
      tokens, budgets[slot] = turns[slot].pop(0)
      try:
        eng.submit(slot, tokens, budgets[slot], reset=reset)
      except ContextOverflow:
        assert len(histories[slot]) + len(tokens) + budgets[slot] > MAX_LEN
        turns[slot] = []
        done += 1
        continue
      histories[slot] += tokens
      free.discard(slot)
    for completion in eng.step():
      slot = completion.slot
      assert completion.prompt_tokens == len(histories[slot])
      assert_greedy(histories[slot], completion, budgets[slot])
      assert eng.length(slot) == len(histories[slot])
      free.add(slot)
      done += not turns[slot]
  assert done == len(conversations)


def test_only_new_tokens_are_prefilled():
  eng = engine(stop_ids=())
  eng.submit(1, range(8, 18), 2, reset=True)
  (first,) = eng.run_until_complete()
  assert (first.slot, first.prefilled_tokens, first.prompt_tokens) == (1, 10, 10)
  eng.submit(1, [9, 10, 11], 4)
  (second,) = eng.run_until_complete()
  # The last sampled token was not in the cache yet: it goes before the three new ones.
  assert (second.prefilled_tokens, second.prompt_tokens) == (4, 15)
  stats = eng.stats
  assert (stats.prefilled, stats.generated, stats.decoded) == (14, 6, 4)
  assert stats.prefill_computed == (6 + 2) * 4
  assert stats.padded_share == 1 - 14 / 32
  assert stats.as_dict()['dispatches'] == stats.prefill_dispatches + stats.decode_dispatches


def test_overflow_and_misuse_leave_the_slot_as_it_was():
  eng = engine(stop_ids=())
  eng.submit(0, range(8, 28), 5, reset=True)
  with pytest.raises(ValueError, match='in progress'):
    eng.submit(0, [9], 1)
  history = list(range(8, 28))
  (completion,) = eng.run_until_complete()
  history += completion.tokens.tolist()
  with pytest.raises(ContextOverflow, match='48'):
    eng.submit(0, [9] * 20, 4)
  with pytest.raises(ContextOverflow):
    eng.submit(0, [9] * 40, 9, reset=True)
  with pytest.raises(ValueError, match='max_new_tokens'):
    eng.submit(0, [9], 0)
  with pytest.raises(ValueError, match='empty'):
    eng.submit(2, [], 1)
  assert eng.length(0) == 25 and eng.busy == 0 and eng.step() == []
  eng.submit(0, [9] * 19, 4)  # exactly full
  (completion,) = eng.run_until_complete()
  row = scratch()(history + [9] * 19)[len(history) + 18]
  assert row[completion.tokens[0]] >= row.max() - 1e-5
  assert len(completion.tokens) == 4 and eng.length(0) == MAX_LEN


def test_a_turn_may_continue_without_new_tokens():
  eng = engine(stop_ids=())
  eng.submit(0, [9, 10], 4, reset=True)
  whole = eng.run_until_complete()[0].tokens.tolist()
  eng.submit(0, [9, 10], 2, reset=True)
  parts = eng.run_until_complete()[0].tokens.tolist()
  eng.submit(0, [], 2)
  assert parts + eng.run_until_complete()[0].tokens.tolist() == whole


def test_finished_slots_return_while_others_go_on():
  eng = engine(stop_ids=())
  for slot, budget in enumerate((2, 12, 12)):
    eng.submit(slot, [9, 10, 11], budget, reset=True)
  assert [c.slot for c in eng.step()] == [0]
  assert eng.stats.decoded == 3  # one step: the caller gets its slot before the others end
  eng.submit(0, [12], 2)
  rest = eng.run_until_complete()
  assert {c.slot for c in rest} == {0, 1, 2}


def test_no_recompilation_in_the_steady_state():
  eng = engine(decode_steps=2)  # a spec of its own: nothing is compiled yet
  rng = np.random.default_rng(0)

  def play(turns):
    for _ in range(turns):
      for slot in range(SLOTS):
        reset = eng.length(slot) > 16
        tokens = rng.integers(8, VOCAB, rng.integers(1, 12))
        eng.submit(slot, tokens, int(rng.integers(1, 5)), reset=reset)
      eng.run_until_complete()

  play(12)
  seen = eng.stats.traces
  # Attended lengths x (bucket sizes + decode), prefix (of the shorter one), absorb.
  assert 0 < seen <= 2 * (2 + 1) + 2
  play(25)
  assert eng.stats.traces == seen
  # A second engine of the same shapes, with another adapter's weights, compiles nothing.
  assert Engine(tiny_model(), **SHAPES | dict(decode_steps=2, stop_ids=STOP))._programs is (
    eng._programs)


def test_the_adapter_is_merged():
  lora = LoraConfig(rank=2, alpha=4.0)
  eng = Engine(tiny_model(lora), **SHAPES, stop_ids=STOP)
  history = [9, 10, 11, 12, 13]
  eng.submit(0, history, 6, reset=True)
  assert_greedy(history, eng.run_until_complete()[0], 6, lora)


def test_sampling_depends_on_seeds_and_not_on_the_batch():
  hot = dict(sampling=SamplingConfig(temperature=1.5, top_k=20, top_p=0.95), stop_ids=())

  def alone(seed, engine_seed):
    eng = engine(**hot, seed=engine_seed)
    eng.submit(1, [9, 10, 11], 6, reset=True, seed=seed)
    eng.run_until_complete()
    eng.submit(1, [12, 13], 6)
    return eng.run_until_complete()[0]

  eng = engine(**hot, seed=3)
  eng.submit(0, [20, 21], 1, reset=True)
  eng.step()
  eng.submit(2, range(8, 18), 9, reset=True, seed=1)
  eng.submit(0, [9, 10, 11], 6, reset=True, seed=7)
  eng.run_until_complete()
  eng.submit(2, [30], 2)
  eng.submit(0, [12, 13], 6)
  crowded = next(c for c in eng.run_until_complete() if c.slot == 0)
  single = alone(7, 3)
  assert crowded.tokens.tolist() == single.tokens.tolist()
  np.testing.assert_allclose(crowded.logprobs, single.logprobs, atol=1e-4)
  assert single.tokens.tolist() != alone(8, 3).tokens.tolist()
  assert single.tokens.tolist() != alone(7, 4).tokens.tolist()


def test_on_a_mesh_the_tokens_are_the_same_and_nothing_retraces():
  mesh = sharding.make_mesh(data=3, tensor=2)
  model = decoder.from_params(CONFIG, decoder.to_params(tiny_model().frozen), mesh=mesh)
  eng = Engine(model, **SHAPES, stop_ids=STOP, mesh=mesh)
  for prompt in ([9, 10, 11], [12, 13, 14]):
    history = list(prompt)
    eng.submit(2, prompt, 5, reset=True)
    assert_greedy(history, eng.run_until_complete()[0], 5)
    eng.submit(2, [20, 21], 5)
    history += [20, 21]
    assert_greedy(history, eng.run_until_complete()[0], 5)
    traces = eng.stats.traces
    assert traces == 4  # prefill, prefix, decode, absorb


def test_bfloat16_cache_and_products_stay_close():
  config = dataclasses.replace(CONFIG, dtype='bfloat16')
  model = decoder.from_params(config, decoder.to_params(tiny_model().frozen))
  eng = Engine(model, **SHAPES, stop_ids=())
  history = list(range(8, 20))
  eng.submit(0, history, 6, reset=True)
  (completion,) = eng.run_until_complete()
  logprobs = scratch()(history + completion.tokens.tolist())
  want = [logprobs[len(history) - 1 + i, t] for i, t in enumerate(completion.tokens)]
  np.testing.assert_allclose(completion.logprobs, want, atol=0.1)


def test_attend_buckets_reach_the_whole_slot_and_grow():
  assert attend_buckets(500) == [128, 256, 384, 500]
  assert attend_buckets(48, 32) == [32, 48]
  lengths = attend_buckets(32768)
  assert lengths[-1] == 32768 and len(lengths) < 40
  assert all(b <= 1.5 * a for a, b in itertools.pairwise(lengths[1:]))


def test_without_memory_for_copies_all_of_a_slot_is_attended(monkeypatch):
  assert affordable([32, 64, 128], cache_bytes=1280, room=640) == [32, 64, 128]
  assert affordable([32, 64, 128], cache_bytes=1280, room=639) == [32, 128]
  assert affordable([32, 64, 128], cache_bytes=1280, room=-1) == [128]
  monkeypatch.setattr(memory, 'device_bytes', lambda: 0)
  eng, history = engine(), [9, 10, 11]
  assert eng._decode_lengths == [MAX_LEN]
  before = eng._programs.traces['prefix']
  eng.submit(0, history, 6, reset=True)
  assert_greedy(history, eng.run_until_complete()[0], 6)
  assert eng._programs.traces['prefix'] == before


def test_a_whole_slot_is_read_where_it_lies():
  eng = engine(max_len=1024)
  (cache,), (state,), programs = eng._caches, eng._states, eng._programs
  lowered = programs.decode.lower(
    eng._params, cache, state, np.int32(0), eng._tables.arrays(slice(0, SLOTS)))
  assert lowered.compile().memory_analysis().temp_size_in_bytes < cache.nbytes / 4
  new = cache.tail(3), jnp.zeros((SLOTS, 3), jnp.int32)
  stats = programs.absorb.lower(cache, new).compile().memory_analysis()
  assert stats.alias_size_in_bytes == cache.nbytes
  assert stats.temp_size_in_bytes < cache.nbytes / 4


def test_a_conversation_that_is_kept_in_part_goes_on_as_if_the_rest_had_never_been():
  conversation = engine()
  conversation.submit(0, [20, 21, 22, 23, 24, 25], 3, reset=True)
  conversation.submit(1, [30, 31], 3, reset=True)
  for completion in conversation.run_until_complete():
    if completion.slot == 0:
      whole = [20, 21, 22, 23, 24, 25, *completion.tokens.tolist()]
  for keep, new in ((3, [40, 41]), (5, [42]), (0, [20, 50]), (2, [20] * 9)):
    before = conversation.length(0)
    assert keep <= before
    conversation.submit(0, new, 2, keep=keep)
    [completion] = conversation.run_until_complete()
    assert completion.prefilled_tokens == len(new) and completion.prompt_tokens == keep + len(new)
    whole = [*whole[:keep], *new]
    assert_greedy(whole, completion, 2)
  # Keeping all is going on: the last sampled token, which no cache holds, comes first.
  length = conversation.length(0)
  conversation.submit(0, [44], 2, keep=length)
  [completion] = conversation.run_until_complete()
  assert completion.prefilled_tokens == 2
  whole.append(44)
  assert_greedy(whole, completion, 2)
  with pytest.raises(ValueError, match='cannot keep 99'):
    conversation.submit(0, [44], 2, keep=99)

"""Drafts, shared beginnings, int8 keys and values, and prefill over several devices."""

import numpy as np
import pytest

from inference import Engine, LookupConfig, programs
from models import decoder, hlo, sharding
from tests.inference.tiny import CONFIG, SHAPES, STOP, engine, model, play

BEGINNING = [5 + i % 17 for i in range(36)]
LOOKUP = LookupConfig(draft_len=3, min_ngram=1, min_accepted=0.0)


@pytest.mark.slow
@pytest.mark.parametrize('cache_dtype', ['float32', 'int8'])
def test_on_a_mesh_all_is_as_on_one_device(cache_dtype):
  mesh = sharding.make_mesh(data=3, tensor=2)
  placed = decoder.from_params(CONFIG, decoder.to_params(model().frozen), mesh=mesh)
  options = dict(lookup=LOOKUP, cache_dtype=cache_dtype)
  one = engine(**options)
  many = Engine(placed, **SHAPES, stop_ids=STOP, mesh=mesh, **options)
  for wave in range(3):
    conversations = [
      [([*BEGINNING, 3 + slot, 4 + wave], 9), ([3, 4], 5)] for slot in range(3)]
    for ours, theirs in zip(play(many, conversations), play(one, conversations), strict=True):
      assert [done.tokens.tolist() for done in ours] == [done.tokens.tolist() for done in theirs]
      assert [done.copied_tokens for done in ours] == [done.copied_tokens for done in theirs]
    if wave == 1:
      traces = many.stats.traces
  assert many.stats.traces == traces
  assert many.stats.copied > 5 * len(BEGINNING) and many.stats.accepted > 0


def test_each_data_shard_prefills_its_own_slots():
  """As many tokens as elsewhere, in a quarter of the FLOPs, and no key travels."""
  mesh = sharding.make_mesh(data=4, tensor=2)
  placed = decoder.from_params(CONFIG, decoder.to_params(model().frozen), mesh=mesh)
  options = SHAPES | {'num_slots': 8, 'block_buckets': (4, 8), 'stop_ids': STOP}
  one, many = Engine(model(), **options), Engine(placed, **options, mesh=mesh)
  # Two slots to a shard; the third one has nothing to do, and the last most of it.
  lengths = {0: 3, 1: 21, 2: 4, 6: 30, 7: 25}
  for eng in (one, many):
    for slot, length in lengths.items():
      eng.submit(slot, [4 + (slot + i) % 19 for i in range(length)], 6, reset=True)
  for ours, theirs in zip(*(e.run_until_complete() for e in (many, one)), strict=True):
    assert ours.slot == theirs.slot and ours.tokens.tolist() == theirs.tokens.tolist()
  assert many.stats.prefilled == one.stats.prefilled == sum(lengths.values())

  def compiled(eng):
    blocks = np.zeros((8, eng._block_len + len(programs.BLOCK_FIELDS)), np.int32)
    ends = np.full((8,), 8, np.int32)
    return eng._programs.prefill.lower(
      eng._params, eng._caches[0], eng._states[0], blocks, ends, eng._tables.arrays(slice(0, 8)),
      None, attend_len=eng.max_len).compile()

  ours, theirs = compiled(many), compiled(one)
  # A quarter of the blocks, and of the heads and of other widths half, but not of the small rest.
  flops = [program.cost_analysis()['flops'] for program in (ours, theirs)]
  sent = sum(traffic.sent for traffic in hlo.collectives(ours.as_text(), 8))
  assert flops[0] < flops[1] / 5
  assert sent < many._caches[0].nbytes / 8

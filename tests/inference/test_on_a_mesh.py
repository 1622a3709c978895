"""Drafts, shared beginnings and int8 keys and values over several devices."""

import pytest

from inference import Engine, LookupConfig
from models import decoder, sharding
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

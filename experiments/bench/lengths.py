"""Decode time where slots differ in length: the longest slots read apart, against all alike.

  python -m experiments.bench.lengths

Both ways take turns in one process; the time of a step is the median of all rounds.
"""

import dataclasses
import json
import pathlib
import statistics
import time
from typing import Any

from absl import flags

from configs import cli
from data import summary
from data import workdir as workdir_lib

PATH = pathlib.Path(__file__).parents[1] / 'results' / 'lengths.json'
_SLOTS, _MAX_LEN, _STEPS = 32, 4096, 8


def measure(rounds: int, layers: int) -> dict[str, Any]:
  """Times decode dispatches with what they read of the cache made first.

  Returns:
    {'layers', 'slots', 'rows': one dict for each mix of lengths with 'name', 'plain_ms' and
    'split_ms' of a step, 'ratio' (plain over split), 'split' ([short, long, count] or None)}.
  """
  import jax
  import jax.numpy as jnp
  import numpy as np

  from inference import Engine
  from models import decoder, registry

  config = dataclasses.replace(registry.get_config('smollm2_135m'), num_layers=layers)
  engine = Engine(
    decoder.create(config), num_slots=_SLOTS, max_len=_MAX_LEN, stop_ids=(),
    decode_steps=_STEPS)
  # A dispatch ends before the last position of a slot.
  mixes = {
    'all 512': [512] * _SLOTS, 'one of 4,096, 31 of 256': [4096 - _STEPS] + [256] * (_SLOTS - 1),
    '128 to 2,048': np.geomspace(128, 2048, _SLOTS).astype(int).tolist()}
  splits, rows = engine._splits, []
  for name, own in mixes.items():
    times, used = {'plain': [], 'split': []}, None
    for turn in range(rounds + 1):
      for way in times:
        engine._splits = splits if way == 'split' else []
        own = np.asarray(own, np.int32)
        state = engine._states[0]
        state = dataclasses.replace(
          state, lengths=jnp.asarray(own), active=jnp.ones(_SLOTS, bool),
          remaining=jnp.full(_SLOTS, 100, jnp.int32))
        start = time.perf_counter()
        _, prefix, longer = engine._attended(engine._caches[0], own)
        new, engine._states[0], packed = engine._programs.decode(
          engine._params, prefix, state, np.int32(0), None, None, longer)
        jax.block_until_ready((new, packed))
        if turn:  # The first compiles.
          times[way].append((time.perf_counter() - start) / _STEPS * 1e3)
        if longer is not None:
          used = [prefix.max_len, prefix.max_len + longer[0].max_len, len(longer[1])]
    plain, split = (statistics.median(times[way]) for way in times)
    rows.append(dict(
      name=name, plain_ms=plain, split_ms=split, ratio=plain / split, split=used))
    print(json.dumps(rows[-1]), flush=True)
  return {'layers': layers, 'slots': _SLOTS, 'rounds': rounds, 'rows': rows}


def section(record: dict[str, Any]) -> str:
  """The record as Markdown."""
  measured = record['measured']
  lines = [
    f'{record["slots"]} slots, {record["layers"]} layers like those of SmolLM2-135M; milliseconds '
    f'of a decode step, medians of {record["rounds"]} rounds. Slots of one length run the same '
    'program both ways: their ratio is the noise.', '',
    '| lengths | all alike | long ones apart | ratio |', '|---|---|---|---|']
  lines += [
    f'| {r["name"]} | {r["plain_ms"]:.1f} | {r["split_ms"]:.1f} | {r["ratio"]:.2f} |'
    for r in record['rows']]
  return '\n'.join(
    [*lines, '', summary.origin(measured)])


def main(_) -> None:
  f = flags.FLAGS
  record = measure(f.rounds, f.layers)
  record['measured'] = summary.measured('experiments.bench.lengths', ('jax', 'jaxlib', 'flax'))
  workdir_lib.write_json(pathlib.Path(f.out), record)
  print(section(record))


if __name__ == '__main__':
  flags.DEFINE_integer('rounds', 7, 'Timed dispatches of each way and mix.')
  flags.DEFINE_integer('layers', 6, 'Of the model.')
  flags.DEFINE_string('out', str(PATH), 'JSON file to write.')
  cli.run(main, required=())

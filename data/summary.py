"""What a set of episodes brought: one table row, its interval, and paired differences."""

import collections
import contextlib
import datetime
import importlib.metadata
import math
import os
import platform
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data import errors, trajectory

_PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'scann', 'transformers',
             'tensorflow-datasets', 'numpy')


def versions(packages: Sequence[str] = _PACKAGES) -> dict[str, str]:
  """Returns the versions that a measurement depends on: Python's, and of what is installed."""
  found = {'python': platform.python_version()}
  for name in packages:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  return found


# What products of a CPU are made with, the fastest first.
_INSTRUCTIONS = ('amx_bf16', 'avx512_bf16', 'avx512f', 'avx2')


def machine(cpuinfo: str = '/proc/cpuinfo') -> str:
  """Returns the CPU in words: its cores, its model, and the fastest instructions of its products.

  Two cores with bfloat16 products train five times as fast as two with AVX2 alone.

  Args:
    cpuinfo: where Linux tells them; left out where there is none.
  """
  found = [platform.machine()]
  with contextlib.suppress(OSError), open(cpuinfo, encoding='utf-8') as file:
    fields = dict(re.findall(r'^(model name|flags)\s*: (.*)$', file.read(), re.MULTILINE))
    flags = fields.get('flags', '').split()
    found += [fields.get('model name', ''), next((i for i in _INSTRUCTIONS if i in flags), '')]
  return f'{os.cpu_count()} CPU cores, {", ".join(filter(None, found))}'


def measured(module: str, packages: Sequence[str] = _PACKAGES) -> dict[str, Any]:
  """Returns what a measurement says of itself: command, machine, date and versions.

  Args:
    module: the entry that ran, as `python -m` takes it; its flags are this process's.
    packages: whose versions the figures depend on.
  """
  return {
    'command': shlex.join(['python', '-m', module, *sys.argv[1:]]),
    'machine': machine(),
    'date': datetime.date.today().isoformat(),
    'versions': versions(packages),
  }


def origin(record: Mapping[str, Any]) -> str:
  """The line under a table: where, when and by which command `measured` says it was made."""
  return f'{record["machine"]}; {record["date"]}; `{record["command"]}`.'


def wilson(successes: int, n: int, z: float = 1.959964) -> list[float]:
  """Returns the 95 % Wilson score interval of a proportion, as [low, high]; [0, 1] for n = 0."""
  if n == 0:
    return [0.0, 1.0]
  p = successes / n
  centre = (p + z * z / (2 * n)) / (1 + z * z / n)
  half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
  return [max(0.0, centre - half), min(1.0, centre + half)]


def row(
  episodes: Sequence[trajectory.Episode],
  *,
  id: str,
  policy: str,
  memory: str,
  split: str,
  seed: int,
) -> dict[str, Any]:
  """Returns one row of `summary.json`.

  `prompt_tokens` counts the whole prompt of every model call (what an API bills, the cost in
  arXiv 2510.01375), `memory_tokens` the memory block's part of it, and `prefilled_tokens` what was
  new, with the KV cache kept. (Of what several episodes begin with alike the engine computes less
  still: its own counts, `engine_line`.)
  """

  memory_kind = trajectory.KIND['memory']
  memory_tokens = [int((e.kinds == memory_kind).sum()) * e.model_calls for e in episodes]

  def mean(field: str) -> float:
    return float(np.mean([getattr(e, field) for e in episodes])) if episodes else 0.0

  won = sum(e.success for e in episodes)
  return {
    'id': id,
    'policy': policy,
    'memory': memory,
    'split': split,
    'seed': seed,
    'n': len(episodes),
    'success_rate': won / max(1, len(episodes)),
    'success_ci95': wilson(won, len(episodes)),
    'score_mean': mean('score'),
    'env_steps_mean': mean('env_steps'),
    'model_calls_mean': mean('model_calls'),
    'prompt_tokens_mean': mean('prompt_tokens'),
    'memory_tokens_mean': float(np.mean(memory_tokens)) if episodes else 0.0,
    'prefilled_tokens_mean': mean('prefilled_tokens'),
    'generated_tokens_mean': mean('generated_tokens'),
    'retrieval_tokens_mean': mean('retrieval_tokens'),
    'memory_dropped_mean': mean('memory_dropped'),
    'invalid_actions_mean': mean('invalid_actions'),
    'env_restarts': sum(e.env_restarts for e in episodes),
    'terminations': dict(sorted(collections.Counter(e.termination for e in episodes).items())),
  }


def paired(
  a: Sequence[trajectory.Episode],
  b: Sequence[trajectory.Episode],
  *,
  a_id: str,
  b_id: str,
  resamples: int = 10_000,
  seed: int = 0,
) -> dict[str, Any]:
  """Returns success rate of `a` minus that of `b` over the same tasks, with a bootstrap interval.

  Tasks are resampled (percentile bootstrap), so that what both policies share, the task, cancels.

  Raises:
    errors.UserError: if the two did not play the same tasks.
  """
  won_a = {e.task_id: float(e.success) for e in a}
  won_b = {e.task_id: float(e.success) for e in b}
  if won_a.keys() != won_b.keys():
    raise errors.UserError(
      f'{a_id} and {b_id} played different tasks ({len(won_a.keys() ^ won_b.keys())} are in one '
      'only); compare runs over the same split.')
  tasks = sorted(won_a)
  difference = np.array([won_a[t] - won_b[t] for t in tasks])
  return {'a': a_id, 'b': b_id, 'n': len(tasks), **bootstrap([difference], resamples, seed)}


def bootstrap(
  differences: Sequence[np.ndarray], resamples: int = 10_000, seed: int = 0
) -> dict[str, Any]:
  """Returns the mean of paired differences and its 95 % percentile bootstrap interval.

  Args:
    differences: of each group (a seed's games) the differences, [n_i]; resampled within its group.
    resamples: draws.
    seed: of the draws.

  Returns:
    {'difference', 'ci95'}, and 'by_seed', the means of the groups, where there are several.
  """
  rng = np.random.default_rng(seed)
  total = sum(len(d) for d in differences)
  means = sum(d[rng.integers(len(d), size=(resamples, len(d)))].sum(axis=1) for d in differences)
  low, high = np.percentile(means / total, [2.5, 97.5])
  record = {'difference': float(sum(d.sum() for d in differences) / total),
            'ci95': [float(low), float(high)]}
  if len(differences) > 1:
    record['by_seed'] = [float(d.mean()) for d in differences]
  return record


def outcomes(
  played: Mapping[str, Sequence[trajectory.Episode]]
) -> dict[str, dict[str, list[int]] | list[str]]:
  """Which games each row won, so that committed results can be compared again.

  Args:
    played: row id -> its episodes; all rows over the same tasks.

  Returns:
    {'tasks': sorted task ids, 'rows': {row id: 0 or 1 per task}}.
  """
  tasks = sorted({e.task_id for episodes in played.values() for e in episodes})
  won = {name: {e.task_id: int(e.success) for e in episodes} for name, episodes in played.items()}
  return {'tasks': tasks, 'rows': {name: [w[t] for t in tasks] for name, w in won.items()}}


def engine_line(stats: Mapping[str, float]) -> str:
  """One line of what an engine computed, from `inference.Stats.as_dict()`; '' for no engine.

  New tokens are either prefilled or copied, and none is either twice.
  """
  if not stats.get('prefilled'):
    return ''
  copied = stats.get('copied', 0)
  line = (f'engine: {stats["prefilled"]:,} tokens prefilled, {copied:,} copied from '
          f'prompts that begin alike, {stats["generated"]:,} generated')
  if stats.get('verified'):
    line += f', {stats["accepted_per_step"]:.2f} of a draft accepted a verifying step'
  return line


def table(rows: Sequence[dict[str, Any]], pairs: Sequence[dict[str, Any]] = ()) -> str:
  """Returns the rows, then the paired differences, as text for a terminal."""
  lines = [f'{"policy":<18} {"n":>4}  {"success % (95 %)":<22} {"steps":>6} {"prompt tok":>10} '
           f'{"prefilled":>9} {"generated":>9}']
  for r in rows:
    low, high = r['success_ci95']
    success = f'{100 * r["success_rate"]:5.1f} ({100 * low:.1f} to {100 * high:.1f})'
    lines.append(
      f'{r["id"]:<18} {r["n"]:>4}  {success:<22} {r["env_steps_mean"]:>6.1f} '
      f'{r["prompt_tokens_mean"]:>10.0f} {r["prefilled_tokens_mean"]:>9.0f} '
      f'{r["generated_tokens_mean"]:>9.0f}')
  for p in pairs:
    low, high = (100 * x for x in p['ci95'])
    verdict = '' if low > 0 or high < 0 else '  (not significant)'
    lines.append(f'{p["a"]} - {p["b"]}: {100 * p["difference"]:+.1f} points, '
                 f'95 % interval {low:+.1f} to {high:+.1f}{verdict}')
  return '\n'.join(lines)

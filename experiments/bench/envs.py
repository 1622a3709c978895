"""How fast the environments are: our household engine against TextWorld, then each by itself.

  python -m experiments.bench.envs      # writes experiments/results/bench_envs.json

First, our engine and TextWorld on the same games in one run (--games=0 leaves it out).
The games are ALFWorld's training games where `HINTSIGHT_DATA` (or --data) names them, otherwise
generated ones of the same six types. Both engines do the same work behind the same interface, game
by game in turns: load and reset; then, per step, the answer and the list of admissible commands,
which TextWorld makes unasked. Their answers are compared.

Rates are per second of CPU time: a step of ours is so short that, beside another program,
only TextWorld's would be interrupted.

Then steps a second, load time and memory of household, TextWorld, WebShop and ScienceWorld behind
the same workers, in one process and in one for each core (--rows names them, '' leaves them out),
and WebShop's catalogue at size (--catalogue=0 leaves it out). These are wall-clock times: they want
a machine that does nothing else.
"""

import collections
import gc
import os
import pathlib
import random
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from absl import flags

import envs
from configs import cli
from data import errors, summary
from data import workdir as workdir_lib
from envs.base import Environment, StepResult, Suite, Task
from experiments.bench import env_rows

ENGINES = ('fast', 'textworld')
MEASURES = ('load', 'steps')
OUT = pathlib.Path(__file__).parents[1] / 'results' / 'bench_envs.json'
_NAMES = {'fast': 'ours', 'textworld': 'TextWorld'}
_PACKAGES = ('textworld', 'alfworld', 'fast-downward-textworld', 'scienceworld', 'bm25s', 'numpy')
_SPLIT = 'train'
_RESAMPLES = 10_000


def _seconds(work: Callable[[], Any]) -> tuple[float, Any]:
  """CPU seconds of a piece of work and what it returns; garbage of others is collected before."""
  gc.collect()
  start = time.process_time()
  result = work()
  return time.process_time() - start, result


def draw_commands(environment: Environment, rng: random.Random, steps: int) -> list[str]:
  """Random admissible commands, played once to know what is admissible."""
  environment.reset()
  commands = []
  for _ in range(steps):
    commands.append(rng.choice(environment.admissible_commands()))
    environment.step(commands[-1])
  return commands


def _load(suite: Suite, task: Task) -> tuple[Environment, str]:
  environment = suite.make(task)
  return environment, environment.reset()


def _play(
  environment: Environment, commands: Sequence[str]
) -> list[tuple[StepResult, list[str]]]:
  return [(environment.step(c), environment.admissible_commands()) for c in commands]


def measure(suites: dict[str, Suite], task: Task, steps: int) -> dict[str, dict[str, float]]:
  """Plays one game in both engines.

  Args:
    suites: by engine.
    task: the game.
    steps: random admissible commands, the same ones for both; drawn by the game's id.

  Returns:
    engine -> measure -> CPU seconds.

  Raises:
    errors.UserError: the engines do not answer alike, or TextWorld is not installed.
  """
  rng = random.Random(task.id)
  commands = draw_commands(suites['fast'].make(task), rng, steps)
  seconds: dict[str, dict[str, float]] = {}
  answers: dict[str, Any] = {}
  for engine in rng.sample(ENGINES, len(ENGINES)):
    load, (environment, room) = _seconds(lambda e=engine: _load(suites[e], task))
    play, results = _seconds(lambda e=environment: _play(e, commands))
    seconds[engine] = {'load': load, 'steps': play}
    answers[engine] = [room, *results]
  if answers['fast'] != answers['textworld']:
    raise errors.UserError(
      f'{task.id}: the engines do not answer alike, so their speeds say nothing; '
      'tests/envs/test_engine_official.py shows where they differ.')
  return seconds


def ratio(ours: Sequence[float], theirs: Sequence[float], seed: int = 0) -> dict[str, Any]:
  """How many times faster ours is: all their seconds over all of ours.

  Args:
    ours: seconds by game.
    theirs: seconds of the same games.
    seed: of the percentile bootstrap over games.

  Returns:
    'value', its 95 % interval 'ci95', and 'games', the least and the largest of a single game.
  """
  pairs = np.array([ours, theirs], dtype=np.float64)
  drawn = np.random.default_rng(seed).integers(pairs.shape[1], size=(_RESAMPLES, pairs.shape[1]))
  sums = pairs[:, drawn].sum(axis=2)
  low, high = np.percentile(sums[1] / sums[0], [2.5, 97.5])
  single = pairs[1] / pairs[0]
  return {'value': float(pairs[1].sum() / pairs[0].sum()), 'ci95': [float(low), float(high)],
          'games': [float(single.min()), float(single.max())]}


def summarise(
  games: Sequence[dict[str, dict[str, float]]], steps: int, min_ratio: float
) -> dict[str, Any]:
  """Rates of both engines and their ratios, from `measure` of each game."""
  seconds = {e: {m: [game[e][m] for game in games] for m in MEASURES} for e in ENGINES}
  work = {'load': len(games), 'steps': len(games) * steps}
  ratios = {m: ratio(seconds['fast'][m], seconds['textworld'][m]) for m in MEASURES}
  return {
    'n': len(games),
    'steps_per_game': steps,
    'engines': {
      e: {f'{m}_per_s': work[m] / sum(seconds[e][m]) for m in MEASURES} |
         {f'{m}_cpu_s': sum(seconds[e][m]) for m in MEASURES}
      for e in ENGINES},
    'ratio': ratios,
    'min_ratio': min_ratio,
    'reached': all(r['value'] >= min_ratio for r in ratios.values()),
  }


def table(record: dict[str, Any]) -> str:
  """The record for a terminal."""
  lines = [f'{"per CPU second":<16} {"games loaded":>14} {"steps":>14}']
  for engine in ENGINES:
    rates = record['engines'][engine]
    lines.append(
      f'{_NAMES[engine]:<16} {rates["load_per_s"]:>14,.2f} {rates["steps_per_s"]:>14,.1f}')
  for measure_ in MEASURES:
    r = record['ratio'][measure_]
    lines.append(
      f'{measure_}: {r["value"]:,.0f} times TextWorld (95 % interval {r["ci95"][0]:,.0f} to '
      f'{r["ci95"][1]:,.0f}; single games {r["games"][0]:,.0f} to {r["games"][1]:,.0f})')
  verdict = 'reached' if record['reached'] else 'NOT reached'
  lines.append(f'n = {record["n"]} {record["games"]}, {record["steps_per_game"]} steps each; '
               f'at least {record["min_ratio"]:g} times: {verdict}')
  return '\n'.join(lines)


def compare() -> dict[str, Any]:
  """The record of our engine against TextWorld, of the command's flags."""
  values = flags.FLAGS
  data = values.data or os.environ.get('HINTSIGHT_DATA') or 'generated'
  # One game more than is measured: the first loads the packages and says how long the rest takes.
  suites = {
    e: envs.get_suite('household', data=data, num_train=values.games + 1, engine=e)
    for e in ENGINES}
  warm_up, *tasks = suites['fast'].tasks(_SPLIT)
  if len(tasks) < values.games:
    raise errors.UserError(
      f'{data} holds {len(tasks) + 1} games of the split {_SPLIT}, --games={values.games} needs '
      'one more than it says; take fewer.')
  kind = f'{"generated" if data == "generated" else "ALFWorld"} games of the split {_SPLIT}'
  measure(suites, warm_up, 1)
  start = time.perf_counter()
  measure(suites, warm_up, values.steps)
  # TextWorld's time is about as long as the problem's text.
  sizes = [len(suites['fast'].game_data(task).problem) for task in (warm_up, *tasks)]
  minutes = (time.perf_counter() - start) * sum(sizes[1:]) / sizes[0] / 60
  print(f'{values.games} {kind}, {values.steps} steps each, in both engines: about {minutes:.1f} '
        'minutes, judged by one game', flush=True)
  start = time.perf_counter()
  games = []
  for number, task in enumerate(tasks, 1):
    games.append(measure(suites, task, values.steps))
    if number % 10 == 0:
      print(f'{number} of {len(tasks)} games', flush=True)
  record = {
    **summarise(games, values.steps, values.min_ratio),
    'games': kind,
    'task_types': dict(sorted(collections.Counter(task.task_type for task in tasks).items())),
    'wall_s': time.perf_counter() - start,
  }
  print(table(record), flush=True)
  return record


def main(_) -> None:
  values = flags.FLAGS
  rows = [row for row in values.rows if row]
  if unknown := [row for row in rows if row not in env_rows.ROWS]:
    raise errors.UserError(
      f'--rows knows no {", ".join(unknown)}; there are {", ".join(env_rows.ROWS)}.')
  record = compare() if values.games else {}
  if rows:
    record['rows'] = env_rows.measure_rows(
      rows, games=values.row_games, steps=values.row_steps, rounds=values.row_rounds,
      processes=values.processes or os.cpu_count() or 1)
  if values.catalogue:
    record['catalogue'] = env_rows.measure_catalogue(values.catalogue)
    print(env_rows.catalogue_table(record['catalogue']), flush=True)
  record['measured'] = summary.measured('experiments.bench.envs', _PACKAGES)
  path = pathlib.Path(values.out)
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    workdir_lib.write_json(path, record)
  except OSError as error:
    raise errors.UserError(
      f'{path} cannot be written ({error.strerror}); take another --out.') from error
  print(path)
  if not record.get('reached', True):
    sys.exit(1)


def define_flags() -> None:
  """Flags of the command; not defined on import, since tests import this module."""
  flags.DEFINE_string(
    'data', '', "Folder of ALFWorld's games, or 'generated'; HINTSIGHT_DATA by default.")
  flags.DEFINE_integer(
    'games', 60, 'Games of the comparison; the six task types take turns; 0 for none.',
    lower_bound=0)
  flags.DEFINE_integer('steps', 60, 'Random admissible commands per game.', lower_bound=1)
  flags.DEFINE_float('min_ratio', 300.0, 'Exit code 1 where ours is not so many times faster.')
  flags.DEFINE_list('rows', list(env_rows.ROWS), 'Environments that are measured by themselves.')
  flags.DEFINE_integer('row_games', 30, 'Games of each of them.', lower_bound=1)
  flags.DEFINE_integer('row_steps', 60, "The expert's actions per game, at most.", lower_bound=1)
  flags.DEFINE_integer('row_rounds', 3, 'Times that the games are played.', lower_bound=1)
  flags.DEFINE_integer('processes', 0, 'Of the pooled rows; 0 is one for each core.', lower_bound=0)
  flags.DEFINE_integer(
    'catalogue', 200_000, "Products of WebShop's catalogue at size; 0 for none.", lower_bound=0)
  flags.DEFINE_string('out', str(OUT), 'JSON file to write.')


if __name__ == '__main__':
  define_flags()
  cli.run(main, required=())

"""Every environment behind the same interface: how fast, how soon, how large.

The scripted expert's actions are recorded first and then played by worker processes
(`envs.workers`), so that all environments do the same work in the same way: one process, and as
many as the machine has cores, every one driven by a thread of its own. Times are wall-clock: a Java
process and a worker compute elsewhere.
"""

import concurrent.futures
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import envs
from data import errors, process_memory
from envs import base, webshop_generate, workers

ROWS = ('household', 'textworld', 'webshop', 'scienceworld')
FULL_CATALOGUE = 1_180_000
_QUERIES = 50


def _recipe(row: str, games: int) -> tuple[str, dict[str, Any]]:
  """Name and options of a row's suite."""
  if row in ('household', 'textworld'):
    return 'household', {
      'num_train': games, 'engine': 'fast' if row == 'household' else 'textworld'}
  return row, {'num_tasks': games} if row == 'scienceworld' else {}


def record_games(
  suite: base.Suite, games: int, steps: int
) -> list[tuple[base.Task, list[str]]]:
  """Tasks of the training split, each with the first actions of the scripted expert."""
  recorded = []
  for task in suite.tasks('train')[:games]:
    environment, expert = suite.make(task), suite.expert(task, base.rules_of(suite, task))
    observation, actions = environment.reset(), []
    for _ in range(min(steps, base.limits_of(environment).steps)):
      actions.append(expert.act(observation).action)
      result = environment.step(actions[-1])
      observation = result.observation
      if result.done:
        break
    if close := getattr(environment, 'close', None):
      close()
    recorded.append((task, actions))
  return recorded


def _timed(work, *arguments) -> tuple[float, Any]:
  started = time.perf_counter()
  result = work(*arguments)
  return time.perf_counter() - started, result


def tree_mb(pid: int) -> float:
  """Resident memory of a process and of all that it started."""
  own = process_memory.resident_bytes(pid) / 2**20
  children = pathlib.Path(f'/proc/{pid}/task/{pid}/children').read_text().split()
  return own + sum(tree_mb(int(child)) for child in children)


def _start(pool: workers.WorkerSuite, task: base.Task) -> workers.RemoteEnvironment:
  environment = pool.make(task)
  environment.reset()
  return environment


def _play(environment: base.Environment, actions: Sequence[str]) -> int:
  for number, action in enumerate(actions, 1):
    if environment.step(action).done:
      return number
  return len(actions)


def measure_row(
  row: str, recorded: Sequence[tuple[base.Task, list[str]]], *, processes: int, rounds: int
) -> dict[str, Any]:
  """Plays recorded games in worker processes.

  Args:
    row: one of ROWS.
    recorded: as of `record_games`; at least one.
    processes: workers, each driven by a thread.
    rounds: times that the games are played; before them once more, unmeasured.

  Returns:
    start_s to the first game in a new process, load_s of a later game, steps_per_s of all processes
    together, memory_mb of the largest process with what it started, and the steps measured.
  """
  name, options = _recipe(row, len(recorded))
  pool = workers.WorkerSuite(
    envs.get_suite(name, **options), name, options, workers=processes, timeout=600.0)
  # A game for every process in every wave.
  games = [recorded[i % len(recorded)] for i in range(-(-len(recorded) // processes) * processes)]
  loading = stepping = memory = 0.0
  steps = loads = 0
  start_s = 0.0
  with concurrent.futures.ThreadPoolExecutor(processes) as threads:
    for number in range(rounds + 1):
      for at in range(0, len(games), processes):
        wave = games[at:at + processes]
        seconds, environments = _timed(
          lambda wave=wave: list(threads.map(lambda game: _start(pool, game[0]), wave)))
        start_s = start_s or seconds
        played_s, played = _timed(lambda wave=wave, environments=environments: list(
          threads.map(_play, environments, [actions for _, actions in wave])))
        memory = max([memory, *(tree_mb(e._worker.pid) for e in environments)])
        for environment in environments:
          environment.close()
        if number:
          loading, loads = loading + seconds, loads + len(wave)
          stepping, steps = stepping + played_s, steps + sum(played)
  trouble = pool.counts['crashed'] + pool.counts['hung'] + pool.counts['leaked']
  pool.close()
  if trouble:
    raise errors.UserError(f'{row}: {trouble} worker(s) died; its speed says nothing.')
  return {'processes': processes, 'start_s': start_s, 'load_s': loading * processes / loads,
          'steps_per_s': steps / stepping, 'memory_mb': memory, 'steps': steps}


def measure_rows(
  rows: Sequence[str], *, games: int, steps: int, rounds: int, processes: int
) -> list[dict[str, Any]]:
  """Every row with one process, and with several."""
  found = []
  for row in rows:
    # TextWorld plays what is recorded of the fast engine, which answers alike.
    name, options = _recipe('household' if row == 'textworld' else row, games)
    suite = envs.get_suite(name, **options)
    recorded = record_games(suite, games, steps)
    if close := getattr(suite, 'close', None):
      close()
    for number in dict.fromkeys((1, processes)):
      found.append({'environment': row, **measure_row(
        row, recorded, processes=number, rounds=rounds)})
      print(rows_table(found[-1:], head=len(found) == 1), flush=True)
  return found


def rows_table(rows: Sequence[dict[str, Any]], head: bool = True) -> str:
  lines = [f'{"environment":<14} {"processes":>9} {"start s":>8} {"load s":>8} {"steps/s":>10} '
           f'{"a process":>10} {"MB each":>8}'] * head
  for r in rows:
    lines.append(
      f'{r["environment"]:<14} {r["processes"]:>9} {r["start_s"]:>8.2f} {r["load_s"]:>8.4f} '
      f'{r["steps_per_s"]:>10,.0f} {r["steps_per_s"] / r["processes"]:>10,.0f} '
      f'{r["memory_mb"]:>8,.0f}')
  return '\n'.join(lines)


# WebShop's catalogue at size.


def write_catalogue(folder: pathlib.Path, count: int, seed: int = 0) -> None:
  """A generated catalogue in the official files."""
  folder.mkdir(parents=True, exist_ok=True)
  attributes: dict[str, Any] = {}
  with (folder / 'items_shuffle.json').open('w', encoding='utf-8') as file:
    for index in range(count):
      product = webshop_generate.product(seed, index)
      attributes[product.asin] = {
        'attributes': product.attributes, 'instruction': product.instruction,
        'instruction_attributes': product.instruction_attributes}
      file.write('[' if not index else ',')
      json.dump({
        'asin': product.asin, 'name': product.title, 'small_description': product.bullets,
        'full_description': product.description, 'pricing': product.price_tag,
        'category': product.category, 'query': product.query,
        'product_category': product.product_category,
        'customization_options': {
          name: [{'value': value} for value in values]
          for name, values in product.options.items()}}, file)
    file.write(']')
  (folder / 'items_ins_v2.json').write_text(json.dumps(attributes))


def open_catalogue(folder: str) -> dict[str, float]:
  """Opens a catalogue in this process: seconds, memory, and what searches and steps take."""
  from envs import webshop, webshop_reward

  before = process_memory.peak_bytes()
  suite = webshop.WebShopSuite(folder)
  open_s, shop = _timed(lambda: suite.shop)
  places = range(0, len(shop.products), max(1, len(shop.products) // _QUERIES))
  products = [shop.products[place] for place in places]
  searches = [_timed(shop.search, product.title)[0] for product in products]
  goal = webshop_reward.Goal(products[0].asin, 'Find me it', (), (), 100.0)
  environment, steps = webshop.WebShopEnvironment(shop, goal), 0
  environment.reset()
  environment.step(f'search[{products[0].title}]')
  started = time.perf_counter()
  while time.perf_counter() < started + 0.5:
    for action in ('click[next >]', 'click[< prev]'):
      environment.step(action)
      steps += 1
  return {'open_s': open_s, 'search_ms': 1000 * statistics.median(searches),
          'page_steps_per_s': steps / (time.perf_counter() - started),
          'memory_mb': (process_memory.peak_bytes() - before) / 2**20}


def measure_catalogue(count: int) -> dict[str, Any]:
  """A catalogue of so many products: made ready once, opened again, and the full one from it.

  What grows with the number of products is extrapolated in proportion to it.
  """
  with tempfile.TemporaryDirectory() as folder:
    write_catalogue(pathlib.Path(folder), count)
    opened = []
    for _ in range(2):
      # In a process of its own, for its memory.
      done = subprocess.run(
        [sys.executable, '-c', 'import json, sys; from experiments.bench import env_rows; '
         'print(json.dumps(env_rows.open_catalogue(sys.argv[1])))', folder],
        capture_output=True, text=True, check=False)
      if done.returncode:
        raise errors.UserError(f'The catalogue cannot be opened: {done.stderr.strip()[-300:]}')
      opened.append(json.loads(done.stdout))
    disk = sum(f.stat().st_size for f in pathlib.Path(folder).rglob('*') if f.is_file()) / 2**20
  first, again = opened
  measured = {
    'prepare_s': first['open_s'], 'prepare_memory_mb': first['memory_mb'],
    'open_s': again['open_s'], 'memory_mb': again['memory_mb'], 'search_ms': again['search_ms'],
    'disk_mb': disk}
  factor = FULL_CATALOGUE / count
  return {'products': count, **measured, 'page_steps_per_s': again['page_steps_per_s'],
          'full': {'products': FULL_CATALOGUE, **{k: v * factor for k, v in measured.items()}}}


def catalogue_table(record: dict[str, Any]) -> str:
  lines = []
  for r, kind in ((record, 'measured'), (record['full'], 'in proportion')):
    lines.append(
      f'WebShop, {r["products"]:,} products ({kind}): made ready once in {r["prepare_s"]:,.0f} s '
      f'with {r["prepare_memory_mb"]:,.0f} MB, opened in {r["open_s"]:,.1f} s with '
      f'{r["memory_mb"]:,.0f} MB, a search {r["search_ms"]:.1f} ms, {r["disk_mb"]:,.0f} MB on disk')
  return '\n'.join(lines)

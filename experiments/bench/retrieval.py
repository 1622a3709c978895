"""What looking up experiences costs: our index against exact search and faiss, and an episode.

  python -m experiments.bench.retrieval        # writes experiments/results/bench_retrieval.json

Keys are MiniLM's vectors of real opening observations and tasks of generated houses; beyond
--texts of them each further key is a random mixture of two, normalised, so that a large bank keeps
the crowding of a real one. Queries are openings of houses that are not in the bank. Every engine
answers in a process of its own; memory is what that process gains between having the keys and
having answered.

An approximate engine may look at as much as it must to find 95 % of the ten nearest (recall@10):
the share of the tree's leaves is raised step by step until it does. Of what was tried the record
keeps the first setting that suffices, or else the last one.

Static retrieval embeds the task and searches once an episode. Its share is of an episode's wall
time of SmolLM2-135M playing generated houses in batches, which is the shortest an episode takes.
"""

import itertools
import json
import multiprocessing
import pathlib
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from absl import flags

from configs import cli
from configs import rollout as rollout_config
from data import errors, process_memory, summary
from data import workdir as workdir_lib

OUT = pathlib.Path(__file__).parents[1] / 'results' / 'bench_retrieval.json'
ENGINES = ('exact', 'ours', 'faiss_flat', 'faiss_ivf')
_NAMES = {
  'exact': 'NumPy, exact', 'ours': 'ours (ScaNN)', 'faiss_flat': 'faiss, exact',
  'faiss_ivf': 'faiss, IVF'}
_PACKAGES = ('scann', 'faiss-cpu', 'numpy', 'jax')
RECALL, RECALL_K = 0.95, 10
# Shares of the leaves, or cells, that a query visits.
_SHARES = (0.05, 0.1, 0.2, 0.4, 0.7, 1.0)
_QUERIES = 200
_EPISODES = 32
_STATIC_SIZE = 100_000
_STATIC_LIMIT = 0.02
_STATIC_K = 2


def opening_texts(count: int, split: str) -> list[str]:
  """Opening observations with their tasks, of `count` generated houses of a split."""
  import envs
  suite = envs.get_suite(
    'household', data='generated', skills='loop', task_types=('make_state',), num_train=count,
    num_valid=count, num_appliances=(5, 5), num_surfaces=(1, 2), num_things=(2, 3))
  tasks = list(itertools.islice(suite.tasks(split), count))
  return [f'{suite.make(task).reset()}\n\n{task.instruction}' for task in tasks]


def make_keys(vectors: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
  """`count` keys: the vectors, and from there on normalised mixtures of two.

  Args:
    vectors: float32 [E, D], L2-normalised.
    count: N.
    seed: of the mixtures.

  Returns:
    float32 [N, D], L2-normalised.
  """
  if count <= len(vectors):
    return vectors[:count]
  rng = np.random.default_rng(seed)
  keys = np.empty((count, vectors.shape[1]), np.float32)
  keys[:len(vectors)] = vectors
  for start in range(len(vectors), count, 65_536):
    size = min(65_536, count - start)
    first = rng.integers(len(vectors), size=size)
    # Never one with itself, which would be the vector again.
    second = (first + rng.integers(1, len(vectors), size=size)) % len(vectors)
    one, other = vectors[first], vectors[second]
    share = rng.uniform(0, 1, (size, 1)).astype(np.float32)
    mixed = share * one + (1 - share) * other
    keys[start:start + size] = mixed / np.linalg.norm(mixed, axis=1, keepdims=True)
  return keys


def recall(found: np.ndarray, keys: np.ndarray, queries: np.ndarray, least: np.ndarray) -> float:
  """Share of the found ids that score no less than the k-th nearest; equal keys are all right.

  Args:
    found: int [Q, k].
    keys: float32 [N, D].
    queries: float32 [Q, D].
    least: float32 [Q], score of the k-th nearest.
  """
  scores = np.einsum('qkd,qd->qk', keys[found], queries)
  return float(np.mean((scores >= least[:, None] - 1e-4) & (found >= 0)))


Search = Callable[[np.ndarray, int], np.ndarray]


def _exact(keys: np.ndarray, _: float) -> Search:
  from retrieval import index
  return lambda queries, k: index.exact_search(keys, queries, k)[0]


def _ours(keys: np.ndarray, share: float) -> Search:
  from retrieval import index
  built = index.VectorIndex.build(keys, leaves_searched=share, min_recall=0.0)
  return lambda queries, k: built.search(queries, k)[0]


def _faiss():
  try:
    import faiss
  except ImportError:
    raise errors.UserError(
      'faiss is not installed; pip install faiss-cpu, or leave it out of --engines.') from None
  return faiss


def _faiss_flat(keys: np.ndarray, _: float) -> Search:
  built = _faiss().IndexFlatIP(keys.shape[1])
  built.add(keys)
  return lambda queries, k: built.search(queries, k)[1]


def _faiss_ivf(keys: np.ndarray, share: float) -> Search:
  faiss = _faiss()
  cells = max(1, round(len(keys) ** 0.5))
  built = faiss.IndexIVFFlat(
    faiss.IndexFlatIP(keys.shape[1]), keys.shape[1], cells, faiss.METRIC_INNER_PRODUCT)
  built.train(keys)
  built.add(keys)
  built.nprobe = max(1, round(cells * share))
  return lambda queries, k: built.search(queries, k)[1]


_BUILD = {'exact': _exact, 'ours': _ours, 'faiss_flat': _faiss_flat, 'faiss_ivf': _faiss_ivf}


def measure(engine: str, keys: np.ndarray, queries: np.ndarray, least: np.ndarray) -> dict:
  """One engine over one bank.

  Args:
    engine: of `ENGINES`.
    keys: float32 [N, D].
    queries: float32 [Q, D].
    least: float32 [Q], score of the RECALL_K-th nearest key.

  Returns:
    'build_s', 'memory_bytes', 'single_per_s' (queries/s, one at a time), 'batch_per_s', 'recall'
    and, for an approximate engine, 'leaves_searched'.
  """
  from retrieval import index
  approximate = engine == 'faiss_ivf' or (engine == 'ours' and len(keys) >= index.EXACT_BELOW)
  # One small search before, so that packages are loaded and threads are running.
  _BUILD[engine](keys[:1000], 1.0)(queries[:2], 1)
  before = process_memory.resident_bytes()
  for share in _SHARES if approximate else (1.0,):
    start = time.perf_counter()
    search = _BUILD[engine](keys, share)
    build_s = time.perf_counter() - start
    found = recall(search(queries, RECALL_K), keys, queries, least)
    if found >= RECALL:
      break
  memory = process_memory.resident_bytes() - before
  start = time.perf_counter()
  for query in queries[:, None]:
    search(query, RECALL_K)
  single = len(queries) / (time.perf_counter() - start)
  start = time.perf_counter()
  search(queries, RECALL_K)
  batch = len(queries) / (time.perf_counter() - start)
  return {
    'build_s': build_s, 'memory_bytes': memory, 'single_per_s': single, 'batch_per_s': batch,
    'recall': found, **({'leaves_searched': share} if approximate else {})}


def _worker(engine: str, folder: str, queue) -> None:
  try:
    arrays = [np.load(pathlib.Path(folder) / f'{name}.npy') for name in
              ('keys', 'queries', 'least')]
    queue.put(measure(engine, *arrays))
  except errors.UserError as error:
    queue.put({'error': str(error)})


def measure_apart(engine: str, folder: pathlib.Path) -> dict:
  """`measure` in a process of its own, of the arrays that lie in a folder."""
  context = multiprocessing.get_context('spawn')
  queue = context.SimpleQueue()
  process = context.Process(target=_worker, args=(engine, str(folder), queue))
  process.start()
  process.join()
  if process.exitcode or queue.empty():
    return {'error': f'its process ended with exit code {process.exitcode}'}
  return queue.get()


def measure_static(keys: np.ndarray, texts: list[str], episodes: int) -> dict[str, Any]:
  """What one static retrieval costs, against the episode that it is for.

  Args:
    keys: float32 [N, D], of the bank.
    texts: tasks that no vector is known of.
    episodes: played by SmolLM2-135M, as many at a time.

  Returns:
    Seconds: 'encode_s' and 'search_s' a retrieval, 'episode_s'; and 'share'.
  """
  import rollout
  from retrieval import encoders, index
  encoder = encoders.load('minilm')
  built = index.VectorIndex.build(keys, min_recall=0.0)
  built.search(encoder.encode(['a text']), _STATIC_K)
  encode_s = search_s = 0.0
  for text in texts:
    start = time.perf_counter()
    query = encoder.encode([text])
    between = time.perf_counter()
    built.search(np.asarray(query, np.float32), _STATIC_K)
    encode_s += between - start
    search_s += time.perf_counter() - between
  config = rollout_config.make({
    'agent': 'plain', 'skills': 'loop', 'task_types': 'make_state',
    'env_options': 'num_appliances:5-5;num_surfaces:1-2;num_things:2-3', 'max_env_steps': 10,
    'max_calls': 14, 'max_new_tokens': 24, 'max_context': 640, 'episodes': episodes,
    'slots': episodes, 'split': 'valid_unseen'})
  with tempfile.TemporaryDirectory() as folder:
    rollout.run(config, pathlib.Path(folder))
    record = json.loads((pathlib.Path(folder) / 'summary.json').read_text())
  # Compiling is of the program and not of an episode.
  episode_s = (record['wall_s']['rollout'] - record['engine']['compile_s']) / episodes
  seconds = (encode_s + search_s) / len(texts)
  return {
    'keys': len(keys), 'queries': len(texts), 'encode_s': encode_s / len(texts),
    'search_s': search_s / len(texts), 'episodes': episodes, 'episode_s': episode_s,
    'share': seconds / episode_s, 'limit': _STATIC_LIMIT}


def _visited(row: Mapping[str, Any]) -> str:
  return f'{row["leaves_searched"]:.0%}' if 'leaves_searched' in row else 'all'


def _static_line(static: Mapping[str, Any]) -> str:
  return (
    f'static retrieval from {static["keys"]:,} experiences: {1e3 * static["encode_s"]:.1f} ms to '
    f'embed, {1e3 * static["search_s"]:.1f} ms to search; {static["share"]:.2%} of an episode '
    f'({static["episode_s"]:.2f} s, n = {static["episodes"]}); at most {static["limit"]:.0%}')


def table(record: Mapping[str, Any]) -> str:
  """The record for a terminal."""
  lines = [
    f'{"keys":>9} {"engine":<14} {"build s":>9} {"memory MB":>10} {"one by one/s":>13} '
    f'{"batch/s":>10} {"recall@10":>10} {"visited":>8}']
  for row in record['rows']:
    head = f'{row["keys"]:>9,} {_NAMES[row["engine"]]:<14}'
    if 'error' in row:
      lines.append(f'{head} {row["error"]}')
      continue
    lines.append(
      f'{head} {row["build_s"]:>9.2f} {row["memory_bytes"] / 1e6:>10,.0f} '
      f'{row["single_per_s"]:>13,.0f} {row["batch_per_s"]:>10,.0f} {row["recall"]:>10.3f} '
      f'{_visited(row):>8}')
  if static := record.get('static'):
    lines.append(_static_line(static))
  return '\n'.join(lines)


def section(record: Mapping[str, Any]) -> str:
  """The record as Markdown."""
  lines = [
    f'Banks of N keys with 384 numbers, {record["queries"]} queries, the ten nearest. An '
    'approximate engine visits the least of six shares of its leaves with which it finds '
    f'{RECALL:.0%} of them.',
    '', '| N | engine | build s | memory MB | queries/s one by one | in one batch | recall@10 | '
    'visited |', '|---|---|---|---|---|---|---|---|']
  for r in record['rows']:
    head = f'| {r["keys"]:,} | {_NAMES[r["engine"]]} |'
    if 'error' in r:
      lines.append(f'{head} {r["error"]} | | | | | |')
      continue
    lines.append(
      f'{head} {r["build_s"]:.2f} | {r["memory_bytes"] / 1e6:,.0f} | {r["single_per_s"]:,.0f} | '
      f'{r["batch_per_s"]:,.0f} | {r["recall"]:.3f} | {_visited(r)} |')
  if static := record.get('static'):
    lines += ['', _static_line(static)]
  return '\n'.join([*lines, '', summary.origin(record['measured'])])


def run(sizes: list[int], engines: list[str], texts: int, episodes: int) -> dict[str, Any]:
  """Measures all sizes and engines, and static retrieval where `episodes` is not 0."""
  from retrieval import encoders, index
  encoder = encoders.load('minilm')
  started = time.perf_counter()
  openings = opening_texts(texts, 'train')
  vectors = np.asarray(encoder.encode(openings), np.float32)
  queries = np.asarray(encoder.encode(opening_texts(_QUERIES, 'valid_unseen')), np.float32)
  print(f'{texts + _QUERIES} texts embedded in {time.perf_counter() - started:.0f} s', flush=True)
  rows: list[dict[str, Any]] = []
  with tempfile.TemporaryDirectory() as temporary:
    folder = pathlib.Path(temporary)
    for size in sizes:
      keys = make_keys(vectors, size)
      least = index.exact_search(keys, queries, min(RECALL_K, size))[1][:, -1]
      for name, array in (('keys', keys), ('queries', queries), ('least', least)):
        np.save(folder / f'{name}.npy', array)
      del keys
      for engine in engines:
        rows.append({'keys': size, 'engine': engine, **measure_apart(engine, folder)})
        print(table({'rows': rows[-1:]}).splitlines()[-1], flush=True)
  record: dict[str, Any] = {'rows': rows, 'embedded_texts': texts, 'queries': _QUERIES}
  if episodes:
    record['static'] = measure_static(
      make_keys(vectors, _STATIC_SIZE), opening_texts(2 * _QUERIES, 'valid_seen')[-50:], episodes)
  return record | {
    'wall_s': time.perf_counter() - started,
    'measured': summary.measured('experiments.bench.retrieval', _PACKAGES)}


def _sizes(text: str) -> list[int]:
  try:
    sizes = [int(float(size)) for size in text.split(',')]
  except ValueError:
    sizes = [0]
  if min(sizes) < RECALL_K:
    raise errors.UserError(f'--sizes={text}: give numbers of keys from {RECALL_K}, like 1e3,1e5.')
  return sizes


def main(_) -> None:
  values = flags.FLAGS
  sizes = _sizes(values.sizes)
  engines = values.engines.split(',')
  if unknown := set(engines) - set(ENGINES):
    raise errors.UserError(
      f'There is no engine {", ".join(sorted(unknown))}; there are {", ".join(ENGINES)}.')
  # Building and exact search are linear in the keys; 14 minutes were measured for a million.
  minutes = values.texts / 100 / 60 + 14e-6 * sum(sizes) * len(engines) / len(ENGINES)
  print(f'{len(sizes)} banks of up to {max(sizes):,} keys, {len(engines)} engines, '
        f'{values.episodes} episodes: about {minutes + values.episodes / 40:.0f} minutes',
        flush=True)
  record = run(sizes, engines, values.texts, values.episodes)
  path = pathlib.Path(values.out)
  path.parent.mkdir(parents=True, exist_ok=True)
  workdir_lib.write_json(path, record)
  print(f'{table(record)}\n{path}')


if __name__ == '__main__':
  flags.DEFINE_string('sizes', '1e3,1e4,1e5,1e6', 'Numbers of keys, comma separated.')
  flags.DEFINE_string('engines', ','.join(ENGINES), 'Which ones, comma separated.')
  flags.DEFINE_integer('texts', 4000, 'Openings that are embedded.', lower_bound=RECALL_K)
  flags.DEFINE_integer(
    'episodes', _EPISODES, 'Played to know what an episode takes; 0 leaves that out.',
    lower_bound=0)
  flags.DEFINE_string('out', str(OUT), 'JSON file to write.')
  cli.run(main, required=())

"""Our jobs of experiments/bench/rollout.py, each in a process of its own.

A transcript is what one episode asks of any engine: {'turns': [[new token ids], number of sampled
tokens], ...]}. Replaying it samples that many tokens whatever they are, so every engine does the
same work.
"""

import collections
import contextlib
import dataclasses
import functools
import json
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from inference import Engine, LookupConfig
from models import chips, cost, decoder, incremental, memory, native, registry, weights
from models.kv_cache import KVCache

_WARM_TURNS = 3  # of an episode, before it is replayed
_COMPILED = 0.01  # The share of a replay's time that may be compilation.
_BLOCK = 16  # tokens of a block of `exact`
_CANDIDATES = 8  # likeliest tokens that `exact` keeps of each place


def load(job: dict[str, Any], dtype: str) -> decoder.Model:
  """The job's model, prepared for decoding: its own weights, or random ones where it has none."""
  if not job['weights']:
    model = decoder.create(registry.get_config(job['model'], dtype=dtype), seed=0)
  else:
    config, params = weights.load_pretrained(pathlib.Path(job['weights']), dtype)
    model = decoder.from_params(dataclasses.replace(config, dtype=dtype), params)
  return incremental.prepare_for_decode(model)


def make_engine(job: dict[str, Any], model: decoder.Model, slots: int, max_len: int, **options):
  """An engine of the job; `job['engine']` are further arguments."""
  check_memory(model, slots, max_len)
  lookup = LookupConfig(draft_len=job['lookup']) if job.get('lookup') else None
  return Engine(
    model, num_slots=slots, max_len=max_len, cache_dtype=model.config.dtype, lookup=lookup,
    **{**options, **job.get('engine', {})})


def check_memory(model: decoder.Model, slots: int, max_len: int) -> None:
  """Raises MemoryError where weights, cache and the copies of it do not fit into the device."""
  cache = jax.eval_shape(
    lambda: KVCache.init(model.config, slots, max_len, model.config.dtype))
  nbytes = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
  # Decoding reads a copy of the cache, and a program that writes to one copies a layer of it.
  need, there = nbytes(model.frozen) + 2.25 * nbytes(cache), memory.device_bytes(1)
  if need > 0.9 * there:
    raise MemoryError(
      f'{slots} slots of {max_len} tokens need about {need / 2**30:.1f} GiB of the '
      f'{there / 2**30:.1f} GiB there are')


# Playing.


class _Timed:
  """An environment whose calls are timed."""

  def __init__(self, environment, clock: dict[str, float]):
    self._environment, self._clock = environment, clock

  def __getattr__(self, name):
    return getattr(self._environment, name)

  def reset(self):
    with _counted(self._clock):
      return self._environment.reset()

  def step(self, action):
    with _counted(self._clock):
      return self._environment.step(action)


@contextlib.contextmanager
def _counted(clock: dict[str, float]):
  start = time.perf_counter()
  yield
  clock['seconds'] += time.perf_counter() - start


def _split_of_time(engine: Engine, wall_s: float, environment_s: float) -> dict[str, float]:
  """Seconds by what they were spent on; the host has what nothing else has."""
  stats = engine.stats
  named = {
    'prefill_s': stats.prefill_s + stats.copy_s, 'decode_s': stats.decode_s,
    'compile_s': stats.compile_s, 'environment_s': environment_s}
  return {'wall_s': wall_s, **named, 'host_s': max(0.0, wall_s - sum(named.values()))}


def play(job: dict[str, Any]) -> dict[str, Any]:
  """Plays the episodes freely; the record has their transcripts.

  They are played twice, and the second time counts: it has all programs compiled.
  """
  import rollout
  from agents import episode as episode_lib
  from agents import expert_episodes, runner
  from configs import rollout as rollout_config
  from data.tokenizer import Tokenizer

  config = rollout_config.make(job['rollout'])
  tokenizer = Tokenizer.load(job['tokenizer'])
  suite, spec = rollout.make_suite(config), rollout.make_spec(config)
  tasks = rollout.choose_tasks(suite, config.split, config.episodes, config.skip)
  labels = episode_lib.Labels('base', job['model'], config.split, config.seed)
  examples = {}
  if config.few_shots:
    examples = expert_episodes.few_shot_examples(
      suite, {task.task_type for task in tasks}, tokenizer, spec, config.few_shots,
      exclude={task.id for task in tasks})
  model, clock = load(job, job['dtype']), {'seconds': 0.0}
  make = suite.make

  def timed(task):
    with _counted(clock):
      return _Timed(make(task), clock)

  suite.make = timed
  for warm in (True, False):
    engine = None  # The first one's cache is freed before the second one's is made.
    engine = make_engine(
      job, model, min(job['slots'], len(tasks)), config.max_context, stop_ids=tokenizer.stop_ids)
    clock['seconds'] = 0.0
    with tempfile.TemporaryDirectory() as folder:
      start = time.perf_counter()
      episodes = runner.play(
        engine, tokenizer, suite, episode_lib.games(tasks, [labels]), spec, folder,
        examples=examples, progress=False)
      wall_s = time.perf_counter() - start
    if warm:
      compile_s = engine.stats.compile_s
  return {
    **_split_of_time(engine, wall_s, clock['seconds']), 'episodes': len(episodes),
    'env_steps': sum(e.env_steps for e in episodes), 'compile_first_s': compile_s,
    'terminations': dict(collections.Counter(e.termination for e in episodes)),
    'stats': engine.stats.as_dict(), 'prefilled': engine.stats.prefilled,
    'copied': engine.stats.copied, 'generated': engine.stats.generated,
    'device_name': jax.devices()[0].device_kind,
    'transcripts': [transcript(e) for e in episodes if e.steps]}


def transcript(episode) -> dict[str, Any]:
  """What an episode asked of the engine, and all its tokens."""
  turns, end = [], 0
  tokens = [int(t) for t in episode.tokens]
  for step in episode.steps:
    turns.append([tokens[end:step.prompt_tokens], step.generated_tokens])
    end = step.prompt_tokens + step.generated_tokens
  return {'turns': turns, 'tokens': tokens[:end]}


def longest(transcripts: Sequence[dict[str, Any]]) -> int:
  """Tokens of the longest episode."""
  return max(sum(len(new) + count for new, count in t['turns']) for t in transcripts)


def drive(engine: Engine, transcripts: Sequence[dict[str, Any]]) -> float:
  """Replays transcripts over the engine's slots; a slot that is free takes the next. Seconds."""
  waiting = collections.deque(enumerate(transcripts))
  slots: list[tuple[int, list, int] | None] = [None] * engine.num_slots
  start = time.perf_counter()

  def advance(slot: int) -> None:
    if slots[slot] is not None:
      number, own, turn = slots[slot]
      slots[slot] = (number, own, turn + 1) if turn + 1 < len(own) else None
    if slots[slot] is None and waiting:
      number, found = waiting.popleft()
      slots[slot] = (number, found['turns'], 0)
    if slots[slot] is not None:
      number, own, turn = slots[slot]
      engine.submit(slot, own[turn][0], own[turn][1], reset=not turn, seed=number)

  for slot in range(engine.num_slots):
    advance(slot)
  while engine.busy:
    for completion in engine.step():
      advance(completion.slot)
  return time.perf_counter() - start


def with_context(
  transcripts: Sequence[dict[str, Any]], context: int, vocab_size: int
) -> list[dict[str, Any]]:
  """The transcripts with `context` random tokens of each one's own before the first prompt."""
  rng = np.random.default_rng(0)
  return [
    {'turns': [[rng.integers(0, vocab_size, context).tolist() + t['turns'][0][0],
                t['turns'][0][1]], *t['turns'][1:]]}
    for t in transcripts]


def replay(job: dict[str, Any]) -> dict[str, Any]:
  """Replays transcripts; a time that compiled next to nothing counts.

  Few turns are played first, and then all of them, a second time where the first one compiled.
  """
  transcripts = json.loads(pathlib.Path(job['transcripts']).read_text())
  model = load(job, job['dtype'])
  turns = job.get('turns', 0)
  transcripts = [{**found, 'turns': found['turns'][:turns or None]} for found in transcripts]
  if count := job.get('episodes'):
    transcripts = [transcripts[i % len(transcripts)] for i in range(count)]
  if context := job.get('context', 0):
    transcripts = with_context(transcripts, context, model.config.vocab_size)
  max_len = -(-longest(transcripts) // 128) * 128
  beginnings = [{**found, 'turns': found['turns'][:_WARM_TURNS]} for found in transcripts]
  for played in (beginnings, transcripts, transcripts):
    engine = None  # The last one's cache is freed before the next one's is made.
    engine = make_engine(
      job, model, min(job['slots'], len(transcripts)), max_len, stop_ids=())
    wall_s = drive(engine, played)
    if played is transcripts and engine.stats.compile_s < _COMPILED * wall_s:
      break
  return {
    **_split_of_time(engine, wall_s, 0.0), 'episodes': len(transcripts),
    'prefilled': engine.stats.prefilled, 'copied': engine.stats.copied,
    'generated': engine.stats.generated, 'stats': engine.stats.as_dict()}


# The bound of decoding.


def timed(work: Callable[[], Any], repeats: int = 5) -> float:
  """Least seconds of several calls after a first one."""
  jax.block_until_ready(work())
  seconds = []
  for _ in range(repeats):
    start = time.perf_counter()
    jax.block_until_ready(work())
    seconds.append(time.perf_counter() - start)
  return min(seconds)


def bandwidth() -> float:
  """Bytes/s to and from memory: the best of reading an array, copying it and streamed kernels."""
  size = 2**26 if jax.default_backend() == 'cpu' else 2**30  # float32 numbers
  array = jnp.ones((size,), jnp.float32)
  total, copied = jax.jit(jnp.sum), jax.jit(lambda x: x + 1)
  read, copy = 4 * size / timed(lambda: total(array)), 8 * size / timed(lambda: copied(array))
  kernels = array.reshape(-1, 1024, 1024)
  vector = jnp.ones((1, 1024), jnp.float32)
  product = jax.jit(lambda kernels, x: jax.lax.scan(
    lambda x, kernel: (1e-3 * (x @ kernel), None), x, kernels)[0])
  return max(read, copy, 4 * size / timed(lambda: product(kernels, vector)))


def product_rate(rows: int, dtype: str) -> float:
  """FLOP/s of products of `rows` rows with kernels that stay in the caches; the best size's.

  Of a CPU's own kernels and XLA's, that of the faster ones.
  """
  sizes = (512, 1024) if jax.default_backend() == 'cpu' else (2048, 4096, 8192)
  times = 64

  @functools.partial(jax.jit, static_argnames=('pad', 'own'))
  def chain(x, kernel, pad, own):
    def body(_, x):
      if own:
        product = native.products(x.astype(jnp.float32), [kernel])[0]
        return (product / kernel.shape[0]).astype(x.dtype)
      wide = jnp.concatenate([x, jnp.zeros((pad, x.shape[1]), x.dtype)])
      # Scaled, so that the numbers stay finite.
      product = jnp.dot(wide, kernel, preferred_element_type=jnp.float32)[:x.shape[0]]
      return (product / kernel.shape[0]).astype(x.dtype)
    return jax.lax.fori_loop(0, times, body, x)

  # One bfloat16 row is multiplied as two on a CPU, see `layers.matmul`.
  pad = int(rows == 1 and dtype == 'bfloat16' and jax.default_backend() == 'cpu')
  best = 0.0
  for size in sizes:
    x, kernel = jnp.ones((rows, size), dtype), jnp.ones((size, size), dtype)
    for own in {False, dtype == 'bfloat16' and native.available()}:
      seconds = timed(lambda x=x, kernel=kernel, own=own: chain(x, kernel, pad, own))
      best = max(best, times * 2 * rows * size**2 / seconds)
  return best


def step_bytes(model: decoder.Model, slots: int, context: float) -> float:
  """Bytes that a decode step reads: weights once, and the keys and values of every slot."""
  config = model.config
  sizes = {name: x.size * x.dtype.itemsize for name, x in decoder.to_params(model.frozen).items()}
  if not config.tie_embeddings:
    del sizes['embed.embedding']  # of it a step reads a row a slot
  cache = jax.eval_shape(lambda: KVCache.init(config, 1, 1, config.dtype))
  token = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
  return sum(sizes.values()) + slots * context * token


def decode(job: dict[str, Any]) -> dict[str, Any]:
  """Steady decoding against its bound, for each number of slots, context and dtype."""
  rng, steps, rows = np.random.default_rng(0), job['steps'], []
  speed = bandwidth()
  for dtype in job['dtypes']:
    model = load(job, dtype)
    vocab = model.config.vocab_size
    for slots in job['slots']:
      rate = product_rate(slots, dtype)
      for context in job['contexts']:
        # Half of the timed tokens come before the stated context, half after it.
        prompt = max(1, context - steps // 2)
        engine = make_engine(
          job, model, slots, prompt + steps + 8, stop_ids=(), share_prefixes=False)
        for _ in range(2):  # The first compiles.
          for slot in range(slots):
            engine.submit(slot, rng.integers(0, vocab, prompt), steps, reset=True)
          wanted = engine.stats.prefilled + engine.stats.copied + slots * prompt
          while engine.stats.prefilled + engine.stats.copied < wanted:
            engine.step()
          before, traces = engine.stats.generated, engine.stats.traces
          start = time.perf_counter()
          engine.run_until_complete()
          seconds = time.perf_counter() - start
          done = engine.stats.generated - before
        flops = cost.forward_flops(model.config, slots, slots, context)
        moved = step_bytes(model, slots, context)
        bound_s = max(moved / speed, flops / rate)
        chip = chips.peak_bandwidth(jax.devices()[0].device_kind)
        rows.append({
          'dtype': dtype, 'slots': slots, 'context': context, 'tokens_per_s': done / seconds,
          'step_s': seconds * slots / done, 'step_bytes': moved, 'step_flops': flops,
          'product_flops_per_s': rate, 'bound_s': bound_s, 'retraced': engine.stats.traces - traces,
          'bound_by': 'bandwidth' if moved / speed >= flops / rate else 'products',
          'share_of_bound': bound_s * done / slots / seconds,
          'share_of_bandwidth': moved / speed * done / slots / seconds,
          'share_of_stated_bandwidth': chip and moved / chip * done / slots / seconds})
        del engine
    del model
  return {'bytes_per_s': speed, 'rows': rows, 'device_name': jax.devices()[0].device_kind}


# Teacher forcing.


def through_cache(model: decoder.Model, longest: int, block_len: int) -> Callable:
  """Teacher forcing as in play: a model that reads transcripts through its cache.

  Args:
    model: in whose dtype it is computed.
    longest: tokens of the longest transcript.
    block_len: tokens that are read at a time.

  Returns:
    read(tokens int32 [T], dtype of the cache) -> iterator of float32 [at most block_len, V], the
    logits after each token.
  """
  length = -(-longest // block_len) * block_len

  @functools.partial(jax.jit, donate_argnames='cache')
  def run(block, cache, start, count):
    hidden, cache = incremental.forward_cached(
      model.graphdef, model.lora, model.frozen, block[None], cache, start[None], count[None],
      attend_len=length)
    return decoder.logits(model.graphdef, model.frozen, hidden[0]), cache

  def read(tokens: np.ndarray, dtype: str) -> Iterator[jax.Array]:
    cache = KVCache.init(model.config, 1, length, dtype)
    for start in range(0, len(tokens), block_len):
      piece = tokens[start:start + block_len]
      block = np.zeros(block_len, np.int32)
      block[:len(piece)] = piece
      logits, cache = run(block, cache, jnp.int32(start), jnp.int32(len(piece)))
      yield logits[:len(piece)]

  return read


def exact(job: dict[str, Any]) -> dict[str, Any]:
  """The likeliest next tokens at every place of one transcript, float32, through the cache.

  Returns:
    {'ids', 'logits'}: [N][8], of the place after each token, likeliest first.
  """
  tokens = np.asarray(job['tokens'], np.int32)
  read = through_cache(load(job, 'float32'), len(tokens), _BLOCK)
  ids, values = [], []
  for logits in read(tokens, 'float32'):
    top, found = jax.lax.top_k(logits, _CANDIDATES)
    values += np.asarray(top).tolist()
    ids += np.asarray(found).tolist()
  return {'ids': ids, 'logits': values}


def run_file(job: str, out: str) -> None:
  """Runs the job of one JSON file and writes the record to another."""
  content = json.loads(pathlib.Path(job).read_text())
  kinds = {'play': play, 'replay': replay, 'decode': decode, 'exact': exact}
  pathlib.Path(out).write_text(json.dumps(kinds[content['kind']](content)))

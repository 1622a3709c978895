"""The jobs of llama.cpp for experiments/bench/rollout.py, each in a process of its own.

Its C functions by way of `llama_cpp.llama_cpp`, not the package's one-sequence wrapper: one batch
holds a token of every sequence that decodes and prompt tokens of those that wait, and each sequence
keeps its keys and values over the turns. Needs nothing but NumPy and llama-cpp-python, so that it
can run in an environment of its own.
"""

import collections
import ctypes
import json
import os
import pathlib
import time
from typing import Any

import llama_cpp.llama_cpp as lib
import numpy as np

_CANDIDATES = 8
_CACHES = {'float32': 0, 'float16': 1, 'q8_0': 8, 'bfloat16': 30}  # ggml_type
# Kept for as long as the process lives: llama.cpp calls it from its own threads.
_SILENT = lib.llama_log_callback(lambda *_: None)


class _Batch:
  """A `llama_batch` over NumPy arrays, filled without a call a token."""

  def __init__(self, size: int):
    self.token, self.pos, self.one, self.seq = (np.zeros(size, np.int32) for _ in range(4))
    self.output = np.zeros(size, np.int8)
    self.one[:] = 1
    self._pointers = (self.seq.ctypes.data + 4 * np.arange(size)).astype(np.uint64)
    self.struct = lib.llama_batch()
    for field, array in (
        ('token', self.token), ('pos', self.pos), ('n_seq_id', self.one),
        ('seq_id', self._pointers), ('logits', self.output)):
      kind = dict(lib.llama_batch._fields_)[field]
      setattr(self.struct, field, ctypes.cast(ctypes.c_void_p(array.ctypes.data), kind))
    self.struct.embd = None

  def add(self, tokens, start: int, slot: int, output: bool) -> int:
    """Appends tokens of a sequence; whether the last one's logits are wanted. Returns its row."""
    end = self.struct.n_tokens + len(tokens)
    rows = slice(self.struct.n_tokens, end)
    self.token[rows], self.seq[rows] = tokens, slot
    self.pos[rows] = np.arange(start, start + len(tokens))
    self.output[rows] = 0
    self.output[end - 1] = output
    self.struct.n_tokens = end
    return end - 1


class _Context:
  """A model with room for `slots` sequences of `length` tokens."""

  def __init__(self, job: dict[str, Any], slots: int, length: int):
    lib.llama_log_set(_SILENT, None)
    lib.llama_backend_init()
    settings = job['setting']
    threads = settings.get('threads') or len(os.sched_getaffinity(0))
    self._model = lib.llama_model_load_from_file(
      job['weights'].encode(), lib.llama_model_default_params())
    params = lib.llama_context_default_params()
    params.n_ctx, params.n_seq_max = slots * (-(-length // 256) * 256), slots
    params.n_batch = max(settings.get('batch', 2048), slots)
    params.n_ubatch = settings.get('ubatch', 512)
    params.n_threads = params.n_threads_batch = threads
    params.flash_attn_type = int(settings.get('flash', True))
    params.type_k = params.type_v = _CACHES[settings.get('cache', 'float16')]
    params.kv_unified = settings.get('unified', False)
    params.no_perf = True
    self._context = self._model and lib.llama_init_from_model(self._model, params)
    if not self._context:
      raise RuntimeError(f'llama.cpp cannot make a context of {settings} from {job["weights"]}')
    self.capacity = params.n_batch
    self._vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self._model))
    self.batch = _Batch(self.capacity)

  def forget(self, slot: int) -> None:
    lib.llama_memory_seq_rm(lib.llama_get_memory(self._context), slot, -1, -1)

  def run(self) -> np.ndarray:
    """Computes the batch and empties it; float32 [outputs, vocabulary], valid until the next."""
    outputs = int(self.batch.output[:self.batch.struct.n_tokens].sum())
    code = lib.llama_decode(self._context, self.batch.struct)
    if code:
      raise RuntimeError(f'llama_decode returned {code}')
    self.batch.struct.n_tokens = 0
    pointer = lib.llama_get_logits(self._context)
    if not outputs:
      return np.zeros((0, self._vocab), np.float32)
    return np.ctypeslib.as_array(pointer, shape=(outputs, self._vocab))


def replay(job: dict[str, Any]) -> dict[str, Any]:
  """Replays transcripts; a sequence whose episode has ended takes the next one at once."""
  transcripts = json.loads(pathlib.Path(job['transcripts']).read_text())
  episodes = [found['turns'][:job['turns'] or None] for found in transcripts]
  slots = min(job['setting'].get('slots', job['slots']), len(episodes))
  length = max(sum(len(new) + count for new, count in own) for own in episodes)
  context = _Context(job, slots, length)
  waiting = collections.deque(episodes)
  # Of each sequence: turns left, tokens to compute, tokens in the cache, tokens still to sample.
  turns: list[collections.deque] = [collections.deque() for _ in range(slots)]
  new: list[list[int]] = [[] for _ in range(slots)]
  cached, left = [0] * slots, [0] * slots
  prefilled = generated = 0
  prefill_s = decode_s = 0.0
  start = time.perf_counter()

  def next_turn(slot: int, last: list[int]) -> None:
    nonlocal prefilled
    if not turns[slot] and waiting:
      context.forget(slot)
      turns[slot], cached[slot], last = collections.deque(waiting.popleft()), 0, []
    if turns[slot]:
      tokens, left[slot] = turns[slot].popleft()
      new[slot] = last + tokens
      prefilled += len(new[slot])

  for slot in range(slots):
    next_turn(slot, [])
  while any(new):
    ready, prefills = [], False
    batch = context.batch
    # Those that decode have one token and go first.
    for slot in sorted((s for s in range(slots) if new[s]), key=lambda s: len(new[s])):
      piece = new[slot][:context.capacity - batch.struct.n_tokens]
      if not piece:
        break
      whole = len(piece) == len(new[slot])
      prefills |= len(piece) > 1
      batch.add(piece, cached[slot], slot, whole)
      cached[slot] += len(piece)
      new[slot] = new[slot][len(piece):]
      if whole:
        ready.append(slot)
    began = time.perf_counter()
    logits = context.run()
    seconds = time.perf_counter() - began
    prefill_s, decode_s = prefill_s + seconds * prefills, decode_s + seconds * (not prefills)
    for slot, token in zip(ready, logits.argmax(1).tolist()):
      generated += 1
      left[slot] -= 1
      if left[slot]:
        new[slot] = [token]
      else:
        next_turn(slot, [token])
  wall_s = time.perf_counter() - start
  return {
    'wall_s': wall_s, 'prefill_s': prefill_s, 'decode_s': decode_s, 'environment_s': 0.0,
    'host_s': wall_s - prefill_s - decode_s, 'episodes': len(episodes), 'prefilled': prefilled,
    'generated': generated}


def exact(job: dict[str, Any]) -> dict[str, Any]:
  """As `rollout_jax.exact`, with llama.cpp's own quantised products and a float32 cache."""
  tokens = job['tokens']
  context = _Context({**job, 'setting': {'cache': 'float32', 'flash': False}}, 1, len(tokens))
  ids, values = [], []
  for start in range(0, len(tokens), 256):
    piece = tokens[start:start + 256]
    context.batch.add(piece, start, 0, True)
    context.batch.output[:len(piece)] = 1
    logits = context.run()
    best = np.argsort(-logits, axis=1)[:, :_CANDIDATES]
    ids += best.tolist()
    values += np.take_along_axis(logits, best, 1).tolist()
  return {'ids': ids, 'logits': values}


def run_file(job: str, out: str) -> None:
  """Runs the job of one JSON file and writes the record to another."""
  content = json.loads(pathlib.Path(job).read_text())
  kinds = {'replay': replay, 'exact': exact}
  pathlib.Path(out).write_text(json.dumps(kinds[content['kind']](content)))

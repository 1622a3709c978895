"""The jobs of `transformers` for experiments/bench/rollout.py, each in a process of its own.

Episodes are played in groups of `rows`, turn by turn, as batched generation does it: a turn lasts
as long as its longest reply, and rows whose episode has ended leave the batch (but not a static
cache).

- reprefill: `generate` on the whole conversation each turn, as agent frameworks do.
- cached: keys and values are kept over the turns (dynamic or static cache), in a loop of our own
  around the model, which costs less on the host than `generate`.
"""

import json
import pathlib
import time
from typing import Any

import torch
import transformers

from experiments.bench import train_torch

_CANDIDATES = 8


def _model(job: dict[str, Any], dtype: str):
  model = transformers.AutoModelForCausalLM.from_pretrained(
    job['folder'], dtype=getattr(torch, dtype), attn_implementation='sdpa')
  return model.eval()


class _Clock:
  """Seconds and tokens of prefill and of decoding."""

  def __init__(self):
    self.prefill_s = self.decode_s = 0.0
    self.prefilled = self.generated = self.computed = 0

  def wrap(self, model):
    """Times the model's own forward passes; one token a row is decoding."""
    forward = model.forward

    def timed(*args, **kwargs):
      width = kwargs['input_ids'].shape[1]
      start = time.perf_counter()
      result = forward(*args, **kwargs)
      seconds = time.perf_counter() - start
      if width > 1:
        self.prefill_s += seconds
        self.computed += kwargs['input_ids'].numel()
      else:
        self.decode_s += seconds
      return result

    model.forward = timed


class _Enough(transformers.StoppingCriteria):
  """Ends each row after its own number of tokens."""

  def __init__(self, width: int, counts: list[int]):
    self._width, self._counts = width, torch.tensor(counts)

  def __call__(self, input_ids, scores, **kwargs):
    return input_ids.shape[1] - self._width >= self._counts


def _left_padded(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
  """int64 tokens and mask [B, T]."""
  width = max(map(len, rows))
  tokens = torch.tensor([[0] * (width - len(row)) + row for row in rows])
  mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
  return tokens, mask


def _play_again(model, group: list[list], clock: _Clock) -> None:
  """One group, every turn from its first token on."""
  for turn in range(max(map(len, group))):
    rows = [own for own in group if len(own) > turn]
    histories = []
    for own in rows:
      # The recorded conversation: the sampled tokens stand in the next turn's place.
      histories.append([t for new, reply in own[:turn] for t in new + reply] + own[turn][0])
    counts = [len(own[turn][1]) for own in rows]
    tokens, mask = _left_padded(histories)
    model.generate(
      input_ids=tokens, attention_mask=mask, do_sample=False, use_cache=True,
      max_new_tokens=max(counts), eos_token_id=None, pad_token_id=0,
      stopping_criteria=transformers.StoppingCriteriaList([_Enough(tokens.shape[1], counts)]))
    clock.prefilled += sum(map(len, histories))
    clock.generated += sum(counts)


def _play_cached(model, group: list[list], clock: _Clock, static: bool) -> None:
  """One group; what was computed once stays in the cache, with gaps where rows were shorter."""
  turns = max(map(len, group))
  # The cache's width: the widest prefill and the longest reply of every turn.
  width = 0
  for turn in range(turns):
    here = [own[turn] for own in group if len(own) > turn]
    width += 1 + max(len(new) for new, _ in here) + max(len(reply) for _, reply in here)
  if static:
    cache = transformers.StaticCache(config=model.config, max_cache_len=width)
  else:
    cache = transformers.DynamicCache(config=model.config)
  rows = list(group)
  mask = torch.zeros(len(rows), 0, dtype=torch.long)
  last: list[list[int]] = [[] for _ in rows]
  for turn in range(turns):
    # A static cache has as many rows as it began with: there, what has ended stays, masked.
    if not static and any(len(own) <= turn for own in rows):
      left = [i for i, own in enumerate(rows) if len(own) > turn]
      rows, last, mask = [rows[i] for i in left], [last[i] for i in left], mask[left]
      cache.batch_select_indices(torch.tensor(left))
    here = [(a + own[turn][0], len(own[turn][1])) if len(own) > turn else ([], 0)
            for a, own in zip(last, rows)]
    counts = torch.tensor([count for _, count in here])
    tokens, there = _left_padded([new for new, _ in here])
    clock.prefilled += int(there.sum())
    clock.generated += int(counts.sum())
    sampled = []
    for step in range(int(counts.max())):
      positions = (mask.sum(1, keepdim=True) + there.cumsum(1) - 1).clamp(min=0)
      mask = torch.cat([mask, there], 1)
      logits = model(
        input_ids=tokens, attention_mask=mask, position_ids=positions, past_key_values=cache,
        use_cache=True, logits_to_keep=1).logits
      tokens = logits[:, -1].argmax(-1, keepdim=True)
      sampled.append(tokens[:, 0].tolist())
      # A row that is done goes on beside the others, and its tokens stay masked.
      there = (step + 1 < counts).long()[:, None]
    last = [[sampled[int(count) - 1][i]] if count else [] for i, count in enumerate(counts)]


def sample(transcripts: list[dict], count: int) -> list[dict]:
  """`count` transcripts as long as all of them are: evenly spaced, from the shortest on; 0: all."""
  if not 0 < count < len(transcripts):
    return transcripts
  by_length = sorted(transcripts, key=lambda found: len(found['tokens']))
  return [by_length[(2 * i + 1) * len(by_length) // (2 * count)] for i in range(count)]


@torch.inference_mode()
def replay(job: dict[str, Any]) -> dict[str, Any]:
  """Replays transcripts in one setting: {'mode', 'dtype', 'rows', 'cache', 'episodes'}."""
  transcripts = sample(
    json.loads(pathlib.Path(job['transcripts']).read_text()), job.get('episodes', 0))
  episodes = []
  for found in transcripts:
    own, end = [], 0
    for new, count in found['turns'][:job['turns'] or None]:
      end += len(new) + count
      own.append((new, found['tokens'][end - count:end]))
    episodes.append(own)
  model, clock = _model(job, job['dtype']), _Clock()
  clock.wrap(model)
  start = time.perf_counter()
  for first in range(0, len(episodes), job['rows']):
    group = episodes[first:first + job['rows']]
    if job['mode'] == 'reprefill':
      _play_again(model, group, clock)
    else:
      _play_cached(model, group, clock, job['cache'] == 'static')
  wall_s = time.perf_counter() - start
  return {
    'wall_s': wall_s, 'prefill_s': clock.prefill_s, 'decode_s': clock.decode_s,
    'environment_s': 0.0, 'host_s': wall_s - clock.prefill_s - clock.decode_s,
    'episodes': len(episodes), 'prefilled': clock.prefilled, 'generated': clock.generated,
    'prefill_computed': clock.computed}


@torch.inference_mode()
def exact(job: dict[str, Any]) -> dict[str, Any]:
  """As `rollout_jax.exact`."""
  logits = _model(job, 'float32')(input_ids=torch.tensor([job['tokens']])).logits[0]
  values, ids = logits.topk(_CANDIDATES, dim=-1)
  return {'ids': ids.tolist(), 'logits': values.tolist()}


def run_file(job: str, out: str) -> None:
  """Runs the job of one JSON file and writes the record to another."""
  content = json.loads(pathlib.Path(job).read_text())
  kinds = {'replay': replay, 'exact': exact, 'product_rate': train_torch.product_rate}
  pathlib.Path(out).write_text(json.dumps(kinds[content['kind']](content)))

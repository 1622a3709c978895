"""What it costs to keep keys and values in fewer bits: error of the logits, and games won.

  python -m experiments.bench.kv_cache

Logits: a model reads expert episodes through a cache, block by block, every token a key and value
that all later ones read as they are kept. Against the same with a cache in float32: relative root
mean square of the logits, KL in nats of the next token's distribution (mean over tokens), and the
share of tokens whose likeliest next token stays the same. Games: the repository's small decoder
plays the same houses greedily with each cache and wins about half of them; a game is paired with
itself. `--adapter=RUN/lora/adapter`, of an experience retrieval of `setting=small`, plays with that
one, on the skills that it was trained on.
"""

import pathlib
import sys
import tempfile
from typing import Any

from absl import flags

from configs import cli
from configs import experience_retrieval as experience_config
from configs import rollout as rollout_config
from data import summary, trajectory
from data import workdir as workdir_lib

PATH = pathlib.Path(__file__).parents[1] / 'results' / 'kv_cache.json'
DTYPES = ('float32', 'bfloat16', 'int8')
_BLOCK = 64
_OF_THE_SETTING = (
  'model', 'env', 'data', 'env_options', 'agent', 'prompt', 'max_env_steps', 'max_calls',
  'max_new_tokens', 'max_context', 'slots', 'decode_steps')


def measure_logits(model: str, episodes: int) -> dict[str, Any]:
  """Errors of one model's logits, in float32 but for the cache.

  Returns:
    {'model', 'tokens', 'rows': one dict for each of DTYPES with 'dtype', 'token_bytes' (of the
    cache), 'logits', 'kl', 'top1'}; the first row is the reference.
  """
  import jax
  import jax.numpy as jnp
  import numpy as np

  from agents import policy
  from experiments.bench import rollout_jax
  from experiments.bench import train as bench_train
  from models import decoder
  from models.kv_cache import KVCache

  loaded = policy.load_base(model)
  examples = bench_train.household_examples(model, episodes)
  one = decoder.from_params(loaded.config, loaded.params)
  read = rollout_jax.through_cache(one, max(len(e.tokens) for e in examples), _BLOCK)

  @jax.jit
  def compare(logits, reference):
    new, old = jax.nn.log_softmax(logits), jax.nn.log_softmax(reference)
    return jnp.stack([
      jnp.square(logits - reference).sum(), jnp.square(reference).sum(),
      (jnp.exp(old) * (old - new)).sum(), (new.argmax(-1) == old.argmax(-1)).sum()])

  sums = {dtype: np.zeros(4) for dtype in DTYPES}
  for example in examples:
    logits = {dtype: jnp.concatenate(list(read(example.tokens, dtype))) for dtype in DTYPES}
    for dtype in DTYPES:
      sums[dtype] += np.asarray(compare(logits[dtype], logits[DTYPES[0]]), np.float64)
  tokens = sum(len(example.tokens) for example in examples)
  return {'model': model, 'tokens': tokens, 'rows': [{
    'dtype': dtype,
    'token_bytes': KVCache.init(one.config, 1, _BLOCK, dtype).nbytes / _BLOCK,
    'logits': float((s[0] / s[1]) ** 0.5), 'kl': float(s[2] / tokens),
    'top1': float(s[3] / tokens)} for dtype, s in sums.items()]}


def measure_games(games: int, folder: pathlib.Path, adapter: str = '') -> dict[str, Any]:
  """Success over the same houses with each cache, without hints and experiences.

  Args:
    games: with each.
    folder: for the episodes.
    adapter: PEFT folder; with one the skills are the easy ones, else the hard ones.

  Returns:
    {'model', 'skills', 'rows': one dict for each of DTYPES with 'dtype', 'n', 'success_rate',
    'success_ci95', 'same_tokens' (share of the games in which every token is the reference's),
    'difference' and 'ci95' (paired, against the first row)}.
  """
  import rollout

  # Its houses and limits; nothing stands in the prompt, so that all layouts are the same.
  chosen = experience_config.get_config('setting=small')
  values = {key: chosen[key] for key in _OF_THE_SETTING}
  kind = 'easy' if adapter else 'hard'
  values.update(
    dtype='float32', skills=chosen[f'{kind}_skills'], task_types=chosen[f'{kind}_types'],
    memory='none', episodes=games, split=chosen.eval_split, adapter=adapter)
  rows, reference = [], None
  for dtype in DTYPES:
    config = rollout_config.make({**values, 'cache_dtype': dtype})
    rollout.run(config, folder / dtype)
    played = sorted(trajectory.load_episodes(folder / dtype), key=lambda e: e.task_id)
    reference = reference or played
    same = [a.tokens.tolist() == b.tokens.tolist()
            for a, b in zip(played, reference, strict=True)]
    won = summary.row(
      played, id=dtype, policy='adapter' if adapter else 'base', memory='none',
      split=config.split, seed=0)
    pair = summary.paired(played, reference, a_id=dtype, b_id=DTYPES[0])
    rows.append({
      'dtype': dtype, 'same_tokens': sum(same) / len(same),
      **{key: won[key] for key in ('n', 'success_rate', 'success_ci95')},
      **{key: pair[key] for key in ('difference', 'ci95')}})
  return {'model': chosen.model, 'skills': kind, 'rows': rows}


def section(record: dict[str, Any]) -> str:
  """The record as Markdown."""
  logits, games = record['logits'], record['games']
  lines = [
    f'Logits of {logits["model"]} over {logits["tokens"]:,} tokens of household episodes, against '
    'a cache in float32: relative root mean square, KL (nats), share of equal likeliest tokens.',
    '', '| cache | bytes a token | logits | KL | same token % |', '|---|---|---|---|---|']
  lines += [
    f'| {r["dtype"]} | {r["token_bytes"]:,.0f} | {r["logits"]:.5f} | {r["kl"]:.1e} | '
    f'{100 * r["top1"]:.2f} |' for r in logits['rows']]
  lines += [
    '', f'The same {games["rows"][0]["n"]} houses with each cache, greedy ({games["model"]}'
    f'{" with an adapter" if games["skills"] == "easy" else ""}, {games["skills"]} skills, nothing '
    'retrieved):', '',
    '| cache | success % (95 % interval) | against float32 | games with equal tokens % |',
    '|---|---|---|---|']
  for r in games['rows']:
    low, high = (100 * x for x in r['success_ci95'])
    worse, better = (100 * x for x in r['ci95'])
    lines.append(
      f'| {r["dtype"]} | {100 * r["success_rate"]:.1f} ({low:.1f} to {high:.1f}) | '
      f'{100 * r["difference"]:+.1f} ({worse:+.1f} to {better:+.1f}) | '
      f'{100 * r["same_tokens"]:.1f} |')
  return '\n'.join([*lines, '', summary.origin(record['measured'])])


def main(_) -> None:
  f = flags.FLAGS
  print(f'{f.episodes} episodes read by {f.model}, {f.games} games three times: about '
        f'{1 + f.episodes / 8 + f.games / 100:.0f} minutes', file=sys.stderr, flush=True)
  record: dict[str, Any] = {'logits': measure_logits(f.model, f.episodes)}
  with tempfile.TemporaryDirectory() as folder:
    record['games'] = measure_games(f.games, pathlib.Path(folder), f.adapter)
  record['measured'] = summary.measured('experiments.bench.kv_cache', ('jax', 'jaxlib', 'flax'))
  workdir_lib.write_json(pathlib.Path(f.out), record)
  print(section(record))


if __name__ == '__main__':
  flags.DEFINE_string(
    'model', 'smollm2_135m', 'Whose logits are compared: a name of models/registry.py, or a path.')
  flags.DEFINE_integer('episodes', 8, 'That they read.', lower_bound=1)
  flags.DEFINE_string('adapter', '', 'PEFT folder that plays; none by default.')
  flags.DEFINE_integer('games', 200, 'Played with each cache.', lower_bound=1)
  flags.DEFINE_string('out', str(PATH), 'JSON file to write.')
  cli.run(main, required=())

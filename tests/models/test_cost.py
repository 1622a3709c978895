"""The counted FLOPs are those of the programs' products."""

import math

import jax
import jax.numpy as jnp
import pytest
from jax.interpreters import partial_eval

from models import chips, cost, decoder, incremental, registry
from models.kv_cache import KVCache
from models.lora import LoraConfig
from training import step as step_lib

# Wide against its rows and heads, and one block of queries: attention is the whole square.
CONFIG = registry.shrink(
  registry.get_config('qwen25_7b', dtype='bfloat16'), vocab_size=512, embed_dim=128, mlp_dim=384,
  num_layers=3, num_heads=8, num_kv_heads=2, head_dim=16)
ROWS, WIDTH, LOSSES = 2, 64, 24


def product_flops(jaxpr, times=1):
  """FLOPs of all products of a jaxpr, loops as often as they run."""
  total = 0
  for equation in jaxpr.eqns:
    inner = times * equation.params.get('length', 1) if equation.primitive.name == 'scan' else times
    if equation.primitive.name == 'dot_general':
      (contract, _), _ = equation.params['dimension_numbers']
      lhs = equation.invars[0].aval.shape
      total += 2 * times * math.prod(equation.outvars[0].aval.shape) * math.prod(
        lhs[axis] for axis in contract)
    is_jaxpr = lambda x: hasattr(x, 'eqns') or hasattr(x, 'jaxpr')
    values = jax.tree.leaves(list(equation.params.values()), is_leaf=is_jaxpr)
    for value in filter(is_jaxpr, values):
      total += product_flops(getattr(value, 'jaxpr', value), inner)
  return total


@pytest.mark.parametrize('remat', decoder.REMAT)
def test_train_flops_are_those_of_the_products(remat):
  lora = LoraConfig(8, 16.0)
  model = decoder.abstract(CONFIG, lora)
  ints = {'tokens': (ROWS, WIDTH), 'segment_ids': (ROWS, WIDTH), 'positions': (ROWS, WIDTH),
          'loss_index': (1, LOSSES), 'loss_target': (1, LOSSES)}
  batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name, shape in ints.items()}
  batch['loss_weight'] = jax.ShapeDtypeStruct((1, LOSSES), jnp.float32)
  loss = lambda lora, frozen, batch: step_lib.batch_loss(
    model.graphdef, lora, frozen, batch, remat=remat)[0]
  jaxpr = jax.make_jaxpr(jax.grad(loss))(model.lora, model.frozen, batch)
  want = cost.train_flops(CONFIG, lora, ROWS * WIDTH, LOSSES, WIDTH)
  want += cost.recomputed_flops(CONFIG, lora, ROWS * WIDTH, WIDTH, remat)
  # The compiler drops what nobody reads: of what the backward pass computes again, the result.
  live, _ = partial_eval.dce_jaxpr(jaxpr.jaxpr, [True] * len(jaxpr.out_avals))
  # The blocked attention computes its scores again, one of its products in six.
  assert product_flops(live) == pytest.approx(want, rel=0.04)


def test_forward_flops_are_those_of_the_products():
  model = decoder.abstract(CONFIG, unrolled=True)
  cache = jax.eval_shape(lambda: KVCache.init(CONFIG, ROWS, WIDTH))
  row = jax.ShapeDtypeStruct((ROWS,), jnp.int32)

  def step(lora, frozen, tokens, cache, lengths):
    hidden, _ = incremental.forward_step(
      model.graphdef, lora, frozen, tokens, cache, cache, lengths, jnp.int32(0))
    return decoder.logits(model.graphdef, frozen, hidden)

  jaxpr = jax.make_jaxpr(step)(model.lora, model.frozen, row, cache, row)
  # Prefix and tail are as long as the cache here.
  want = cost.forward_flops(CONFIG, ROWS, ROWS, 2 * WIDTH)
  assert product_flops(jaxpr.jaxpr) == pytest.approx(want, rel=0.02)


def test_a_roofline_is_bound_by_its_slowest_resource():
  chip = chips.CHIPS['v5e']
  times = cost.roofline(chip, 197e12, 2 * 8.19e11, ici=0.5, dcn=3.125e9)
  assert (times.compute, times.hbm, times.ici, times.dcn) == (1.0, 2.0, 0.5, 1.0)
  assert (times.overlapped, times.serial, times.bound) == (2.0, 4.5, 'hbm')
  assert chip.ici_bandwidth(2) * 2 == chip.ici_bandwidth(16)


def test_qwen25_7b_counts_what_its_size_says():
  # Six FLOPs a parameter and token where all are trained, four where all are frozen.
  config = registry.get_config('qwen25_7b')
  blocks = sum(a * b for a, b in cost.projections(config).values()) * config.num_layers
  assert cost.train_flops(config, None, 1, 0, 0) == 4 * blocks
  assert registry.count_params(config) == pytest.approx(
    blocks + 2 * config.vocab_size * config.embed_dim, rel=1e-3)

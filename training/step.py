"""The train step: loss and gradient of what is trained, one optimizer update, one compiled program.

What is trained is an adapter, or all parameters where the config says `frozen=False`.

Axes: A micro-batches, B rows, T tokens, G shards, M loss tokens of a shard, D embedding.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from models import decoder, platform, sharding
from models.layers import to_bits
from training import losses


class TrainState(NamedTuple):
  """All that changes in training: `Model.lora`, the optimizer's state, steps done (int32 [])."""

  lora: nnx.State
  opt_state: Any
  step: jax.Array


def batch_loss(
  graphdef: nnx.GraphDef,
  lora: nnx.State,
  frozen: nnx.State,
  batch: dict[str, jax.Array],
  *,
  dropout_rng: jax.Array | None = None,
  label_smoothing: float = 0.0,
  remat: str = 'none',
  attention_path: str = 'auto',
  vocab_tile: int | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Summed loss and hits of one micro-batch, as `packing.Batches` gives it without the A axis.

  Returns:
    (loss, correct): float32 scalars, sums over the loss tokens.
  """
  config = decoder.config_of(graphdef)
  hidden = decoder.forward(
    graphdef,
    lora,
    frozen,
    batch['tokens'],
    batch['positions'],
    segment_ids=batch['segment_ids'],
    dropout_rng=dropout_rng,
    remat=remat,
    attention_path=attention_path,
  )
  index = batch['loss_index']
  hidden = hidden.reshape(index.shape[0], -1, hidden.shape[-1])
  hidden = jnp.take_along_axis(hidden, index[..., None], axis=1)
  inputs = (batch['loss_target'], batch['loss_weight'])
  options = {'dtype': config.dtype, 'label_smoothing': label_smoothing}
  if not config.frozen:
    kernel = decoder.output_kernel(lora, config)
    return losses.trained_head_cross_entropy(hidden, kernel, *inputs, **options)
  kernel = decoder.output_kernel(frozen, config)
  return losses.frozen_head_cross_entropy(
    hidden, kernel, *inputs, **options, vocab_tile=vocab_tile
  )


def state_shardings(
  model: decoder.Model, optimizer: optax.GradientTransformation, mesh
) -> tuple[TrainState, TrainState]:
  """Shapes of the state and their shardings (the same structure); `model` may be abstract."""
  lora_shardings = sharding.state_shardings(model.lora, mesh)
  everywhere = NamedSharding(mesh, PartitionSpec())
  abstract = jax.eval_shape(optimizer.init, model.lora)
  opt_shardings = optax.tree.map_params(
    optimizer,
    lambda leaf, place: leaf if isinstance(leaf, optax.MaskedNode) else place,
    abstract,
    lora_shardings,
    transform_non_params=lambda _: everywhere,
    is_leaf=lambda node: isinstance(node, optax.MaskedNode),
  )
  step = jax.ShapeDtypeStruct((), jnp.int32)
  return (
    TrainState(model.lora, abstract, step), TrainState(lora_shardings, opt_shardings, everywhere))


def init_state(
  model: decoder.Model, optimizer: optax.GradientTransformation, mesh
) -> tuple[TrainState, TrainState]:
  """The state before the first step, and its shardings (the same structure)."""
  _, shardings = state_shardings(model, optimizer, mesh)
  opt_state = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(model.lora)
  step = jax.device_put(jnp.int32(0), shardings.step)
  return TrainState(model.lora, opt_state, step), shardings


def as_read(frozen: nnx.State) -> nnx.State:
  """The frozen state as a train step reads it fastest: on CPU as bits, or each step makes them."""
  if platform.name() != 'cpu':
    return frozen
  # Alone, array by array: what is not bfloat16 would be copied.
  make = jax.jit(to_bits)
  return jax.tree.map(lambda x: make(x) if x.dtype == jnp.bfloat16 else x, frozen)


def batch_shardings(mesh) -> NamedSharding:
  """Of every array of a batch: [A, rows or shards, ...] over the mesh's batch axes."""
  return NamedSharding(mesh, PartitionSpec(None, sharding.RULES['batch']))


def batch_shapes(batch: dict[str, Any], mesh) -> dict[str, jax.ShapeDtypeStruct]:
  """What the step is compiled for: the batch's shapes and dtypes, and where it will lie."""
  place = batch_shardings(mesh)
  return {
    name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for name, x in batch.items()}


def make_train_step(
  model: decoder.Model,
  optimizer: optax.GradientTransformation,
  schedule: optax.Schedule,
  shardings: TrainState,
  mesh,
  *,
  seed: int,
  label_smoothing: float = 0.0,
  remat: str = 'none',
  attention_path: str = 'auto',
):
  """Compiles-to-be `train_step(state, frozen, batch) -> (state, metrics)`; `state` is donated.

  `frozen` is the model's, best as `as_read` gives it.

  The loss is the mean over the loss tokens of all micro-batches. Dropout depends on (seed, step,
  micro-batch) only, so a resumed run draws what an uninterrupted one does. The state's shardings
  are pinned on the way out: otherwise XLA's own choice makes the second call compile again.

  Metrics: float32 scalars 'loss', 'accuracy', 'grad_norm', 'learning_rate', 'loss_tokens'.
  """
  graphdef, config = model.graphdef, model.config
  use_dropout = model.lora_config is not None and model.lora_config.dropout > 0
  vocab_tile = losses.default_vocab_tile(config.vocab_size, mesh.size)

  def train_step(state: TrainState, frozen: nnx.State, batch: dict[str, jax.Array]):
    step_rng = jax.random.fold_in(jax.random.key(seed), state.step)
    num_tokens = jnp.maximum(batch['loss_weight'].sum(), 1.0)

    def micro_loss(lora, micro, index):
      loss, correct = batch_loss(
        graphdef,
        lora,
        frozen,
        micro,
        dropout_rng=jax.random.fold_in(step_rng, index) if use_dropout else None,
        label_smoothing=label_smoothing,
        remat=remat,
        attention_path=attention_path,
        vocab_tile=vocab_tile,
      )
      return loss / num_tokens, correct / num_tokens

    gradient = jax.value_and_grad(micro_loss, has_aux=True)

    def accumulate(carry, inputs):
      return jax.tree.map(jnp.add, carry, gradient(state.lora, *inputs)), None

    accum = batch['tokens'].shape[0]
    first = gradient(state.lora, jax.tree.map(lambda x: x[0], batch), 0)
    if accum == 1:
      (loss, accuracy), grads = first
    else:
      rest = jax.tree.map(lambda x: x[1:], batch)
      ((loss, accuracy), grads), _ = jax.lax.scan(accumulate, first, (rest, jnp.arange(1, accum)))
    updates, opt_state = optimizer.update(grads, state.opt_state, state.lora)
    metrics = {
      'loss': loss,
      'accuracy': accuracy,
      'grad_norm': optax.tree.norm(grads),
      'learning_rate': jnp.float32(schedule(state.step)),
      'loss_tokens': batch['loss_weight'].sum(),
    }
    lora = optax.apply_updates(state.lora, updates)
    return TrainState(lora, opt_state, state.step + 1), metrics

  everywhere = NamedSharding(mesh, PartitionSpec())
  return jax.jit(
    train_step, donate_argnums=0, out_shardings=(shardings, everywhere),
    compiler_options=platform.compiler_options())

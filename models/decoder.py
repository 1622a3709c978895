"""A causal decoder of several families: NNX definitions, pure functions to compute.

The blocks are stacked by `nnx.vmap` and run by `jax.lax.scan`. A model is split once into its graph
definition, the adapter's state and the frozen state; everything below is a pure function of these
three, for `jax.jit` and `jax.grad` (with respect to the adapter's state only).

Axes: B batch, T tokens, L layers, D embedding, N query heads, K key-value heads, H head width,
F feed-forward width, V vocabulary, R adapter rank.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from data.errors import UserError
from models import quantise, rope, sharding
from models.attention import attention
from models.families import DecoderConfig
from models.layers import (
  Linear,
  RMSNorm,
  from_bits,
  gated,
  matmul,
  matmul_native,
  matmul_transposed,
  project,
  recomputed,
  to_bits,
)
from models.lora import LoraConfig, dropout

# What the backward pass computes again, from nothing to all of a block.
REMAT = ('none', 'mlp', 'full')


class Attention(nnx.Module):
  def __init__(
    self, config: DecoderConfig, lora: LoraConfig | None, rngs: nnx.Rngs, transposed: bool
  ):
    self.config = config
    width = config.num_heads * config.head_dim
    kv_width = config.num_kv_heads * config.head_dim

    def linear(name, in_dim, out_dim, axes, bias):
      own = lora if lora is not None and name in lora.targets else None
      return Linear(
        in_dim, out_dim, axes, config=config, lora=own, bias=bias,
        quantization=config.base_quantization, transposed=transposed, rngs=rngs)  # fmt: skip

    bias = config.qkv_bias
    self.q = linear('q', config.embed_dim, width, ('embed', 'heads'), bias)
    self.k = linear('k', config.embed_dim, kv_width, ('embed', 'kv_heads'), bias)
    self.v = linear('v', config.embed_dim, kv_width, ('embed', 'kv_heads'), bias)
    self.o = linear('o', width, config.embed_dim, ('heads', 'embed'), False)
    if config.qk_norm:
      self.q_norm = RMSNorm(config.head_dim, config, 'head_dim')
      self.k_norm = RMSNorm(config.head_dim, config, 'head_dim')

  def project(self, x, adapter_x, rotary, gates=None):
    """x [B, T, D] -> q [B, T, N, H] and k [B, T, K, H], rotated, and v [B, T, K, H].

    Attention divides the scores by the square root of H; what else a family scales them by is done
    to the queries.
    """
    return self.heads(project((self.q, self.k, self.v), x, adapter_x, gates), rotary)

  def heads(self, projected, rotary):
    """What `project` does behind the products [B, T, ...]; without `rotary` nothing is rotated."""
    config = self.config
    q, k, v = (y.reshape(*y.shape[:-1], -1, config.head_dim) for y in projected)
    if config.qk_norm:
      q, k = self.q_norm(q), self.k_norm(k)
    if rotary is not None:
      q, k = rotary.rotate(q), rotary.rotate(k)
      if rotary.query_scale is not None:
        q *= rotary.query_scale
    if config.query_pre_attn_scalar not in (0, config.head_dim):
      q *= (config.head_dim / config.query_pre_attn_scalar) ** 0.5
    return q, k, v


class Mlp(nnx.Module):
  def __init__(
    self, config: DecoderConfig, lora: LoraConfig | None, rngs: nnx.Rngs, transposed: bool
  ):
    def linear(name, in_dim, out_dim, axes):
      own = lora if lora is not None and name in lora.targets else None
      return Linear(
        in_dim, out_dim, axes, config=config, lora=own, quantization=config.base_quantization,
        transposed=transposed, rngs=rngs)  # fmt: skip

    self.gate = linear('gate', config.embed_dim, config.mlp_dim, ('embed', 'mlp'))
    self.up = linear('up', config.embed_dim, config.mlp_dim, ('embed', 'mlp'))
    self.down = linear('down', config.mlp_dim, config.embed_dim, ('mlp', 'embed'))


class Block(nnx.Module):
  """Pre-norm attention and gated feed-forward, each added to the residual stream.

  Some families norm what is added once more.
  """

  def __init__(
    self, config: DecoderConfig, lora: LoraConfig | None, rngs: nnx.Rngs, transposed: bool = False
  ):
    self.lora = lora
    self.attn_norm = RMSNorm(config.embed_dim, config)
    self.attn = Attention(config, lora, rngs, transposed)
    self.mlp_norm = RMSNorm(config.embed_dim, config)
    self.mlp = Mlp(config, lora, rngs, transposed)
    if config.post_norms:
      self.attn_post_norm = RMSNorm(config.embed_dim, config)
      self.mlp_post_norm = RMSNorm(config.embed_dim, config)
    self.activation, self.post_norms = config.activation, config.post_norms
    self.fused = transposed and lora is None

  def __call__(
    self, x, rotary, attend, dropout_key=None, *, remat_mlp=False, gates=None, counts=None
  ):
    """x [B, T, D] -> [B, T, D]; `attend(q, k, v) -> [B, T, N, H]` owns masks and cache.

    `gates` [B, 1, R] are those of `layers.project`. What `counts` [B, T] leaves out may be
    anything finite: it is masked by a weight of zero.
    """
    if self.fused:
      return self._fused(x, rotary, attend, counts)

    def drop(x, index, dropout_key=dropout_key):
      if dropout_key is None or self.lora is None or not self.lora.dropout:
        return None
      # One mask for each input, shared by the projections that read it (q, k, v; gate, up).
      return dropout(x, self.lora.dropout, jax.random.fold_in(dropout_key, index))

    y = self.attn_norm(x)
    y = attend(*self.attn.project(y, drop(y, 0), rotary, gates))
    y = y.reshape(*y.shape[:-2], -1)
    y = self.attn.o(y, drop(y, 1), gates)
    x = x + (self.attn_post_norm(y) if self.post_norms else y)

    down_def, weights = nnx.split(self.mlp.down)

    def down(gated_inputs, rest):
      weights, dropout_key, gates = rest
      y = gated(*gated_inputs, self.activation)
      return nnx.merge(down_def, weights)(y, drop(y, 3, dropout_key), gates)

    def feed_forward(x):
      y = self.mlp_norm(x)
      adapter_y = drop(y, 2)
      gated_inputs = project((self.mlp.gate, self.mlp.up), y, adapter_y, gates)
      y = recomputed(down, self.mlp.down.dtype, gated_inputs, (weights, dropout_key, gates))
      return self.mlp_post_norm(y) if self.post_norms else y

    if remat_mlp:
      feed_forward = jax.checkpoint(feed_forward, prevent_cse=False)
    return x + feed_forward(x)

  def _fused(self, x, rotary, attend, counts):
    """The same in four products, which do what comes before and after them (`models.native`)."""
    attn, mlp = self.attn, self.mlp

    def products(x, *linears, **options):
      kernels = [linear.kernel.get_value() for linear in linears]
      return matmul_native(x, kernels, counts=counts, **options)

    def add(x, linear, y, norm):
      if self.post_norms:
        return x + norm(products(y, linear)[0])
      return products(y, linear, residual=x)[0]

    linears = attn.q, attn.k, attn.v
    projected = products(x, *linears, norm=self.attn_norm.factors)
    projected = [linear.biased(y) for linear, y in zip(linears, projected, strict=True)]
    y = attend(*attn.heads(projected, rotary))
    x = add(x, attn.o, y.reshape(*y.shape[:-2], -1), self.post_norms and self.attn_post_norm)
    y, = products(
      x, mlp.gate, mlp.up, norm=self.mlp_norm.factors, activation=self.activation)
    return add(x, mlp.down, y, self.post_norms and self.mlp_post_norm)


class Embed(nnx.Module):
  def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
    shape = (config.vocab_size, config.embed_dim)
    table = jax.random.normal(rngs.params(), shape, jnp.float32) * 0.02
    self.embedding = nnx.Param(table.astype(config.weight_dtype), out_sharding=('vocab', 'embed'))


class Decoder(nnx.Module):
  """All parameters; `blocks` is one stacked block, or a list of them when `unrolled`.

  With `native` kernels lie transposed, for the CPU's own products (`models.native`).
  """

  def __init__(
    self,
    config: DecoderConfig,
    lora: LoraConfig | None,
    *,
    rngs: nnx.Rngs,
    unrolled: bool = False,
    native: bool = False,
  ):
    self.config, self.native = config, native
    self.embed = Embed(config, rngs)
    if unrolled:
      self.blocks = nnx.List(
        [Block(config, lora, rngs, native) for _ in range(config.num_layers)])
    else:
      stack = nnx.vmap(
        lambda rngs: Block(config, lora, rngs), transform_metadata={nnx.PARTITION_NAME: 'layers'}
      )
      self.blocks = nnx.split_rngs(splits=config.num_layers)(stack)(rngs)
    self.final_norm = RMSNorm(config.embed_dim, config)
    if not config.tie_embeddings:
      axes, width = ('embed', 'vocab'), (config.embed_dim, config.vocab_size)
      self.head = Linear(
        *width, axes, config=config, lora=None, transposed=native, rngs=rngs)


@dataclasses.dataclass(frozen=True)
class Model:
  """A decoder split for pure functions.

  Attributes:
    lora_config: None without an adapter.
    graphdef: static and hashable, for `static_argnums` or a closure.
    lora: what is trained: state of `nnx.LoRAParam`, empty without an adapter; of all parameters
      where `config.frozen` is False.
    frozen: state of all other parameters.
  """

  config: DecoderConfig
  lora_config: LoraConfig | None
  graphdef: nnx.GraphDef
  lora: nnx.State
  frozen: nnx.State


def _split(config: DecoderConfig, lora: LoraConfig | None, key: jax.Array, **layout: bool):
  with nnx.use_eager_sharding(False):
    decoder = Decoder(config, lora, rngs=nnx.Rngs(params=key), **layout)
    return nnx.split(decoder, nnx.LoRAParam if config.frozen else nnx.Param, ...)


def abstract(
  config: DecoderConfig,
  lora: LoraConfig | None = None,
  *,
  unrolled: bool = False,
  native: bool = False,
) -> Model:
  """The model's structure with `jax.ShapeDtypeStruct` leaves; allocates nothing.

  `unrolled` and `native` are as `Decoder` takes them.
  """
  graphdefs = []

  def states(key):
    graphdef, *states = _split(config, lora, key, unrolled=unrolled, native=native)
    graphdefs.append(graphdef)
    return states

  states = jax.eval_shape(states, jax.random.key(0))
  return Model(config, lora, graphdefs[0], *states)


def create(
  config: DecoderConfig, lora: LoraConfig | None = None, *, seed: int = 0, mesh=None
) -> Model:
  """Random weights, drawn into their shards."""
  model = abstract(config, lora)
  shardings = None
  if mesh is not None:
    shardings = tuple(sharding.state_shardings(s, mesh) for s in (model.lora, model.frozen))
  init = jax.jit(lambda key: _split(config, lora, key)[1:], out_shardings=shardings)
  return Model(config, lora, model.graphdef, *init(jax.random.key(seed)))


def from_params(
  config: DecoderConfig,
  params: Mapping[str, Any],
  lora: LoraConfig | None = None,
  *,
  seed: int = 0,
  mesh=None,
) -> Model:
  """A model from flat arrays.

  Args:
    config: the architecture.
    params: flat name -> whatever `sharding.put` takes, all frozen parameters and, optionally, all
      of the adapter's. Device arrays of frozen ones are used as they are.
    lora: the adapter's shape; drawn with `seed` where `params` has none (B = 0: no effect yet).
    seed: of the adapter's init.
    mesh: where to put the arrays; None is the default device.

  Raises:
    UserError: a name is missing or unknown, or a shape differs.
  """
  model = abstract(config, lora)
  if config.base_quantization != 'none':
    params = quantise.params_quantised(params, config.base_quantization)
  wanted = dict(_flat(model.lora)) | dict(_flat(model.frozen))
  lora_names = {name for name, _ in _flat(model.lora)}
  given_lora = lora_names & set(params)
  missing = set(wanted) - set(params) - (set() if given_lora else lora_names)
  unknown = set(params) - set(wanted)
  for names, word in ((missing, 'missing from'), (unknown, 'unknown in')):
    if names:
      first = ', '.join(sorted(names)[:3])
      raise UserError(f'{len(names)} parameters are {word} the weights of {config.name}: {first}.')

  def fill(state, trained=False):
    def one(name, variable):
      want, value = variable.get_value(), params[name]
      if trained:
        # A train step takes its arrays; the caller's are not to be taken.
        value = np.array(value)
      if tuple(value.shape) != want.shape:
        raise UserError(f'{name} has shape {value.shape}; {config.name} needs {want.shape}.')
      place = None
      if mesh is not None:
        axes = variable.get_metadata()['out_sharding']
        place = jax.sharding.NamedSharding(mesh, sharding.spec(axes, want.shape, mesh))
      return variable.replace(sharding.put(value, place, want.dtype))

    return map_params(one, state)

  if lora is None or given_lora:
    lora_state = fill(model.lora, trained=True)
  else:
    shardings = None if mesh is None else sharding.state_shardings(model.lora, mesh)
    init = jax.jit(lambda key: _split(config, lora, key)[1], out_shardings=shardings)
    lora_state = init(jax.random.key(seed))
  return Model(config, lora, model.graphdef, lora_state, fill(model.frozen))


def _flat(state: nnx.State):
  return [('.'.join(map(str, path)), leaf) for path, leaf in nnx.to_flat_state(state)]


def map_params(
  function: Callable[[str, nnx.Variable], nnx.Variable], state: nnx.State
) -> nnx.State:
  """The state with every variable replaced by function(flat name, variable)."""
  flat = nnx.to_flat_state(state)
  return nnx.from_flat_state(
    [(path, function('.'.join(map(str, path)), leaf)) for path, leaf in flat])


def to_params(state: nnx.State) -> dict[str, jax.Array]:
  """Flat name -> array of an adapter's or a frozen state."""
  return {name: variable.get_value() for name, variable in _flat(state)}


def merge_lora(model: Model) -> Model:
  """Folds the adapter into the kernels: W + A B alpha / R, in float32, kept in W's dtype.

  Of a quantised base W is what its codes stand for, and the result is not quantised.
  """
  config = dataclasses.replace(model.config, base_quantization='none')
  if model.lora_config is None and config == model.config:
    return model
  params, adapter = to_params(model.frozen), to_params(model.lora)
  if config != model.config:
    params = quantise.params_dequantised(
      params, model.config.base_quantization, config.weight_dtype)

  @jax.jit
  def fold(kernel, a, b):
    delta = jnp.einsum('lir,lro->lio', a, b, precision='highest') * model.lora_config.scale
    return (kernel.astype(jnp.float32) + delta).astype(kernel.dtype)

  for name in [n for n in adapter if n.endswith('.lora_a')]:
    base = name.removesuffix('.lora_a')
    params[f'{base}.kernel'] = fold(
      params[f'{base}.kernel'], adapter[name], adapter[f'{base}.lora_b']
    )
  plain = abstract(config)
  frozen = map_params(lambda name, variable: variable.replace(params[name]), plain.frozen)
  return Model(config, None, plain.graphdef, plain.lora, frozen)


def embed(model: Decoder, tokens: jax.Array) -> jax.Array:
  """int32 [B, T] -> float32 [B, T, D], what enters the first block."""
  table, config = model.embed.embedding.get_value(), model.config
  x = from_bits(to_bits(table)[tokens]).astype(jnp.float32)
  if config.scale_embeddings:
    # Rounded to the dtype of the weights, as the models were trained.
    x *= jnp.sqrt(jnp.float32(config.embed_dim)).astype(config.weight_dtype).astype(jnp.float32)
  return sharding.constrain(x, ('batch', None, None))


def rotary_tables(config: DecoderConfig, positions: jax.Array) -> dict[int, rope.Rotary]:
  """For positions int32 [B, T] the tables of the layers with each sliding window (0 is none)."""
  whole = rope.tables(positions, config.head_dim, config.rope_theta, config.rope_scaling)
  local = whole
  if config.sliding_window and config.local_rope_theta:
    local = rope.tables(positions, config.head_dim, config.local_rope_theta, None)
  return {config.sliding_window: local, 0: whole}


def forward(
  graphdef: nnx.GraphDef,
  lora: nnx.State,
  frozen: nnx.State,
  tokens: jax.Array,
  positions: jax.Array,
  *,
  segment_ids: jax.Array | None = None,
  dropout_rng: jax.Array | None = None,
  remat: str = 'none',
  attention_path: str = 'auto',
) -> jax.Array:
  """Hidden states of whole rows.

  Args:
    graphdef: static, from a `Model`.
    lora: the adapter's state.
    frozen: the other parameters.
    tokens: int32 [B, T].
    positions: int32 [B, T], of each token within its own segment.
    segment_ids: int32 [B, T], 0 is padding; tokens see only their own segment. None: one segment.
    dropout_rng: key for the adapter's dropout; None turns it off.
    remat: what the backward pass computes again instead of keeping it: 'none'; 'mlp', all inside
      the feed-forward; 'full', all inside a block but its input.
    attention_path: as `attention.attention` takes it.

  Returns:
    float32 [B, T, D], after the final norm.
  """
  if config_of(graphdef).frozen:
    lora = sharding.gather(lora, 'embed')
  model = nnx.merge(graphdef, lora, frozen)
  config, (block_def, blocks) = model.config, nnx.split(model.blocks)
  rotary, windows = rotary_tables(config, positions), config.windows
  window = max(windows)
  # Windowed and global layers take turns: one scan over all, which a flag tells apart.
  local = jnp.array([w > 0 for w in windows]) if len(set(windows)) > 1 else None

  def body(x, layer):
    state, key, is_local = layer

    def attend(q, k, v):
      k, v = k.astype(config.dtype), v.astype(config.dtype)
      return attention(
        q, k, v, segment_ids=segment_ids, window=window, is_local=is_local, path=attention_path)

    own = rotary[window]
    if is_local is not None:
      own = jax.tree.map(functools.partial(jnp.where, is_local), own, rotary[0])
    return nnx.merge(block_def, state)(x, own, attend, key, remat_mlp=remat == 'mlp'), None

  if remat not in REMAT:
    raise UserError(f'remat={remat!r}: choose from {", ".join(REMAT)}.')
  if remat == 'full':
    body = jax.checkpoint(body, prevent_cse=False)
  keys = None if dropout_rng is None else jax.random.split(dropout_rng, config.num_layers)
  x, _ = jax.lax.scan(body, embed(model, tokens), (jax.tree.map(to_bits, blocks), keys, local))
  return model.final_norm(x)


def output_kernel(state: nnx.State, config: DecoderConfig) -> jax.Array:
  """The output head as [V, D]: the tied embedding, or a transposed view of the head's kernel.

  `state` is the one that holds it: the frozen one, or that of all parameters.
  """
  params = to_params(state)
  return params['embed.embedding'] if config.tie_embeddings else params['head.kernel'].T


def logits(
  graphdef: nnx.GraphDef, frozen: nnx.State, hidden: jax.Array, counts: jax.Array | None = None
) -> jax.Array:
  """float32 [..., V] of hidden states [..., D]; for a few rows, never for a training batch.

  What `counts` [...] leaves out may be anything.
  """
  params = to_params(frozen)
  config = config_of(graphdef)
  if is_native(graphdef):
    kernel = params['embed.embedding' if config.tie_embeddings else 'head.kernel']
    return matmul_native(hidden, [kernel], counts=counts)[0]
  if not config.tie_embeddings:
    return matmul(hidden, params['head.kernel'], config.dtype, frozen=True)
  return matmul_transposed(hidden, params['embed.embedding'], config.dtype)


def is_native(graphdef: nnx.GraphDef) -> bool:
  """Whether programs of a model call `models.native`."""
  return _static(graphdef, 'native')


def config_of(graphdef: nnx.GraphDef) -> DecoderConfig:
  """The config that a graph definition was made with."""
  return _static(graphdef, 'config')


def _static(graphdef: nnx.GraphDef, wanted: str) -> Any:
  """A static attribute of the decoder."""
  return next(static.value for name, static in graphdef.attributes if name == wanted)

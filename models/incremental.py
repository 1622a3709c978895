"""Incremental decoding: a decoder's passes over the cache of earlier tokens.

`forward_cached` reads new tokens into the cache (prefill), `forward_step` is one step of a decode
loop. Both are pure functions like those of `models.decoder`, whose definitions they compute with,
and are fastest on what `prepare_for_decode` makes of a model.

Axes: as in `models.decoder`.
"""

import dataclasses
import operator
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx

from models import decoder, kv_cache, native
from models.attention import cached_attention, decode_attention
from models.families import DecoderConfig
from models.kv_cache import KVCache
from models.layers import from_bits, to_bits


def prepare_for_decode(model: decoder.Model) -> decoder.Model:
  """The same model with unstacked blocks, for `forward_cached` and `forward_step` only.

  Inside a loop of decode steps a stacked kernel is sliced, that is copied, at every step; separate
  arrays are read where they lie. SmolLM2-135M in bfloat16 with 32 slots, attend_len 320 of 512, ms
  a step on one core: a scan over stacked weights and cache 99, unrolled over slices 94, prepared
  87, prepared with `forward_step` 74 (float32 products: 126). Each compiles in 2 to 3 s. On one CPU
  the kernels are transposed, too, where its own products (`models.native`) can take them. A model
  that is prepared already is returned as it is, so that several engines can share its arrays.
  """
  leaves = jax.tree.leaves((model.lora, model.frozen))
  native_too = can_be_native(model.config) and all(
    len(leaf.sharding.device_set) == 1 for leaf in leaves)
  unrolled = decoder.abstract(model.config, model.lora_config, unrolled=True, native=native_too)
  if model.graphdef == unrolled.graphdef:
    return model
  params = decoder.to_params(model.lora) | decoder.to_params(model.frozen)
  slices = {}
  for name, value in params.items():
    if name.startswith('blocks.'):
      for layer in range(model.config.num_layers):
        slices[f'blocks.{layer}.{name.removeprefix("blocks.")}'] = value[layer]
    else:
      slices[name] = value
  if native_too:
    for name in [name for name in slices if name.endswith('.kernel')]:
      slices[name] = _transposed(slices[name])
    # Rows of it are read as bits, for which a program would copy it.
    slices['embed.embedding'] = jax.jit(to_bits)(slices['embed.embedding'])
  fill = lambda name, variable: variable.replace(slices[name])
  return dataclasses.replace(
    unrolled, lora=decoder.map_params(fill, unrolled.lora),
    frozen=decoder.map_params(fill, unrolled.frozen))


def can_be_native(config: DecoderConfig) -> bool:
  """Whether `models.native` can take all kernels of such a model, on one CPU."""
  widths = (
    config.embed_dim, config.mlp_dim, config.vocab_size, config.num_kv_heads * config.head_dim,
    config.num_heads * config.head_dim)
  return (
    config.dtype == config.weight_dtype == 'bfloat16'
    and config.base_quantization == 'none'
    and not any(width % native.MULTIPLE for width in widths)
    and native.available())


@jax.jit
def _transposed(kernel: jax.Array) -> jax.Array:
  return from_bits(to_bits(kernel).T)


def forward_cached(
  graphdef: nnx.GraphDef,
  lora: nnx.State,
  frozen: nnx.State,
  tokens: jax.Array,
  cache: KVCache,
  lengths: jax.Array,
  counts: jax.Array,
  *,
  attend_len: int,
  slots: jax.Array | None = None,
  gates: jax.Array | None = None,
) -> tuple[jax.Array, KVCache]:
  """Extends the slots of a cache by new tokens.

  Args:
    graphdef: static, from a `Model`; fastest from `prepare_for_decode`.
    lora: the adapter's state.
    frozen: the other parameters.
    tokens: int32 [B, T], the new tokens of each row, padded at the end.
    cache: the products of attention have its dtype; that of its scales where it is int8.
    lengths: int32 [B], tokens already in each row's slot.
    counts: int32 [B], valid new tokens; a row with 0 leaves its slot as it is.
    attend_len: static; at least max(lengths + counts) over the rows with new tokens.
    slots: int32 [B], the slot of each row; None: row b is slot b, for all slots. A prefill of few
      slots then costs few rows, and a long prompt can be several rows of one slot, each with its
      own `lengths`.
    gates: float32 [B, R], of each row, where the adapter is several (`models.adapters`).

  Returns:
    float32 [B, T, D] after the final norm (tokens beyond `counts` mean nothing), and the cache.
  """
  model = nnx.merge(graphdef, lora, frozen)
  config = model.config
  rotary = decoder.rotary_tables(config, lengths[:, None] + jnp.arange(tokens.shape[1]))
  x, layers = decoder.embed(model, tokens), []
  gates = None if gates is None else gates[:, None]
  in_place = reads_in_place(graphdef, cache)
  there = jnp.arange(tokens.shape[1]) < counts[:, None]
  for block, window, own in zip(_unstacked(model), config.windows, cache.layers, strict=True):

    def attend(q, k, v, own=own, window=window):
      layers.append(kv_cache.extend(own, k, v, lengths, counts, slots))
      if in_place:
        return _attend_in_place(q, k, v, layers[-1], lengths, counts > 0, slots, window)
      k, v, *scales = kv_cache.read(layers[-1], attend_len, slots)
      return cached_attention(q, k, v, lengths, *scales, window=window)

    x = block(x, rotary[window], attend, gates=gates, counts=there)
  return model.final_norm(x), KVCache.of(layers)


def reads_in_place(graphdef: nnx.GraphDef, cache: KVCache) -> bool:
  """Whether attention reads each slot's own tokens where they lie in the cache.

  If so `forward_step` takes a whole cache for its prefix, whatever its slots' lengths are.
  """
  return decoder.is_native(graphdef) and native.reads(cache)


def _attend_in_place(q, k, v, layer, lengths, counts, slots, window):
  """`cached_attention` of new tokens, k and v [B, T, K, H], which the layer holds already."""
  batch, width, heads, head_dim = k.shape
  places = lengths[:, None] + jnp.arange(width)
  empty = lambda *shape: jnp.zeros((batch, heads, *shape), jnp.bfloat16)
  tail = empty(head_dim, width), empty(width, head_dim)
  out, _ = native.cache_attention(
    q, k, v, layer[:2], tail, lengths, jnp.int32(0), places, slots, counts=counts, window=window)
  return out


def forward_step(
  graphdef: nnx.GraphDef,
  lora: nnx.State,
  frozen: nnx.State,
  tokens: jax.Array,
  prefix: KVCache,
  tail: KVCache,
  lengths: jax.Array,
  step: jax.Array,
  places: jax.Array | None = None,
  gates: jax.Array | None = None,
  longer: tuple[KVCache, jax.Array] | None = None,
  counts: jax.Array | None = None,
) -> tuple[jax.Array, KVCache]:
  """One step of a decode loop over all slots, which `KVCache.absorb` ends.

  Args:
    graphdef: static, from `prepare_for_decode`.
    lora: the adapter's state.
    frozen: the other parameters.
    tokens: int32 [B], the newest token of each slot; or [B, T], with what may follow it.
    prefix: of the cache, as it was before the loop; only read. The cache itself, as it is kept,
      where `reads_in_place`.
    tail: the loop's own tokens.
    lengths: int32 [B], tokens in each slot before the loop, at most the prefix's length, and that
      of what follows it.
    step: int32, the first token's column of the tail.
    places: int32 [B, W], the position of each column of the tail, `kv_cache.OUTSIDE` for one that
      does not count; None: they follow the prefix.
    gates: float32 [B, R], of each slot, where the adapter is several (`models.adapters`).
    longer: what follows the prefix in some slots, `KVCache.section`, and these slots, int32 [n],
      each once; None where the prefix is all.
    counts: bool, as `tokens`, those of which the result is wanted; None is all. Where the kernels
      of `models.native` compute, and no adapters side by side, the others take no time.

  Returns:
    float32 [B, D] (or [B, T, D]) after the final norm, and the tail with the tokens' keys and
    values.
  """
  model = nnx.merge(graphdef, lora, frozen)
  if places is None:
    places = lengths[:, None] + jnp.arange(tail.max_len)
  rows = tokens.reshape(tokens.shape[0], -1)
  own = jax.lax.dynamic_slice_in_dim(places, step, rows.shape[1], axis=1)
  rotary = decoder.rotary_tables(model.config, own)
  x, layers, windows = decoder.embed(model, rows), [], model.config.windows
  gates = None if gates is None else gates[:, None]
  sections, slots = [()] * len(windows), None
  if longer is not None:
    sections, slots = longer[0].layers, longer[1]
  read = None  # The slots whose attention is wanted.
  if counts is not None:
    counts = counts.reshape(rows.shape)
    read = counts.any(axis=1)
  layered = zip(_unstacked(model), windows, prefix.layers, tail.layers, sections, strict=True)
  in_place = reads_in_place(graphdef, prefix)
  for block, window, old, new, far in layered:
    tables = rotary[window]
    # Queries and keys are rotated where they are read, if that is all there is to do to them.
    late = tables[:2] if in_place and tables.query_scale is None else None

    def attend(q, k, v, old=old, new=new, far=far, window=window, late=late):
      if in_place:
        out, own = native.cache_attention(
          q, k, v, old[:2], new[:2], lengths, step, places, tables=late, counts=read,
          window=window)
        layers.append(kv_cache.Layer(*own))
        return out
      layers.append(kv_cache.put(new, k, v, step))
      return decode_attention(
        q, old, layers[-1], lengths, step, places, far, slots, window=window)

    x = block(x, tables if late is None else None, attend, gates=gates, counts=counts)
  return model.final_norm(x).reshape(*tokens.shape, -1), KVCache.of(layers)


def _unstacked(model: decoder.Decoder) -> Iterator[decoder.Block]:
  if isinstance(model.blocks, nnx.List):
    yield from model.blocks
    return
  block_def, blocks = nnx.split(model.blocks)
  for layer in range(model.config.num_layers):
    yield nnx.merge(block_def, jax.tree.map(operator.itemgetter(layer), blocks))

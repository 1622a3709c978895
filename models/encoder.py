"""Sentence encoder: BERT with mean pooling (all-MiniLM-L6-v2), for retrieval.

Sentence-BERT (Reimers and Gurevych, arXiv 1908.10084): the mean of the last hidden states over the
text's tokens, L2-normalised. Texts longer than the encoder's window are split, never cut.

Axes: B rows, T tokens, L layers, D embedding, N heads, H head width, F feed-forward width.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import tokenizers
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from data import model_folder
from data.errors import UserError

# Rows are padded to one of these lengths and counts, so that at most 4 x 4 programs are compiled.
LENGTHS = (32, 64, 128, 256)
_FEW_ROWS = (1, 8, 16)  # or the whole batch


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
  """Architecture of a BERT encoder.

  Attributes:
    window: longest input in tokens, [CLS] and [SEP] included.
  """

  vocab_size: int
  embed_dim: int
  num_layers: int
  num_heads: int
  mlp_dim: int
  max_position: int
  type_vocab_size: int
  norm_eps: float
  window: int


class EncoderLayer(nnx.Module):
  """Post-norm self-attention and feed-forward block (Devlin et al., arXiv 1810.04805)."""

  def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
    width = config.embed_dim
    linear = functools.partial(nnx.Linear, precision='highest', rngs=rngs)
    self.num_heads = config.num_heads
    self.q, self.k, self.v, self.o = (linear(width, width) for _ in range(4))
    self.attn_norm = nnx.LayerNorm(width, epsilon=config.norm_eps, rngs=rngs)
    self.up = linear(width, config.mlp_dim)
    self.down = linear(config.mlp_dim, width)
    self.mlp_norm = nnx.LayerNorm(width, epsilon=config.norm_eps, rngs=rngs)

  def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
    """x [B, T, D] and mask bool [B, T] (True is a token) -> [B, T, D]."""
    split = lambda y: y.reshape(*y.shape[:-1], self.num_heads, -1)
    q, k, v = split(self.q(x)), split(self.k(x)), split(self.v(x))
    scores = jnp.einsum('btnh,bsnh->bnts', q, k, precision='highest') * q.shape[-1] ** -0.5
    scores = jnp.where(mask[:, None, None, :], scores, jnp.finfo(jnp.float32).min)
    y = jnp.einsum('bnts,bsnh->btnh', jax.nn.softmax(scores), v, precision='highest')
    x = self.attn_norm(x + self.o(y.reshape(x.shape)))
    return self.mlp_norm(x + self.down(jax.nn.gelu(self.up(x), approximate=False)))


class BertEncoder(nnx.Module):
  """Token ids to hidden states; the layers are stacked for a scan."""

  def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
    embed = functools.partial(nnx.Embed, features=config.embed_dim, rngs=rngs)
    self.words = embed(config.vocab_size)
    self.positions = embed(config.max_position)
    self.types = embed(config.type_vocab_size)
    self.embed_norm = nnx.LayerNorm(config.embed_dim, epsilon=config.norm_eps, rngs=rngs)

    @nnx.split_rngs(splits=config.num_layers)
    @nnx.vmap
    def stacked(rngs):
      return EncoderLayer(config, rngs=rngs)

    self.layers = stacked(rngs)

  def __call__(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """tokens int32 [B, T] and mask bool [B, T] -> float32 [B, T, D]."""
    x = self.words(tokens) + self.positions(jnp.arange(tokens.shape[1])) + self.types(jnp.array(0))
    layer_def, layers = nnx.split(self.layers)

    def body(x, state):
      return nnx.merge(layer_def, state)(x, mask), None

    return jax.lax.scan(body, self.embed_norm(x), layers)[0]


# Flat parameter -> Hugging Face tensor; '{}' is the layer. Kernels are transposed.
_NAMES = {
  'words.embedding': 'embeddings.word_embeddings.weight',
  'positions.embedding': 'embeddings.position_embeddings.weight',
  'types.embedding': 'embeddings.token_type_embeddings.weight',
  'embed_norm.scale': 'embeddings.LayerNorm.weight',
  'embed_norm.bias': 'embeddings.LayerNorm.bias',
}
_MODULES = {
  'q': 'attention.self.query',
  'k': 'attention.self.key',
  'v': 'attention.self.value',
  'o': 'attention.output.dense',
  'attn_norm': 'attention.output.LayerNorm',
  'up': 'intermediate.dense',
  'down': 'output.dense',
  'mlp_norm': 'output.LayerNorm',
}


@functools.partial(jax.jit, static_argnums=0)
def hidden_states(
  graphdef: nnx.GraphDef, state: nnx.State, tokens: jax.Array, mask: jax.Array
) -> jax.Array:
  """Last hidden states, float32 [B, T, D]; see `BertEncoder`."""
  return nnx.merge(graphdef, state)(tokens, mask)


@functools.partial(jax.jit, static_argnums=0)
def _sums(graphdef, state, tokens, mask):
  """Sum of the hidden states over each row's tokens, float32 [B, D]."""
  hidden = nnx.merge(graphdef, state)(tokens, mask)
  return jnp.sum(hidden * mask[..., None], axis=1)


class Encoder:
  """A loaded sentence encoder.

  Attributes:
    config: architecture.
    dim: width of the vectors.
    fingerprint: SHA-256 hex digest of weights and tokenizer; vectors of another are not comparable.
  """

  def __init__(
    self,
    config: EncoderConfig,
    graphdef: nnx.GraphDef,
    state: nnx.State,
    tokenizer: tokenizers.Tokenizer,
    fingerprint: str,
    mesh: jax.sharding.Mesh | None = None,
  ):
    """Use `load_encoder`."""
    self.config, self.graphdef, self.state = config, graphdef, state
    self.dim = config.embed_dim
    self.fingerprint = fingerprint
    self._mesh = mesh
    if mesh is not None:
      # Small weights: whole on every device, the rows of a batch over them.
      whole = NamedSharding(mesh, PartitionSpec())
      self.state = jax.device_put(state, whole)
    self._tokenizer = tokenizer
    self._cls, self._sep = tokenizer.token_to_id('[CLS]'), tokenizer.token_to_id('[SEP]')

  def count_tokens(self, text: str) -> int:
    """Tokens that `encode` reads for this text, [CLS] and [SEP] of every window included."""
    return sum(len(window) for window in self._windows(text))

  def encode(self, texts: Sequence[str], batch: int = 32) -> np.ndarray:
    """Embeds texts.

    A text longer than the window is split into windows of nearly equal length; its vector is the
    mean over the tokens of all of them.

    Args:
      texts: any strings.
      batch: rows a dispatch.

    Returns:
      float32 [len(texts), D], L2-normalised. A text's vector does not depend on the others beyond
      float32 rounding.
    """
    windows = [(i, ids) for i, text in enumerate(texts) for ids in self._windows(text)]
    totals = np.zeros((len(texts), self.dim), np.float32)
    lengths = [length for length in LENGTHS if length < self.config.window] + [self.config.window]
    shorter = 0
    for length in lengths:
      bucket = [(i, ids) for i, ids in windows if shorter < len(ids) <= length]
      shorter = length
      for start in range(0, len(bucket), batch):
        group = bucket[start : start + batch]
        for (i, _), row in zip(group, self._run(group, length, batch), strict=True):
          totals[i] += row
    # The mean's divisor cancels in the normalisation.
    return totals / np.maximum(np.linalg.norm(totals, axis=1, keepdims=True), 1e-12)

  def _windows(self, text: str) -> list[list[int]]:
    ids = self._tokenizer.encode(text, add_special_tokens=False).ids
    count = max(1, -(-len(ids) // (self.config.window - 2)))
    return [[self._cls, *part.tolist(), self._sep] for part in np.array_split(ids, count)]

  def _run(self, group, length: int, batch: int) -> np.ndarray:
    """Sums of hidden states, float32 [len(group), D], from a padded program."""
    rows = next((r for r in _FEW_ROWS if len(group) <= r < batch), batch)
    if self._mesh is not None:
      rows = -(-rows // self._mesh.size) * self._mesh.size
    tokens = np.zeros((rows, length), np.int32)
    mask = np.zeros((rows, length), bool)
    for row, (_, ids) in enumerate(group):
      tokens[row, : len(ids)] = ids
      mask[row, : len(ids)] = True
    if self._mesh is not None:
      split = NamedSharding(self._mesh, PartitionSpec(self._mesh.axis_names))
      tokens, mask = jax.device_put((tokens, mask), split)
    return np.asarray(_sums(self.graphdef, self.state, tokens, mask))[: len(group)]


def load_encoder(
  folder: str | pathlib.Path, *, mesh: jax.sharding.Mesh | None = None
) -> Encoder:
  """Loads a BERT sentence encoder.

  Args:
    folder: a sentence-transformers folder: config.json, model.safetensors, tokenizer.json and,
      optionally, sentence_bert_config.json with the window (256 tokens otherwise).
    mesh: all its devices read a part of every batch; None is the default device.

  Raises:
    UserError: a file or tensor is missing, damaged or of the wrong shape, or it is not BERT.
  """
  folder = pathlib.Path(folder)
  for name in ('config.json', 'model.safetensors', 'tokenizer.json'):
    if not (folder / name).is_file():
      raise UserError(f'{folder / name} is missing; give the folder of a sentence encoder.')
  config = _read_config(folder)
  states = []

  def split(key):
    graphdef, state = nnx.split(BertEncoder(config, rngs=nnx.Rngs(params=key)))
    states.append(graphdef)
    return state

  abstract = jax.eval_shape(split, jax.random.key(0))
  state = _fill(abstract, config, folder)
  tokenizer = _read_tokenizer(folder)
  digest = hashlib.sha256()
  for name in ('model.safetensors', 'tokenizer.json'):
    digest.update((folder / name).read_bytes())
  digest.update(repr(config).encode())
  return Encoder(config, states[0], state, tokenizer, digest.hexdigest(), mesh)


def _read_config(folder: pathlib.Path) -> EncoderConfig:
  raw = model_folder.read_json(folder / 'config.json')
  if raw.get('model_type') != 'bert' or raw.get('hidden_act', 'gelu') != 'gelu':
    raise UserError(
      f'{folder} is a {raw.get("model_type")!r} model with {raw.get("hidden_act")!r}; the sentence '
      'encoder must be BERT with gelu.'
    )
  window = 256
  if (folder / 'sentence_bert_config.json').is_file():
    settings = model_folder.read_json(folder / 'sentence_bert_config.json')
    window = settings.get('max_seq_length') or window
  try:
    return EncoderConfig(
      vocab_size=raw['vocab_size'],
      embed_dim=raw['hidden_size'],
      num_layers=raw['num_hidden_layers'],
      num_heads=raw['num_attention_heads'],
      mlp_dim=raw['intermediate_size'],
      max_position=raw['max_position_embeddings'],
      type_vocab_size=raw['type_vocab_size'],
      norm_eps=raw['layer_norm_eps'],
      window=min(window, raw['max_position_embeddings']),
    )
  except KeyError as error:
    raise UserError(f'{folder}: config.json has no {error.args[0]}; download it again.') from error


def _read_tokenizer(folder: pathlib.Path) -> tokenizers.Tokenizer:
  spec = model_folder.read_json(folder / 'tokenizer.json')
  # The stored file truncates at 128 tokens; and text that spells '[SEP]' must stay text.
  spec |= {'truncation': None, 'padding': None, 'post_processor': None, 'added_tokens': []}
  try:
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(spec))
  except Exception as error:  # `tokenizers` raises bare Exception for any broken specification
    raise UserError(f'{folder / "tokenizer.json"} cannot be used: {error}.') from error
  if tokenizer.token_to_id('[CLS]') is None or tokenizer.token_to_id('[SEP]') is None:
    raise UserError(f'{folder / "tokenizer.json"} has no [CLS] or [SEP]; it is not of a BERT.')
  return tokenizer


def _fill(abstract: nnx.State, config: EncoderConfig, folder: pathlib.Path) -> nnx.State:
  path = folder / 'model.safetensors'
  try:
    file = safetensors.safe_open(path, framework='np')
    available = set(file.keys())
  except safetensors.SafetensorError as error:
    raise UserError(f'{path} is truncated or damaged ({error}); download it again.') from error

  def read(name):
    # Checkpoints saved from a model with a head carry the prefix.
    name = name if name in available else f'bert.{name}'
    if name not in available:
      raise UserError(f'{path} lacks the tensor {name}; download it again.')
    return file.get_tensor(name).astype(np.float32)

  def fill(flat, want):
    if flat in _NAMES:
      array = read(_NAMES[flat])
    else:
      _, module, leaf = flat.split('.')
      suffix = 'bias' if leaf == 'bias' else 'weight'
      stem = f'encoder.layer.{{}}.{_MODULES[module]}.{suffix}'
      array = np.stack([read(stem.format(layer)) for layer in range(config.num_layers)])
      array = array.swapaxes(1, 2) if leaf == 'kernel' else array
    if array.shape != want.shape:
      raise UserError(f'{path}: {flat} has shape {array.shape}, config.json says {want.shape}.')
    return jnp.asarray(array)

  return nnx.from_flat_state([
    (names, variable.replace(fill('.'.join(names), variable.get_value())))
    for names, variable in nnx.to_flat_state(abstract)
  ])

"""Text embeddings by a decoder: Qwen3-Embedding (Zhang et al., arXiv 2506.05176).

A text's vector is the decoder's last hidden state, after the final norm, at an end-of-text token
behind it, L2-normalised. Queries begin with an instruction that says what is looked for.

Axes: B rows, T tokens, D embedding.
"""

import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from data import model_folder
from data.errors import UserError
from data.tokenizer import Tokenizer
from models import decoder, sharding, weights

END = '<|endoftext|>'
INSTRUCTION = 'Given a task and what was seen so far, retrieve earlier attempts at similar tasks'
# Longest input, as the model's authors use it; a longer text is several.
WINDOW = 8192
# A dispatch is at most so many places, or one row a device; rows are padded to the next length.
_SHORTEST, _PLACES, _FEW_ROWS = 32, 8192, 8


@functools.partial(jax.jit, static_argnums=0)
def pooled(
  graphdef: nnx.GraphDef, lora: nnx.State, frozen: nnx.State, tokens: jax.Array, lengths: jax.Array
) -> jax.Array:
  """Unit vectors of rows, float32 [B, D]: the hidden state at each row's last token.

  Args:
    graphdef, lora, frozen: of a `decoder.Model`.
    tokens: int32 [B, T], padded at the end, which no earlier token sees.
    lengths: int32 [B], at least 1.
  """
  positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  hidden = decoder.forward(graphdef, lora, frozen, tokens, positions)
  last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
  return last / jnp.maximum(jnp.linalg.norm(last, axis=1, keepdims=True), 1e-12)


class EmbeddingModel:
  """An encoder as `retrieval.encoders` says.

  Attributes:
    dim: width of the vectors.
    fingerprint: SHA-256 hex digest of weights and tokenizer.
    window: longest input in tokens, the end-of-text token included.
  """

  def __init__(
    self,
    model: decoder.Model,
    tokenizer: Tokenizer,
    fingerprint: str,
    *,
    instruction: str = INSTRUCTION,
    window: int = WINDOW,
    mesh: jax.sharding.Mesh | None = None,
  ):
    """Use `load`.

    Args:
      model: on `mesh`.
      tokenizer: with an END token.
      fingerprint: see above.
      instruction: of queries.
      window: cut down to what the model was trained for.
      mesh: rows are split over its batch axes; None is the default device.

    Raises:
      UserError: no END token, or an instruction that fills the window.
    """
    ids = tokenizer.encode(END, allow_special=True)
    if len(ids) != 1:
      raise UserError(f'The tokenizer has no {END}; give the folder of Qwen3-Embedding.')
    self._end = ids[0]
    self._model, self._tokenizer, self._mesh = model, tokenizer, mesh
    self.dim, self.fingerprint = model.config.embed_dim, fingerprint
    self.window = min(window, model.config.max_position)
    self._prefix = f'Instruct: {instruction}\nQuery:'
    if len(tokenizer.encode(self._prefix)) > self.window // 2:
      raise UserError(
        f'The instruction {instruction!r} takes more than half of the {self.window} tokens of a '
        'window; give a shorter one.')

  def encode(self, texts: Sequence[str]) -> np.ndarray:
    """Embeds what is looked up, in batches.

    A text longer than the window is split into parts of nearly equal length; its vector is the mean
    of theirs, weighted by their tokens, normalised.

    Args:
      texts: any strings.

    Returns:
      float32 [len(texts), D], L2-normalised.
    """
    return self._embed([self._parts(text, '') for text in texts])

  def encode_queries(self, texts: Sequence[str]) -> np.ndarray:
    """Embeds queries: as `encode`, with the instruction in front of every part."""
    return self._embed([self._parts(text, self._prefix) for text in texts])

  def count_tokens(self, text: str) -> int:
    """Tokens that `encode` reads for a text, all parts included."""
    return sum(map(len, self._parts(text, '')))

  def count_query_tokens(self, text: str) -> int:
    """Tokens that `encode_queries` reads for a text."""
    return sum(map(len, self._parts(text, self._prefix)))

  def _parts(self, text: str, prefix: str) -> list[list[int]]:
    """Token ids of what is read for one text."""
    ids = self._tokenizer.encode(prefix + text)
    if len(ids) < self.window:
      return [[*ids, self._end]]
    front, ids = self._tokenizer.encode(prefix), self._tokenizer.encode(text)
    count = -(-len(ids) // (self.window - len(front) - 1))
    return [[*front, *part.tolist(), self._end] for part in np.array_split(ids, count)]

  def _embed(self, texts: list[list[list[int]]]) -> np.ndarray:
    totals = np.zeros((len(texts), self.dim), np.float32)
    waiting = [(i, ids) for i, parts in enumerate(texts) for ids in parts]
    shorter, length = 0, _SHORTEST
    while shorter < self.window:
      length = min(length, self.window)
      bucket = [(i, ids) for i, ids in waiting if shorter < len(ids) <= length]
      batch = self._rows(max(_PLACES // length, 1))
      for start in range(0, len(bucket), batch):
        group = bucket[start : start + batch]
        for (i, ids), vector in zip(group, self._run(group, length, batch), strict=True):
          totals[i] += len(ids) * vector
      shorter, length = length, 2 * length
    return totals / np.maximum(np.linalg.norm(totals, axis=1, keepdims=True), 1e-12)

  def _rows(self, wanted: int) -> int:
    """The next number of rows that divides over the mesh."""
    shards = 1 if self._mesh is None else sharding.batch_shards(self._mesh)
    return -(-wanted // shards) * shards

  def _run(self, group: list[tuple[int, list[int]]], length: int, batch: int) -> np.ndarray:
    """Unit vectors float32 [len(group), D] from one of three padded programs a length."""
    sizes = (self._rows(1), self._rows(_FEW_ROWS), batch)
    rows = min(size for size in sizes if size >= len(group))
    tokens = np.full((rows, length), self._end, np.int32)
    lengths = np.ones(rows, np.int32)
    for row, (_, ids) in enumerate(group):
      tokens[row, : len(ids)], lengths[row] = ids, len(ids)
    model = self._model
    states = (model.graphdef, model.lora, model.frozen)
    if self._mesh is None:
      vectors = pooled(*states, tokens, lengths)
    else:
      place = sharding.batch_sharding(self._mesh)
      with jax.set_mesh(self._mesh):
        vectors = pooled(*states, *jax.device_put((tokens, lengths), place))
    return np.asarray(vectors)[: len(group)]


def load(
  folder: str | pathlib.Path,
  *,
  dtype: str = 'float32',
  mesh: jax.sharding.Mesh | None = None,
  **options,
) -> EmbeddingModel:
  """Loads Qwen3-Embedding, of any size.

  Args:
    folder: its Hugging Face folder.
    dtype: operands of the products, 'float32' or 'bfloat16'.
    mesh: where weights and rows go; None is the default device.
    **options: `instruction` and `window` of `EmbeddingModel`.

  Raises:
    UserError: a file is missing, damaged or of another architecture.
  """
  folder = pathlib.Path(folder)
  kind = model_folder.read_json(folder / 'config.json').get('model_type')
  if kind != 'qwen3':
    raise UserError(f'{folder} is of architecture {kind!r}; a decoder that embeds must be qwen3.')
  config, params = weights.load_pretrained(folder, dtype)
  tokenizer = Tokenizer.load(folder)
  digest = hashlib.sha256(tokenizer.fingerprint.encode())
  for path in sorted(folder.glob('*.safetensors')):
    with path.open('rb') as file:
      digest.update(hashlib.file_digest(file, 'sha256').digest())
  config = dataclasses.replace(config, dtype=dtype)
  model = decoder.from_params(config, params, mesh=mesh)
  return EmbeddingModel(model, tokenizer, digest.hexdigest(), mesh=mesh, **options)

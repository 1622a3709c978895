"""Sentence encoders by name.

An encoder has

  encode(texts) -> float32 [N, D], L2-normalised, whatever the length of the texts;
  encode_queries(texts), where queries are written differently from what they are compared with;
  count_tokens(text): the tokens that it reads for a text; count_query_tokens(text) for a query;
  dim: D;  fingerprint: of its weights, since vectors of another encoder are not comparable.
"""

import functools
from collections.abc import Callable
from typing import Any

from data import errors


def _minilm() -> Any:
  # Imported here: only dense retrieval needs an encoder and its weights.
  import jax

  from models import encoder, pretrained, sharding
  mesh = sharding.make_mesh(data=-1) if jax.device_count() > 1 else None
  return encoder.load_encoder(pretrained.fetch('minilm'), mesh=mesh)


def _qwen3_embedding() -> Any:
  import jax

  from models import pretrained, sharding
  from retrieval import embedding_model
  folder = pretrained.cache_folder() / 'Qwen3-Embedding-0.6B'
  if not folder.is_dir():
    raise errors.UserError(
      f'{folder} does not exist; put the Hugging Face folder Qwen/Qwen3-Embedding-0.6B there.')
  devices = jax.device_count()
  mesh = sharding.make_mesh(data=devices) if devices > 1 else None
  dtype = 'float32' if jax.default_backend() == 'cpu' else 'bfloat16'
  return embedding_model.load(folder, dtype=dtype, mesh=mesh)


ENCODERS: dict[str, Callable[[], Any]] = {'minilm': _minilm, 'qwen3_embedding': _qwen3_embedding}


@functools.cache
def load(name: str) -> Any:
  """Loads the encoder of that name, once a process.

  Raises:
    errors.UserError: there is none, or its weights are not to be had.
  """
  if name not in ENCODERS:
    raise errors.UserError(f'There is no encoder {name!r}; there are {", ".join(ENCODERS)}.')
  return ENCODERS[name]()

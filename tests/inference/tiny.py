"""A decoder of one layer, and an engine with few programs to compile."""

import functools

from inference import Engine
from models import decoder, registry

VOCAB, MAX_LEN = 23, 64
STOP = (0, 1)
SHAPES = dict(
  num_slots=3, max_len=MAX_LEN, decode_steps=3, block_len=8, block_buckets=(4,), attend_step=64)
CONFIG = registry.shrink(
  registry.get_config('smollm2_135m'), vocab_size=VOCAB, num_layers=1, embed_dim=32, head_dim=8,
  mlp_dim=48)


@functools.cache
def model():
  drawn = decoder.create(CONFIG, seed=1)
  # Larger embeddings: the token that was read weighs more, so that the model often repeats itself.
  params = decoder.to_params(drawn.frozen)
  return decoder.from_params(
    CONFIG, params | {'embed.embedding': 5 * params['embed.embedding']})


def engine(**options) -> Engine:
  return Engine(model(), **SHAPES | dict(stop_ids=STOP) | options)


def play(engine, conversations):
  """All turns of conversations, one conversation a slot, turn by turn.

  Args:
    engine: one of `engine`.
    conversations: of each its turns, (tokens, max_new_tokens).

  Returns:
    Of each conversation its completions.
  """
  played = [[] for _ in conversations]
  for turn in range(max(map(len, conversations))):
    for slot, conversation in enumerate(conversations):
      if turn < len(conversation):
        tokens, budget = conversation[turn]
        engine.submit(slot, tokens, budget, reset=not turn, seed=slot)
    for done in engine.run_until_complete():
      played[done.slot].append(done)
  return played

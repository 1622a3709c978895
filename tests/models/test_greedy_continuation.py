"""The engine's greedy continuations of SmolLM2-135M, judged token by token by `transformers`.

Teacher-forced: `transformers` reads our conversation, prompt and continuation, and every sampled
token has to be its own first choice at that place. A difference then counts once and does not make
all that follows differ. Its weights come through its own GGUF reader, so nothing of ours is in it.
"""

import numpy as np
import pytest

from agents import policy
from data.tokenizer import Tokenizer
from inference import Engine

# Two implementations in float32 differ by rounding (1e-4 of a logit, test_weights.py); a token
# whose logit is this close to the best one's is a tie that rounding may break either way.
NEAR_TIE = 1e-3
MIN_EQUAL = 0.995
NEW_TOKENS = 64
SYSTEM = 'You are a household robot. Answer with one action.'

TEXTS = (
  # Prose.
  'The capital of France is',
  'Once upon a time, in a small village by the sea, there lived',
  'Photosynthesis is the process by which',
  # Numbers.
  '1, 1, 2, 3, 5, 8, 13, 21,',
  'Invoice 4711, 2031-05-17: 12 x 3.50 = 42.00; 7 x 1.99 =',
  # Code and markup.
  'def fibonacci(n):\n  """Returns the n-th Fibonacci number."""\n',
  'SELECT name, COUNT(*) FROM orders\nWHERE',
  '<ul>\n  <li>apples</li>\n  <li>',
  # Other languages and scripts.
  'Il était une fois, dans un petit village,',
  'Die Hauptstadt von Österreich heißt',
  '日本の首都は',
  'Москва — это',
  # Unusual spelling: repetitions, emoji, white space.
  'ha ha ha ha ha ha',
  'Weather today: ☀️🌧️\t\tTomorrow:\n\n',
)
# Conversations: the user's turns. Later turns meet a cache that earlier ones left.
CHATS = (
  ('What is gravity?',),
  ('Translate to Spanish: Good morning, my friend.', 'Now to German.'),
  ('Write a haiku about rain.', 'Another one, about snow.', 'Which is better?'),
  (
    'You are in the middle of a room. Looking quickly around you, you see a cabinet 2, a fridge 1, '
    'a microwave 1 and a shelf 1. Your task is to: put a hot mug in shelf.',
    'You arrive at cabinet 2. The cabinet 2 is closed.',
    'You open the cabinet 2. The cabinet 2 is open. In it, you see a mug 1.',
    'Nothing happens.',
  ),
  (
    'You see a loom 1, a kiln 1 and a shelf 1. Your task is to: make a velvet cup.',
    'You pick up the cup 1 from the shelf 1.',
    'The cup 1 is velvet.',
  ),
  ('How many legs do 3 spiders and 2 cats have together? Think step by step.', 'And 4 spiders?'),
)


def conversations(engine: Engine, tokenizer: Tokenizer) -> list[tuple[np.ndarray, np.ndarray]]:
  """Plays every prompt in a slot of its own: (tokens int32 [T], whether sampled [T]) of each."""
  chat = tokenizer.chat
  turns = [[tokenizer.encode(text)] for text in TEXTS]
  for first, *others in CHATS:
    start = [*chat.system_open, *tokenizer.encode(SYSTEM), *chat.system_to_user]
    turns.append([[*start, *tokenizer.encode(first), *chat.user_to_assistant]])
    turns[-1] += [
      [*chat.assistant_to_user, *tokenizer.encode(text), *chat.user_to_assistant]
      for text in others
    ]
  tokens, sampled = [[] for _ in turns], [[] for _ in turns]

  def submit(slot: int) -> None:
    new = turns[slot].pop(0)
    if tokens[slot] and tokens[slot][-1] != chat.end_of_turn:  # ended by its length
      new = [chat.end_of_turn, *new]
    engine.submit(slot, new, NEW_TOKENS, reset=not tokens[slot])
    tokens[slot] += new
    sampled[slot] += [False] * len(new)

  for slot in range(len(turns)):
    submit(slot)
  while engine.busy:
    for done in engine.step():
      tokens[done.slot] += done.tokens.tolist()
      sampled[done.slot] += [True] * len(done.tokens)
      if turns[done.slot]:
        submit(done.slot)
  return [(np.array(t, np.int32), np.array(s)) for t, s in zip(tokens, sampled, strict=True)]


@pytest.mark.slow
def test_greedy_continuations_equal_transformers(smollm2_path, capsys):
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  base = policy.load_base('smollm2_135m', dtype='float32')
  engine = Engine(
    base.model(), num_slots=len(TEXTS) + len(CHATS), max_len=512,
    stop_ids=base.tokenizer.stop_ids,
    # Fewer programs to compile, still two attended lengths.
    block_buckets=(24,), attend_step=256)
  played = conversations(engine, base.tokenizer)
  assert len(played) == 20

  reference = transformers.AutoModelForCausalLM.from_pretrained(
    smollm2_path.parent, gguf_file=smollm2_path.name, dtype=torch.float32).eval()
  gaps, differing = [], []
  for prompt, (tokens, sampled) in enumerate(played):
    with torch.no_grad():
      logits = reference(torch.from_numpy(tokens[None]).long()).logits[0].numpy()
    # The logits at a place choose the token of the next one.
    places = np.flatnonzero(sampled[1:])
    chosen = logits[places, tokens[1:][places]]
    gap = logits[places].max(-1) - chosen
    gaps.append(gap)
    differing += [(prompt, int(place) + 1, float(g)) for place, g in zip(places, gap) if g > 0]
  gaps = np.concatenate(gaps)
  equal = float((gaps == 0).mean())
  with capsys.disabled():
    print(f'\n{len(gaps)} sampled tokens, {equal:.2%} the first choice of transformers; others '
          f'(prompt, place, logit below the best): {differing}')
  assert len(gaps) >= 1000
  assert equal >= MIN_EQUAL
  assert gaps.max() < NEAR_TIE, differing

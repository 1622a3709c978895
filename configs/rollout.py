"""Plays episodes: data collection and evaluation are the same program.

  python rollout.py --config=configs/rollout.py:model=smollm2_135m,env=household,agent=react \
    --workdir=runs/base --config.data=generated --config.split=valid_seen --config.episodes=50

Writes to the workdir: config.json, journal.jsonl (an episode is safe the moment it ends), episodes/
(TFDS, RLDS form) and summary.json. The same command again goes on where the run was stopped. With
`agent=expert` the scripted expert plays, through the same schema. With `adapters` several policies
play the same tasks over one copy of the base; the summary has each one's row, and its paired
difference from the first.
"""

from collections.abc import Mapping
from typing import Any

import ml_collections

from configs import common

DEFAULTS = dict(
  # The policy.
  model='smollm2_135m',  # a name of models/registry.py, or the path of weights
  base='',  # weights: '' published, 'random', or a path
  adapter='',  # PEFT folder, the adapter/ of a training run; '' is none
  adapters='',  # NAME:FOLDER;NAME:FOLDER play the same tasks side by side; NAME: is the base
  tokenizer='',  # path; '' is that of the weights
  shrink=False,  # a tiny random model of the same family, for dry runs (needs base=random)
  policy='',  # name in the record; '' is 'expert', 'adapter' or 'base'
  dtype='auto',  # operands of the products: bfloat16, float32; auto: the faster here
  base_quantization='none',  # as the adapter was trained: none, int8, int4, nf4
  # The tasks.
  env='household',
  data='generated',  # 'generated', or the folder of the real games
  split='valid_seen',  # train, valid_seen, valid_unseen
  episodes=0,  # the first N tasks of the split; 0 is all of them
  skip=0,  # tasks of the split that are left out before them
  task_types='',  # comma list; '' is all; scienceworld: also easy, hard
  skills='official',  # household: the rules of the houses: official, warm, loop, hard, easy
  env_seed=0,  # of generated rules and houses
  env_options='',  # further options of the suite: key:value;key:low-high
  env_workers=-1,  # processes that run the environments; 0 is this one, -1 as the suite needs
  env_timeout=120.0,  # seconds in which an environment in a worker has to answer
  # The agent.
  agent='react',  # plain, react, stateact, expert
  expert_format='react',  # the format in which agent=expert writes its replies
  expert_knows_rules=False,  # whether it is told the rules of the house, or has to find them
  expert_error_rate=0.0,  # errors on purpose per decision, for banks that need failures
  expert_thoughts=True,  # whether its replies (and few-shot examples) state its reasons
  layout='default',  # default, paper_a, paper_b
  prompt='short',  # short, full
  few_shots=0,  # solved tasks of the own type from the training split
  # Memory.
  memory='none',  # none, hints, experience, hints+experience
  bank='',  # the JSON of python -m retrieval.hints
  k=3,
  retrieval='minilm',  # minilm, bm25, fixed, random
  leave_one_out=True,  # of hints; experiences of the own task are always left out
  # Experiences (arXiv 2603.18272).
  experiences='',  # the folder of python -m retrieval.experience
  experience_k=2,
  experience_retrieval='minilm',  # an encoder of retrieval/encoders.py, bm25, random
  query='static',  # static, once by the task; dynamic, at every step by the history
  experience_format='chat',  # chat, flat, summary
  outcomes='all',  # all, success, failure
  same_type=False,  # only of the own task type
  diversity=0.0,  # weight of maximal marginal relevance, 0..1
  block_order='best_first',  # best_first, best_last
  memory_tokens=0,  # budget of the experiences; the least similar is left out whole; 0 is none
  exact_below=20_000,  # experiences from which the index is approximate
  leaves_searched=0.2,  # share of its tree that a query visits
  grow=0,  # episodes after which those played join the bank; 0 never
  # The engine and the limits of an episode.
  slots=8,
  slot_groups=1,  # 2: environments of one half step while the device decodes the other
  max_context=2048,
  max_new_tokens=0,  # sampled tokens a call; 0 is the format's own: 32, 64, 192
  decode_steps=8,
  mesh='',  # sizes data,fsdp,tensor: slots over data, heads over tensor; '' is one device
  cache_dtype='',  # of keys and values: float32, bfloat16, int8; '' is dtype
  lookup=0,  # most tokens of a draft that is copied from the context and verified in one step
  share_prefixes=True,  # what prompts begin with alike is computed once
  constrained=False,  # replies only of admissible commands (or thoughts); agent=plain or react
  max_env_steps=0,  # 0 is the environment's own: household 50, webshop 15, scienceworld by task
  max_calls=0,  # model calls; 0 is 100, or two for each environment step
  max_repeats=0,  # of a reply with the same answer; 0 is the environment's own, 4 for most
  temperature=0.0,
  seed=0,
)

HELP_KEYS = (
  'model', 'base', 'adapter', 'data', 'split', 'episodes', 'skills', 'agent', 'memory', 'bank')


def make(values: Mapping[str, Any]) -> ml_collections.ConfigDict:
  """A locked config of these values over the defaults."""
  return common.with_values(DEFAULTS, values)


def get_config(arg=None):
  return common.make_config(arg, DEFAULTS)

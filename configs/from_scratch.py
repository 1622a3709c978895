"""Trains a small decoder from random weights: a model for experiments that CPUs have to carry.

  python -m experiments.from_scratch --config=configs/from_scratch.py --workdir=runs/scratch

Makes runs/scratch/small_decoder, a Hugging Face folder with its own tokenizer, from expert episodes
of generated houses. The same command again goes on where a stopped run was. `setting` is a set of
defaults that everything else overrides, and what `decoder` names in the configs of experiments:

  household      generated houses.
  webshop        a generated shop, of the same kinds of products as the experiment's.
  scienceworld   gold paths of its short easy tasks.
"""

from configs import common, hint_distillation
from data import errors

# The lessons are played as the loop plays: its houses, prompts, limits and hint blocks.
_OF_THE_LOOP = (
  'env', 'data', 'task_types', 'env_options', 'agent', 'layout', 'prompt', 'few_shots',
  'max_env_steps', 'max_calls', 'max_new_tokens', 'max_context', 'k', 'warm_hint_share',
  'warm_rule_share')

DEFAULTS = dict(
  setting='household',  # household, webshop, scienceworld
  # The decoder, of the Llama family with a tied head; vocab_size is of the tokenizer.
  start_decoder='',  # folder of one to go on from, its shape and tokenizer; '' is random weights
  vocab_size=768,  # tokens, control tokens and bytes included
  embed_dim=192,  # width
  num_layers=4,  # depth
  num_heads=6,  # of attention
  num_kv_heads=3,
  mlp_dim=512,
  # The lessons: episodes of scripted experts; houses draw anew what their states are called.
  episodes=15000,  # lessons, each in a house of its own
  tokenizer_episodes=600,  # of which the tokenizer learns its words
  held_out_episodes=100,  # on which the decoder is tested at the end, with and without hints
  lesson_options='',  # further env_options, of the lessons alone
  expert_error_rate=0.0,  # of the expert: a decision (household), a care it is not reminded of
  experience_share=0.0,  # of the lessons with a solved task of the same type in the context
  experience_format='summary',  # of it: chat, flat, summary
  # Household: lists of rules and the replies that follow from them, which teach to look up.
  drills=20000,
  match_drills=0,  # a goal, and states: is it the goal's?
  label_drills=0,  # a goal, and labels: does one tell its state?
  room_drills=0,  # a room, and its appliances in its order
  search_drills=0,  # a room, a goal, and labels one after the other
  game_drills=0,  # the same in the game's turns and in larger rooms
  loss_on='action',  # the replies; or all
  **{key: hint_distillation.DEFAULTS[key] for key in _OF_THE_LOOP},
  # The optimizer.
  optimizer='adamw',  # adamw; muon: for matrices, AdamW for the rest
  learning_rate=1e-3,  # at its highest
  schedule='cosine',  # linear, cosine, constant
  warmup_fraction=0.03,
  weight_decay=0.01,
  clip_norm=1.0,  # 0 is none
  label_smoothing=0.0,
  epochs=1.0,  # passes over the data; 0.5 is half of it
  row_len=896,  # tokens; longer episodes are left out and counted
  batch_rows=2,  # rows computed at a time
  grad_accum=1,
  seed=0,
  # How it is computed.
  dtype='auto',  # operands of the products: bfloat16, float32; auto: the faster here
  mesh='auto',  # sizes data,fsdp,tensor, or slices before them; auto: by model, memory and devices
  remat='auto',  # recomputed in the backward pass: none, mlp, full; auto: the least that fits
  attention='auto',  # blocks, kernel (GPU, TPU); auto: the kernel where it is shown to be right
  checkpoint_every=100,  # steps
  log_every=10,  # steps
  profile_steps='',  # first,last: a trace of these steps for XProf, in profile/
)

# What `experiments.evidence --run=small_decoder` trains and the repository holds.
PUBLISHED = 'experiments/small_decoder'

# ScienceWorld's easy tasks whose gold paths take 6 to 12 steps and 500 tokens.
SHORT_EASY_TYPES = (
  'find-animal,find-living-thing,find-non-living-thing,find-plant,lifespan-longest-lived,'
  'lifespan-longest-lived-then-shortest-lived,lifespan-shortest-lived')

# Where products are a catalogue's and not drawn anew, there is nothing to drill.
SETTINGS = {
  'household': {},
  'webshop': dict(
    {key: hint_distillation.WEBSHOP[key] for key in _OF_THE_LOOP
     if key in hint_distillation.WEBSHOP},
    vocab_size=2048, embed_dim=128, num_heads=4, num_kv_heads=2, mlp_dim=384,
    episodes=1700, tokenizer_episodes=400, held_out_episodes=20, drills=0,
    lesson_options='goals_per_product:4', expert_error_rate=0.5, loss_on='all', row_len=1024,
    batch_rows=1, optimizer='muon', learning_rate=3e-3, dtype='float32'),
  'scienceworld': dict(
    env='scienceworld', layout='paper_b', env_options='', task_types=SHORT_EASY_TYPES,
    max_env_steps=0, max_calls=0, max_new_tokens=32, max_context=2560,
    vocab_size=1024, embed_dim=128, num_heads=4, num_kv_heads=2, mlp_dim=384,
    episodes=84, tokenizer_episodes=84, held_out_episodes=7, drills=0,
    experience_share=0.5, loss_on='all', epochs=8.0, row_len=1280,
    batch_rows=1, optimizer='muon', learning_rate=3e-3, dtype='float32'),
}

HELP_KEYS = (
  'setting', 'episodes', 'vocab_size', 'embed_dim', 'num_layers', 'num_heads', 'learning_rate',
  'batch_rows')


def with_setting(name: str) -> dict:
  """All keys with the defaults of a setting.

  Raises:
    errors.UserError: there is none of that name.
  """
  if name not in SETTINGS:
    raise errors.UserError(f'There is no setting {name!r}; there are {", ".join(SETTINGS)}.')
  return {**DEFAULTS, **SETTINGS[name], 'setting': name}


def of_experiment(config):
  """The config of the decoder that an experiment's key `decoder` asks for: it plays as it does."""
  own = {key: config[key] for key in (*_OF_THE_LOOP, 'experience_format') if key in config}
  if 'easy_types' in config:
    own['task_types'] = config.easy_types
  return common.with_values(DEFAULTS, {
    **with_setting(config.decoder), **own, 'seed': config.seed, 'dtype': config.dtype})


def get_config(arg=None):
  return common.make_config(arg, with_setting(common.parse_arg(arg, DEFAULTS)['setting']))

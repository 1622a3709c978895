"""Trains a small decoder from random weights: a second size for the hint-distillation loop.

  python -m experiments.from_scratch --config=configs/from_scratch.py --workdir=runs/scratch

Makes runs/scratch/small_decoder, a Hugging Face folder with its own tokenizer, from expert episodes
of generated houses. The same command again goes on where a stopped run was.
"""

from configs import common, hint_distillation

# The lessons are played as the loop plays: its houses, prompts, limits and hint blocks.
_OF_THE_LOOP = (
  'env', 'data', 'task_types', 'env_options', 'agent', 'layout', 'prompt', 'few_shots',
  'max_env_steps', 'max_calls', 'max_new_tokens', 'max_context', 'k', 'warm_hint_share',
  'warm_rule_share')

DEFAULTS = dict(
  # The decoder, of the Llama family with a tied head; vocab_size is of the tokenizer.
  vocab_size=768,  # tokens, control tokens and bytes included
  embed_dim=192,  # width
  num_layers=4,  # depth
  num_heads=6,  # of attention
  num_kv_heads=3,
  mlp_dim=512,
  # The lessons: episodes of scripted experts, in houses whose states have invented names.
  episodes=15000,  # lessons, each in a house of its own
  drills=20000,  # lists of rules and the replies that follow from them, which teach to look up
  loss_on='action',  # the replies; or all
  **{key: hint_distillation.DEFAULTS[key] for key in _OF_THE_LOOP},
  # The optimizer.
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
  dtype='bfloat16',  # operands of the products; or float32
  mesh='auto',  # sizes data,fsdp,tensor, or slices before them; auto: by model, memory and devices
  remat='auto',  # recomputed in the backward pass: none, mlp, full; auto: the least that fits
  attention='auto',  # blocks, kernel (GPU, TPU); auto: the kernel where it is shown to be right
  checkpoint_every=100,  # steps
  log_every=10,  # steps
  profile_steps='',  # first,last: a trace of these steps for XProf, in profile/
)

HELP_KEYS = (
  'episodes', 'vocab_size', 'embed_dim', 'num_layers', 'num_heads', 'learning_rate', 'batch_rows')


def get_config(arg=None):
  return common.make_config(arg, DEFAULTS)

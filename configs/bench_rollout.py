"""The speed of playing, side by side with `transformers` and llama.cpp, in one run.

  python -m experiments.bench.rollout --peer=transformers,llama_cpp \
    --llama_python=.venv-llama/bin/python --workdir=runs/bench_rollout

with llama-cpp-python built for this machine in an environment of its own:

  python -m venv .venv-llama && .venv-llama/bin/pip install llama-cpp-python numpy

On one GPU, decoding of a 7B with random weights against the bandwidth of its memory:

  python -m experiments.bench.rollout --device=gpu --peer=none --parts=decode \
    --config=configs/bench_rollout.py:model=qwen25_7b,base=random,dtypes=bfloat16,\
decode_slots=128,decode_contexts=2048,3072,4096 --workdir=runs/bench_gpu --out=runs/gpu.json
"""

from configs import common

DEFAULTS = dict(
  model='smollm2_135m',  # a name of models/registry.py, or the path of weights
  base='',  # its weights: '' published, a path, or random (for --parts=decode)
  dtypes='bfloat16,float32',  # that are tried; ours plays freely in the first
  peer_dtypes='bfloat16,float32',  # that are tried with transformers
  # The episodes, as configs/rollout.py has them.
  episodes=64,  # of the split
  slots=64,  # episodes at a time, the most that is tried
  data='generated',  # 'generated', or the folder of the real games
  split='valid_seen',
  skills='official',
  agent='react',
  few_shots=0,
  max_env_steps=20,
  max_calls=24,
  max_repeats=100,  # high: speed is measured, and not success
  max_context=2048,
  decode_steps=8,
  lookups='0,4',  # tokens of a copied draft that are tried; 0 is none
  reprefill_episodes=0,  # that the peer plays which reads all again each turn; 0: all
  taste_turns=3,  # turns on which the settings of an engine are tried
  # Steady decoding.
  decode_slots='1,8,64',
  decode_contexts='512',  # tokens in each slot
  decode_tokens=64,  # sampled in each slot
  # How episodes/hour grow.
  scaling_turns=8,  # the first ones of each episode, so that 256 slots fit into the memory
  scaling_slots='1,4,16,64,128,256',
  scaling_contexts='512,1024,2048,4096',  # random tokens before each prompt
  context_slots=32,  # slots of these
)

HELP_KEYS = ('model', 'base', 'dtypes', 'episodes', 'slots')


def get_config(arg=None):
  return common.make_config(arg, DEFAULTS)

"""Fine-tunes an adapter on episodes.

  python train.py --config=configs/train.py:data=runs/teacher --workdir=runs/distilled

Writes to the workdir: config.json, metrics.jsonl, tensorboard/ (the same metrics as TensorBoard
reads them), checkpoints/, profile/ (where `profile_steps` asks for a trace), adapter/ (a PEFT
folder, for vLLM and `peft`) and summary.json. The same command again goes on from the newest
checkpoint; on SIGTERM a run saves one and exits with code 143. With `--workdir=gs://BUCKET/RUN`
(pip install gcsfs) another machine can go on.

Several processes train one adapter by the same command in each, with `--coordinator=auto` (a TPU
pod slice, SLURM) or `--coordinator=HOST:PORT --num_processes=N --process_id=I`.

With the defaults SmolLM2-135M on 2 CPU cores trains 140 (AVX2 alone) to 720 tokens a second (AMX):
1,000 episodes of 250 tokens in half an hour to 6 minutes. The setting of arXiv 2510.01375 is
`rank=64,alpha=128,dropout=0.1,learning_rate=2e-4,loss_on=all,row_len=1024,batch_rows=2,
grad_accum=4,seed=42`, on WebShop with
`rank=16,alpha=32,dropout=0.2,weight_decay=0.05,label_smoothing=0.1`.
"""

from collections.abc import Mapping
from typing import Any

import ml_collections

from configs import common

DEFAULTS = dict(
  # The student.
  model='smollm2_135m',  # a name of models/registry.py, or the path of weights
  base='',  # weights: '' published, 'random', or a path
  tokenizer='',  # path; '' is that of the weights
  shrink=False,  # a tiny random model of the same family, for dry runs (needs base=random)
  # Its rank, alpha and targets must be those below.
  init_adapter='',  # PEFT folder to continue from; '' is a new adapter
  # The episodes (journal or TFDS).
  data='',  # the folders of rollouts, a comma list
  success_only=True,
  max_invalid=2,  # episodes with more invalid actions are left out, and all with repeated no-ops
  max_examples=0,  # a random subset; 0 is all
  drop_memory=True,
  drop_few_shot=True,
  loss_on='action',  # the sampled tokens; or all
  # The adapter.
  rank=16,  # inner dimension
  alpha=32.0,  # the adapter's product is scaled by alpha / rank
  dropout=0.0,
  targets='q,k,v,o,gate,up,down',
  # The optimizer.
  optimizer='adamw',  # adamw; muon: for matrices, AdamW for the rest
  learning_rate=5e-4,  # at its highest
  schedule='linear',  # linear, cosine, constant
  warmup_fraction=0.1,
  weight_decay=0.01,
  clip_norm=1.0,  # 0 is none
  label_smoothing=0.0,
  epochs=1.0,  # passes over the data; 0.5 is half of it
  # Rows of packed episodes: batch_rows x grad_accum of them a step.
  row_len=512,  # tokens; longer ones are left out and counted; 0: shortest that packs well
  batch_rows=4,  # rows computed at a time
  grad_accum=1,
  seed=0,
  # How it is computed.
  dtype='auto',  # operands of the products: bfloat16, float32; auto: the faster here
  base_quantization='none',  # kernels of the frozen base: none, int8, int4, nf4
  mesh='auto',  # sizes data,fsdp,tensor, or slices before them; auto: by model, memory and devices
  remat='auto',  # recomputed in the backward pass: none, mlp, full; auto: the least that fits
  attention='auto',  # blocks, kernel (GPU, TPU); auto: the kernel where it is shown to be right
  checkpoint_every=20,  # steps
  log_every=1,  # steps
  profile_steps='',  # first,last: a trace of these steps for XProf, in profile/
)

HELP_KEYS = (
  'data', 'model', 'base', 'init_adapter', 'rank', 'alpha', 'learning_rate', 'epochs', 'row_len',
  'batch_rows')


def make(values: Mapping[str, Any]) -> ml_collections.ConfigDict:
  """A locked config of these values over the defaults."""
  return common.with_values(DEFAULTS, values)


def get_config(arg=None):
  return common.make_config(arg, DEFAULTS)

"""One timed run of `transformers` + `peft`, for experiments/bench/train.py.

The same rows in the same order as ours where packed, so that the losses can be compared.
"""

import json
import pathlib
import time

import numpy as np
import peft
import torch
import transformers

from data import process_memory
from training import packing

_TARGETS = ['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj']
_IGNORED = -100  # a label without a loss


def _model(job: dict, device: str):
  dtype = getattr(torch, job['dtype'])
  if job['folder']:
    model = transformers.AutoModelForCausalLM.from_pretrained(
      job['folder'], dtype=dtype, attn_implementation='sdpa')
    model = peft.PeftModel.from_pretrained(model, job['adapter'], is_trainable=True)
  else:
    config = transformers.AutoConfig.for_model(**job['hf_settings'])
    with torch.device(device):
      model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=dtype, attn_implementation='sdpa')
    model = peft.get_peft_model(model, peft.LoraConfig(
      r=job['rank'], lora_alpha=job['alpha'], target_modules=_TARGETS, task_type='CAUSAL_LM'))
  if job['remat'] != 'none':
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({'use_reentrant': False})
  return model.to(device).train()


def _packed(data, job: dict, num_steps: int):
  """The batches of `packing.Batches` with a block-diagonal mask, and their useful tokens."""
  rows = packing.Rows(
    *(data[f'packed.{key}'] for key in ('tokens', 'segment_ids', 'positions', 'loss_mask')),
    num_examples=0, too_long=())
  batches = packing.Batches(
    rows, batch_rows=job['batch_rows'], epochs=1 + num_steps * job['batch_rows'] / rows.num_rows)
  for step in range(num_steps):
    picked = batches[step]
    tokens, segments, positions = (
      torch.from_numpy(picked[key][0]).long() for key in ('tokens', 'segment_ids', 'positions'))
    labels = torch.full(tokens.shape, _IGNORED)
    used = picked['loss_weight'][0, 0] > 0
    place = torch.from_numpy(picked['loss_index'][0, 0][used]).long() + 1
    labels.view(-1)[place] = tokens.view(-1)[place]
    width = tokens.shape[1]
    mask = (segments[:, :, None] == segments[:, None, :]) & torch.ones(width, width).tril().bool()
    inputs = {'input_ids': tokens, 'position_ids': positions, 'labels': labels,
              'attention_mask': mask[:, None]}
    yield inputs, int((segments > 0).sum())


def _padded(data, num_steps: int):
  count = sum(key.startswith('padded.') and key.endswith('.tokens') for key in data.files)
  for step in range(num_steps):
    tokens, mask, loss_mask = (
      torch.from_numpy(data[f'padded.{step % count}.{key}'])
      for key in ('tokens', 'mask', 'loss_mask'))
    tokens = tokens.long()
    labels = torch.where(loss_mask, tokens, _IGNORED)
    yield ({'input_ids': tokens, 'attention_mask': mask.long(), 'labels': labels},
           int(mask.sum()))


def run(job: dict) -> dict:
  """As `train_jax.run`, by the peer."""
  device = 'cuda' if job['device'] == 'gpu' else 'cpu'
  model = _model(job, device)
  parameters = [p for p in model.parameters() if p.requires_grad]
  for parameter in parameters:
    parameter.data = parameter.data.float()  # As peft keeps an adapter that it makes.
  optimizer = torch.optim.AdamW(
    parameters, lr=job['learning_rate'], betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0,
    fused=True)
  forward = torch.compile(model, dynamic=job['layout'] == 'padded') if job['compile'] else model
  num_steps = job['warm_steps'] + job['steps']
  data = np.load(job['data'])
  batches = (_packed(data, job, num_steps) if job['layout'] == 'packed'
             else _padded(data, num_steps))
  autocast = torch.autocast(device, torch.bfloat16, enabled=job['dtype'] == 'bfloat16')
  seconds, tokens, losses = [], [], []
  for inputs, useful in batches:
    inputs = {key: value.to(device) for key, value in inputs.items()}
    started = time.perf_counter()
    with autocast:
      loss = forward(**inputs, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    losses.append(float(loss))
    if device == 'cuda':
      torch.cuda.synchronize()
    seconds.append(time.perf_counter() - started)
    tokens.append(useful)
  warm = job['warm_steps']
  peak = (torch.cuda.max_memory_allocated() if device == 'cuda'
          else process_memory.peak_bytes())
  return {'seconds': seconds[warm:], 'tokens': tokens[warm:], 'losses': losses,
          'first_step_s': seconds[0], 'peak_bytes': peak}


def product_rate(job: dict) -> dict:
  """{'flops_per_s'} of the peer's products in the job's dtype on the CPU, the best of a few."""
  size, seconds = 1024, []
  x = torch.ones((size, size), dtype=getattr(torch, job['dtype']))
  for _ in range(4):
    started = time.perf_counter()
    torch.matmul(x, x)
    seconds.append(time.perf_counter() - started)
  return {'flops_per_s': 2 * size**3 / min(seconds)}


def run_file(job: str, out: str) -> None:
  """Runs the job of one JSON file and writes the record to another."""
  content = json.loads(pathlib.Path(job).read_text())
  work = {'run': run, 'product_rate': product_rate}[content.get('kind', 'run')]
  pathlib.Path(out).write_text(json.dumps(work(content)))

"""Fine-tunes a LoRA adapter on episodes.

  python train.py --config=configs/train.py:data=runs/teacher --workdir=runs/distilled

See configs/train.py for every key. The same command again goes on where a stopped run was, and ends
with the same adapter, bit for bit, as a run that was never stopped. SIGTERM (a preemption) saves
and exits with code 143.
"""

import contextlib
import dataclasses
import functools
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any

from absl import flags

from configs import cli, common
from data import errors, summary, trajectory
from data import workdir as workdir_lib
from training import dataset

# Keys that may differ when a run is continued: they change how it is computed and watched, not what
# is learnt (on another mesh sums are taken in another order).
FREE_KEYS = ('checkpoint_every', 'log_every', 'profile_steps', 'mesh', 'remat', 'attention')


def load_data(config) -> tuple[list, dict[str, int], set[str]]:
  """Examples of all run folders in `config.data`, the rules' counts, the tokenizers' fingerprints.

  Several processes read every n-th episode each, and tell each other what they made of them.

  Raises:
    UserError: no folder is named, one holds no episodes, or none of them passes the rules.
  """
  folders = [part.strip() for part in config.data.split(',') if part.strip()]
  if not folders:
    raise errors.UserError('data is empty; give data=RUN, the --workdir of a rollout.')
  rules = dataset.Rules(
    success_only=config.success_only,
    max_invalid=config.max_invalid,
    drop_memory=config.drop_memory,
    drop_few_shot=config.drop_few_shot,
    loss_on=config.loss_on,
    max_examples=config.max_examples,
    seed=config.seed,
  )

  import jax

  from training import processes

  def read():
    part = jax.process_index(), jax.process_count()
    return [dataset.sift(trajectory.load_episodes(folder, part), rules, number, part)
            for number, folder in enumerate(folders)]

  parts = [part for parts in processes.from_each(read) for part in parts]
  return dataset.join(parts, rules)


def lora_config(config):
  """The shape of the adapter."""
  from models.lora import LoraConfig

  targets = tuple(name.strip() for name in config.targets.split(',') if name.strip())
  return LoraConfig(config.rank, config.alpha, config.dropout, targets)


def choose_mesh(text: str, batch_rows: int, row_len: int, architecture, lora=None):
  """The mesh of 'auto' (the best of `memory.plans`) or of sizes (`sharding.parse_sizes`).

  Args:
    text: of the config.
    batch_rows: rows computed at a time.
    row_len: tokens of a row.
    architecture: the `decoder.DecoderConfig` of what is trained.
    lora: its adapter's shape; None where there is none.

  Raises:
    UserError: no sizes, not as many devices, rows or heads that do not divide, or a process of
      several that would have nothing to do.
  """
  import jax

  from models import decoder, memory, sharding
  from training import processes

  if text == 'auto':

    def choose():
      plan = memory.plans(
        decoder.abstract(architecture, lora),
        num_devices=jax.device_count(),
        slices=sharding.count_slices(jax.devices()),
        memory=memory.device_bytes(),
        batch_rows=batch_rows,
        row_len=row_len,
      )[0]
      return plan.sizes, str(plan)

    sizes, why = processes.by_first(choose)
    processes.say(why)
  else:
    sizes = sharding.parse_sizes(text)
  mesh = sharding.make_mesh(**sizes)
  shards = sharding.batch_shards(mesh)
  if batch_rows % shards:
    raise errors.UserError(
      f'batch_rows={batch_rows} does not divide into the {shards} slice, data and fsdp '
      'shards of the mesh.'
    )
  if architecture.num_kv_heads % mesh.shape['tensor']:
    raise errors.UserError(
      f'tensor={mesh.shape["tensor"]} of the mesh does not divide the {architecture.num_kv_heads} '
      f'key-value heads of {architecture.name}.'
    )
  if jax.process_count() > 1 and mesh.size != jax.device_count():
    raise errors.UserError(
      f'The mesh {dict(mesh.shape)} has {mesh.size} of the {jax.device_count()} devices of '
      f'{jax.process_count()} processes, which all have to be in it; give '
      f'batch_rows={batch_rows} another size, or mesh=DATA,FSDP,TENSOR.'
    )
  return mesh


def make_model(config, base, mesh):
  """The base with a fresh adapter, or with the one to continue.

  Raises:
    UserError: `init_adapter` is missing, broken, or of another shape than the config asks for.
  """
  from models import weights

  lora, adapter = lora_config(config), None
  if config.init_adapter:
    found, adapter = weights.load_peft(config.init_adapter, base.config)
    for name in ('rank', 'alpha', 'targets'):
      if getattr(found, name) != getattr(lora, name):
        raise errors.UserError(
          f'{config.init_adapter} has {name} {getattr(found, name)}, not {getattr(lora, name)}; '
          f'set {name} to its value to continue it.'
        )
  return base.with_adapter(lora, adapter, seed=config.seed, mesh=mesh)


def check(config) -> None:
  """Raises a UserError for numbers with which `fit` cannot train."""
  from training import optimizer as optimizer_lib

  if config.batch_rows < 1 or config.grad_accum < 1 or config.epochs <= 0:
    raise errors.UserError('batch_rows, grad_accum and epochs must be positive.')
  if config.row_len < 0 or config.row_len == 1:
    raise errors.UserError(
      f'row_len={config.row_len} holds no token and the one before it; give at least 2, or 0 for '
      'the length that packs well.')
  if config.log_every < 1 or config.checkpoint_every < 1:
    raise errors.UserError('log_every and checkpoint_every must be at least 1.')
  if config.remat not in ('auto', 'none', 'mlp', 'full'):
    raise errors.UserError(f'remat={config.remat!r}: choose auto, none, mlp or full.')
  common.check_dtype(config.dtype)
  if config.attention not in ('auto', 'blocks', 'kernel'):
    raise errors.UserError(f'attention={config.attention!r}: choose auto, blocks or kernel.')
  optimizer_lib.check_name(config.optimizer)


def fit(
  config,
  workdir: pathlib.Path,
  model,
  rows,
  mesh,
  score: Callable[[Any], float] | None = None,
  mirror: workdir_lib.Mirror | None = None,
) -> tuple[Any, dict[str, Any]]:
  """Trains what `model` does not hold frozen on packed rows, from the newest checkpoint on.

  Args:
    config: rows of a step, optimizer, seed and intervals, as in configs/train.py; written to the
      folder, which refuses every other one from then on.
    workdir: gets checkpoints/, metrics.jsonl, tensorboard/ and profile/.
    model: a `decoder.Model` on `mesh`; its trained arrays are donated.
    rows: `packing.Rows`, at least one with a loss token.
    mesh: of `choose_mesh`.
    score: says how good a `decoder.Model` is, the higher the better, such as the share of tasks
      that it solves. Asked at every `checkpoint_every` steps and the last; the one with the highest
      score is what training ends with. It must not keep the model, whose arrays the next step
      takes.
    mirror: where `workdir` is the local end of a remote folder, which then gets the checkpoints.

  Returns:
    (state, record): the last `step.TrainState`, or the best one where there are scores; and what
    summary.json says about the training.

  Raises:
    errors.Preempted: SIGTERM; a checkpoint is saved.
  """
  import jax

  from models import cost, decoder, memory, sharding
  from training import attention_path as attention_path_lib
  from training import optimizer as optimizer_lib
  from training import packing, processes, speed
  from training import remat as remat_lib
  from training import step as step_lib
  from training.checkpoint import Checkpoints
  from training.feed import Feed
  from training.metrics import Metrics
  from training.preemption import Preemption
  from training.profile import Profile

  if score and jax.process_count() > 1:
    raise errors.UserError(
      'Scores are given in one process; train there, or select among finished runs.'
    )
  profile = Profile(config.profile_steps, workdir / 'profile')
  shards = sharding.batch_shards(mesh)
  batches = packing.Batches(
    rows,
    batch_rows=config.batch_rows,
    grad_accum=config.grad_accum,
    epochs=config.epochs,
    seed=config.seed,
    num_shards=shards,
  )

  # Optimizer, step, and the state: new, or of the newest checkpoint.
  schedule = optimizer_lib.make_schedule(
    config.schedule, config.learning_rate, batches.num_steps, config.warmup_fraction
  )
  optimizer = optimizer_lib.make_optimizer(
    schedule, name=config.optimizer, weight_decay=config.weight_decay, clip_norm=config.clip_norm
  )
  attention_path = attention_path_lib.choose(config.attention, model.config)
  # Nothing is written before all of the command has been found good.
  processes.by_first(
    lambda: workdir_lib.open_workdir(workdir, config.to_dict(), free_keys=FREE_KEYS)
  )
  state, shardings = step_lib.init_state(model, optimizer, mesh)
  frozen = step_lib.as_read(model.frozen)
  make_step = functools.partial(
    step_lib.make_train_step,
    model,
    optimizer,
    schedule,
    shardings,
    mesh,
    seed=config.seed,
    label_smoothing=config.label_smoothing,
    attention_path=attention_path,
  )
  remat = config.remat
  if remat == 'auto':
    shapes = step_lib.batch_shapes(batches[0], mesh)
    limit = processes.by_first(lambda: memory.device_bytes(len(mesh.local_devices)))
    steps = {name: make_step(remat=name) for name in decoder.REMAT}
    with jax.set_mesh(mesh):
      remat = remat_lib.choose(steps.get, state, frozen, shapes, limit=limit)
    train_step = steps[remat]
  else:
    train_step = make_step(remat=remat)
  checkpoints = Checkpoints(
    (mirror.folder if mirror else workdir) / 'checkpoints',
    {
      'rows': rows.digest(),
      'seed': config.seed,
      'num_steps': batches.num_steps,
      'model': f'{model.config.name} {model.config.num_layers}x{model.config.embed_dim}',
      'rank': model.lora_config.rank if model.lora_config else 0,
    },
  )
  state = checkpoints.restore(state, shardings) or state
  start = int(state.step)

  def give_score(step: int) -> None:
    if score and step not in checkpoints.scores:
      checkpoints.mark(step, score(dataclasses.replace(model, lora=state.lora)))

  def planned(step: int) -> bool:
    """Whether a run that nobody stops has a checkpoint there, one that a score may choose."""
    return step == batches.num_steps or (step > 0 and step % config.checkpoint_every == 0)

  if planned(start):
    give_score(start)

  # What it will take.
  row_len = rows.tokens.shape[1]
  places = config.grad_accum * config.batch_rows * row_len
  loss_places = config.grad_accum * shards * batches.loss_budget
  step_flops = cost.train_flops(
    model.config, model.lora_config, places, loss_places, row_len
  )
  useful_flops = cost.train_flops(
    model.config, model.lora_config, rows.num_tokens, rows.num_loss_tokens, rows.context)
  rate = speed.product_rate(config.dtype)
  predicted_s = speed.predict_seconds(step_flops * (batches.num_steps - start), rate * mesh.size)
  processes.say(
    f'training: {rows.num_examples} examples in {rows.num_rows} rows of {row_len} '
    f'({rows.efficiency:.0%} full), {batches.num_tokens} tokens, {batches.num_loss_tokens} with a '
    f'loss; steps {start} to {batches.num_steps} on {mesh.size} of {jax.device_count()} devices, '
    f'about {predicted_s / 60:.1f} min'
  )

  # The loop. It runs ahead of the devices: nothing in it waits for a step but a record of the one
  # before, and a checkpoint. What would move an array unasked raises.
  feed = Feed(batches, mesh)
  peak = speed.peak_rate(config.dtype, rate)
  metrics = Metrics(
    workdir / 'metrics.jsonl' if processes.is_first() else None,
    batches.num_steps,
    start,
    config.log_every,
    token_flops=useful_flops / rows.num_tokens,
    peak_flops=peak and peak * mesh.size,
  )
  loop_started = time.perf_counter()
  # Whatever ends the run, a checkpoint that is being written is completed.
  with contextlib.closing(checkpoints):
    with (
      contextlib.closing(metrics),
      contextlib.closing(profile),
      processes.watched(),
      Preemption() as preemption,
    ):
      for step in range(start, batches.num_steps):
        profile.before(step, state)
        with jax.transfer_guard('disallow'):
          feed_started = time.perf_counter()
          batch = feed[step]
          data_s = time.perf_counter() - feed_started
          # Activations are constrained, and kernels are split, by the mesh that is set.
          with jax.set_mesh(mesh):
            state, values = train_step(state, frozen, batch)
          metrics.add(step, values, batches.tokens_in(step), data_s)
        profile.after(step, state)
        last, stops = step + 1 == batches.num_steps, preemption.stops_after(step)
        if planned(step + 1) or stops:
          # Also keeps a state that is not finite from being saved.
          metrics.flush()
          checkpoints.save(state)
          if mirror and processes.is_first():
            mirror.push()
        if stops and not last:
          raise errors.Preempted(
            f'Asked to stop (SIGTERM): step {step + 1} of {batches.num_steps} is saved in '
            f'{checkpoints.folder}; start the same command again to go on.'
          )
        if planned(step + 1):
          # While the checkpoint is being written.
          give_score(step + 1)
    loop_s = time.perf_counter() - loop_started
    best = checkpoints.best() if score else None
    if best is not None and best != batches.num_steps:
      state = checkpoints.restore(state, shardings, best)
  record = {
    'steps': batches.num_steps,
    'tokens': batches.num_tokens,
    'loss_tokens': batches.num_loss_tokens,
    'rows': rows.num_rows,
    'row_len': row_len,
    'mesh': dict(mesh.shape),
    'remat': remat,
    'attention': attention_path,
    'packing_efficiency': rows.efficiency,
    'resumed_at': start,
    'tokens_per_s': metrics.tokens / loop_s if metrics.tokens else None,
    'train_s': loop_s,
    'predicted_s': predicted_s,
    'loss': metrics.last_loss,
  }
  if best is not None:
    record['best'] = {'step': best, 'score': checkpoints.scores[best]}
  return state, record


def run(
  config,
  workdir: str | pathlib.Path,
  base=None,
  score: Callable[[Any], float] | None = None,
) -> dict:
  """Trains, or goes on, or does nothing where the run is finished; returns summary.json's content.

  Args:
    config: as configs/train.py makes it.
    workdir: the run's folder, also gs://BUCKET/FOLDER.
    base: an `agents.policy.Base` that is loaded already; None loads what the config names.
    score: of checkpoints, as `fit` takes it; the adapter is then that of the best one.
  """
  started = time.perf_counter()
  check(config)
  examples, counts, fingerprints = load_data(config)
  mirror = workdir_lib.Mirror(workdir)
  folder = mirror.local
  summary_path = folder / 'summary.json'

  from agents.policy import load_base
  from models import decoder, registry, weights
  from training import packing, processes, speed

  config = config.copy_and_resolve_references()
  config.dtype = processes.by_first(lambda: speed.settle_dtype(config.dtype, folder))

  def finished() -> dict | None:
    workdir_lib.check_workdir(folder, config.to_dict(), free_keys=FREE_KEYS)
    return json.loads(summary_path.read_text()) if summary_path.exists() else None

  record = processes.by_first(finished)
  if record is not None:
    processes.say(f'{workdir} is finished already.')
    return record

  # Model, mesh and data.
  if base is None:
    base = load_base(
      config.model,
      config.base,
      tokenizer=config.tokenizer,
      shrink=config.shrink,
      dtype=config.dtype,
      base_quantization=config.base_quantization,
      seed=config.seed,
    )
  row_len = config.row_len or packing.choose_row_len(
    [len(e.tokens) for e in examples], base.config.max_position)
  mesh = choose_mesh(config.mesh, config.batch_rows, row_len, base.config, lora_config(config))
  if fingerprints != {base.tokenizer.fingerprint}:
    raise errors.UserError(
      f'The episodes were tokenised by {", ".join(sorted(f[:12] for f in fingerprints))}, the '
      f'tokenizer of {base.name} is {base.tokenizer.fingerprint[:12]}; train the model that played '
      'them.'
    )
  rows = packing.pack(examples, row_len)
  counts['too_long'] = len(rows.too_long)
  processes.say('episodes: ' + ', '.join(f'{name} {n}' for name, n in counts.items()))
  if rows.too_long:
    processes.say(
      f'{len(rows.too_long)} episodes are longer than row_len={row_len} and left out; the longest '
      f'has {max(len(e.tokens) for e in examples)} tokens.')
  if not rows.num_loss_tokens:
    raise errors.UserError(
      f'No example fits into row_len={row_len} with a token to train; the shortest has '
      f'{min(len(e.tokens) for e in examples)} tokens.'
    )
  model = make_model(config, base, mesh)
  state, record = fit(config, folder, model, rows, mesh, score, mirror)

  # The adapter for others, and the record.
  adapter = processes.to_host(decoder.to_params(state.lora))
  record |= {
    'episodes': counts,
    'wall_s': time.perf_counter() - started,
    'versions': summary.versions(),
  }
  if processes.is_first():
    name, multimodal = registry.peft_base(config.model)
    weights.export_peft(
      folder / 'adapter', base.config, model.lora_config, adapter, name, multimodal=multimodal)
    workdir_lib.write_json(summary_path, record)
    mirror.push()
  return record


def main(_):
  from training import processes

  given = flags.FLAGS
  with processes.joined(given.coordinator, given.num_processes, given.process_id):
    record = run(given.config, given.workdir)
    if not processes.is_first():
      return
  loss = 'not recorded' if record['loss'] is None else f'{record["loss"]:.4f}'
  print(
    f'{record["steps"]} steps, {record["tokens"]} tokens, loss {loss}, '
    f'{record["wall_s"] / 60:.1f} min; adapter in {given.workdir}/adapter'
  )


if __name__ == '__main__':
  cli.define_config_flags()
  cli.define_process_flags()
  cli.run(main)

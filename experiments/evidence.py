"""The experiments behind the claims, by name: each one a run of a method, each one JSON.

  python -m experiments.evidence --list
  python -m experiments.evidence --run=seed0,seed1 --workdir=runs/evidence
  python -m experiments.results_table              # merges all results into the tables

An experiment has its folder in the workdir; a stopped one goes on, a finished one is filed as
experiments/results/METHOD_NAME.json and not played again.
"""

import dataclasses
import os
import pathlib

from absl import flags

from configs import cli
from configs import experience_retrieval as experience_config
from configs import from_scratch as scratch_config
from configs import hint_distillation as hint_config
from data import errors, summary
from experiments import experience_retrieval, from_scratch, hint_distillation, results_table

_ROOT = pathlib.Path(__file__).parents[1]
_MAIN = 'base,base+hints,sft,distilled'
_CONTROLS = f'{_MAIN},sft+hints,distilled+hints,base+random,base+fixed'
_SIZES = f'{_CONTROLS},base+hints@1,base+hints@6,base+hints@9,base+self-hints'
# The formats are compared with one another: half of the demo's games, three epochs.
_FORMAT = 'train_games=90,eval_games=60,epochs=3,evaluate=base,base+hints,distilled'
_CONTEXT = 'agent=react,max_context=1152'
_REACT = f'{_CONTEXT},max_calls=28'
# Its lessons leave room to try all five appliances in the order of the room: what it learns to do
# where neither hint nor experience helps.
_LESSONS = (
  f'{_CONTEXT},max_env_steps=16,max_calls=44,lesson_options=expert_in_order:true,'
  'max_new_tokens=40,row_len=1152,loss_on=all,tokenizer_episodes=1500,vocab_size=1024,'
  'warm_hint_share=0.5,expert_error_rate=0.1,optimizer=muon')
# What looks for a word that it has read forms where little else is asked for, then in lines of a
# search, then in whole games; each stage keeps the ones before.
_STAGES = {
  'small_decoder_words': 'episodes=30,drills=0,search_drills=2800,match_drills=5000,'
    'label_drills=7000,learning_rate=3e-3',
  'small_decoder_lines': 'episodes=5500,drills=4000,search_drills=5000,match_drills=5000,'
    'label_drills=6000,room_drills=8000,learning_rate=2e-3',
  'small_decoder': 'episodes=4500,drills=2000,search_drills=1500,match_drills=3000,'
    'label_drills=3000,room_drills=2000,game_drills=5000,learning_rate=2e-3'}


@dataclasses.dataclass(frozen=True)
class Experiment:
  """A question and the config that answers it.

  Attributes:
    question: what it is about.
    config: argument of the method's config file; {workdir} stands for the evidence's folder.
    after: experiments whose folders it reads.
    method: 'hint_distillation', 'experience_retrieval' or 'from_scratch'.
  """

  question: str
  config: str
  after: tuple[str, ...] = ()
  method: str = 'hint_distillation'

  def read_config(self, workdir: pathlib.Path):
    """Its config, checked."""
    configs, program = _METHODS[self.method]
    config = configs.get_config(self.config.format(workdir=workdir))
    config.data = os.path.expandvars(config.data)
    program.check(config)
    return config


def _experience(question: str, **changes) -> Experiment:
  values = ','.join(f'{key}={value}' for key, value in changes.items())
  return Experiment(question, f'setting=small,{values}', method='experience_retrieval')


def _ablation(question: str, policies: str = 'exprag_lora,exprag_lora+matched', **changes):
  """One factor at a time, against experience_seed0."""
  return _experience(question, seed=0, **changes, evaluate=policies)


def _recipe(question: str, **changes):
  return _ablation(question, 'lora,exprag_lora,exprag_lora+matched', **changes)


def _decoder_stages() -> dict[str, Experiment]:
  """Each stage of the small decoder goes on from the one before."""
  stages, earlier = {}, ''
  for name, values in _STAGES.items():
    config = f'{_LESSONS},{values}'
    if earlier:
      config += f',start_decoder={{workdir}}/{earlier}/{from_scratch.MODEL_FOLDER}'
    stages[name] = Experiment(
      'a decoder of 1.8 million parameters from random weights: '
      + (scratch_config.PUBLISHED if name == 'small_decoder' else 'a stage of it'),
      config, (earlier,) if earlier else (), 'from_scratch')
    earlier = name
  return stages


# Of each method its configs, and what checks one.
_METHODS = {
  'hint_distillation': (hint_config, hint_distillation),
  'experience_retrieval': (experience_config, experience_retrieval),
  'from_scratch': (scratch_config, from_scratch),
}

EXPERIMENTS = {
  'seed0': Experiment(
    'policies and controls, k in 1, 3, 6, 9, and the writers rules and self',
    f'seed=0,sft_examples=matched,evaluate={_SIZES}'),
  'seed1': Experiment(
    'policies and controls', f'seed=1,sft_examples=matched,evaluate={_CONTROLS}'),
  'seed2': Experiment(
    'policies and controls', f'seed=2,sft_examples=matched,evaluate={_CONTROLS}'),
  'round2': Experiment(
    'a second round: the failures of the first student, 90 further games',
    'seed=0,next_after={workdir}/seed0,warm_episodes=0,train_games=90,learning_rate=5e-4,'
    'evaluate=base,base+hints,distilled', ('seed0',)),
  'plain': Experiment('the plain format', f'agent=plain,{_FORMAT}'),
  'react': Experiment(
    'ReAct', f'{_REACT},max_new_tokens=0,row_len=1024,{_FORMAT}'),
  'stateact': Experiment(
    'StateAct', 'agent=stateact,max_new_tokens=0,max_context=1664,row_len=1536,' + _FORMAT),
  **_decoder_stages(),
  'small': Experiment(
    'a second size: hint distillation of that decoder',
    f'setting=demo,model={scratch_config.PUBLISHED},{_REACT},max_new_tokens=40,row_len=1152,'
    f'warm_episodes=0,sft_examples=matched,evaluate={_CONTROLS}'),
  'alfworld': Experiment(
    "ALFWorld's own games: 60 of valid_seen, official rules, 50 steps",
    'setting=alfworld,evaluate=' + _MAIN),
  **{f'experience_seed{seed}': _experience(
    'experience retrieval: policies, easy and hard, by index conditions', seed=seed)
    for seed in range(3)},
  **{f'experience_k{k}': _ablation(f'K = {k} experiences', experience_k=k) for k in (0, 1, 4)},
  **{f'experience_{name}': _ablation(f'stored as {name}', experience_format=name)
     for name in ('flat', 'chat')},
  'experience_dynamic': _ablation('retrieval at every step', query='dynamic'),
  'experience_bm25': _ablation('BM25 in the place of MiniLM', experience_retrieval='bm25'),
  'experience_full_sequence': _recipe('loss on all tokens', loss_on='all'),
  'experience_rank8': _recipe('rank 8', rank=8, alpha=16),
  'experience_rank64': _recipe('rank 64', rank=64, alpha=128),
  'experience_epoch1': _recipe('one epoch', epochs=1),
}


def run(name: str, workdir: pathlib.Path, machine: str) -> None:
  """Runs one experiment, or what is left of it, and files its result.

  Raises:
    errors.UserError: it needs another experiment first, or data that is not there.
  """
  experiment = EXPERIMENTS[name]
  for other in experiment.after:
    if not (workdir / other / 'summary.json').is_file():
      raise errors.UserError(
        f'{name} goes on from {other}, which {workdir} does not hold finished; run {other} first.')
  config = experiment.read_config(workdir)
  print(f'== {name}: {experiment.question}', flush=True)
  folder = workdir / name
  if experiment.method == 'experience_retrieval':
    experience_retrieval.Experiment(config, folder).run()
  elif experiment.method == 'from_scratch':
    from_scratch.run(config, folder)
    if name == 'small_decoder':
      publish(folder / from_scratch.MODEL_FOLDER)
  else:
    hint_distillation.Loop(config, folder).run()
  print(results_table.file_run(
    folder, name.removeprefix('experience_'), machine=machine, method=experiment.method,
    command=f'python -m experiments.evidence --run={name}'))


def publish(source: pathlib.Path, folder: pathlib.Path | None = None) -> None:
  """Puts a small decoder where the other experiments find it, its weights in bfloat16.

  Args:
    source: a Hugging Face folder with its tokenizer.
    folder: None is that of the repository.
  """
  from models import weights

  folder = folder or _ROOT / scratch_config.PUBLISHED
  config, params = weights.load_pretrained(source, 'float32')
  weights.export_pretrained(folder, config, params, dtype='bfloat16')
  from_scratch.copy_tokenizer(source, folder)


def main(_) -> None:
  if flags.FLAGS.list:
    for name, experiment in EXPERIMENTS.items():
      print(f'{name:<24} {experiment.question}')
    return
  names = [name for name in flags.FLAGS.run.split(',') if name]
  if unknown := [name for name in names if name not in EXPERIMENTS]:
    raise errors.UserError(
      f'There is no experiment {", ".join(unknown)}; there are {", ".join(EXPERIMENTS)}.')
  if not names:
    raise errors.UserError('Give --run=NAME,..., or --list.')
  for name in names:
    run(name, pathlib.Path(flags.FLAGS.workdir), flags.FLAGS.machine or summary.machine())


if __name__ == '__main__':
  flags.DEFINE_bool('list', False, 'Print the experiments and stop.')
  flags.DEFINE_string('run', '', 'Experiments to run, comma separated.')
  flags.DEFINE_string('workdir', 'runs/evidence', 'Folder of all experiments.')
  flags.DEFINE_string('machine', '', 'What it runs on, for the record; empty: as the CPU says.')
  cli.run(main, required=())

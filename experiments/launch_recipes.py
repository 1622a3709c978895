"""Where a sweep can run, as text: the commands for machines that this one does not reach."""

import shlex
from collections.abc import Mapping, Sequence

from data import errors

MACHINES = ('here', 'slurm', 'gpus', 'tpu', 'xpk')

# What a user replaces is in capitals.
_INSTALL = (
  'python3.11 -m venv .venv && .venv/bin/pip install -c constraints.txt -r requirements.txt '
  '"jax[{extra}]==0.10.2"')
# The workers of a slice share no disk: their --workdir is a bucket, which gcsfs writes.
_INSTALL_TPU = _INSTALL.format(extra='tpu') + ' gcsfs'


def _shell(line: Sequence[str]) -> str:
  return ' '.join(part if part.startswith('.venv/') else shlex.quote(part) for part in line)


def processes(resources: Mapping) -> int:
  """How many processes a run has on SLURM."""
  return resources.get('nodes', 1) * resources.get('tasks_per_node', 1)


def together(line: Sequence[str]) -> list[str]:
  """The command for one process of several, which find one another.

  Raises:
    UserError: the program is not one that trains in several processes.
  """
  if 'train.py' not in line:
    raise errors.UserError(
      'Several processes train together with train.py alone; give other programs one machine.')
  at = next(i for i, part in enumerate(line) if part.startswith('--'))
  return [*line[:at], '--coordinator=auto', *line[at:]]


def slurm(runs: Mapping[str, Sequence[str]], resources: Mapping) -> str:
  """One batch script; a process for each GPU, which jax.distributed joins by SLURM's variables."""
  nodes, tasks = resources.get('nodes', 1), resources.get('tasks_per_node', 1)
  lines = [
    '#!/bin/bash',
    '#SBATCH --job-name=hintsight',
    f'#SBATCH --array=0-{len(runs) - 1}',
    f'#SBATCH --nodes={nodes}',
    f'#SBATCH --ntasks-per-node={tasks}',
  ]
  if 'gpus_per_node' in resources:
    lines.append(f'#SBATCH --gpus-per-node={resources["gpus_per_node"]}')
  if 'slurm_partition' in resources:
    lines.append(f'#SBATCH --partition={resources["slurm_partition"]}')
  lines += [
    f'#SBATCH --time={resources.get("timeout_min", 1440)}',
    '# Two minutes before the end, and when the node is wanted: save and exit with 143.',
    '#SBATCH --signal=TERM@120',
    '#SBATCH --requeue',
    'case $SLURM_ARRAY_TASK_ID in',
  ]
  for number, line in enumerate(runs.values()):
    line = together(line) if processes(resources) > 1 else line
    lines.append(f'  {number}) srun {_shell(line)} ;;')
  lines += [
    'esac',
    'code=$?',
    '# Saved, and not done: queue again.',
    f'[ $code = {errors.EXIT_PREEMPTED} ] && '
    'scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"',
    'exit $code']
  return '\n'.join(lines)


def gpus(runs: Mapping[str, Sequence[str]], resources: Mapping) -> str:
  """One machine with 8 GPUs: one process drives them all, the mesh divides them."""
  del resources
  lines = ['# Once, on the machine, from the repository:', _INSTALL.format(extra='cuda12'),
           '# One run after the other, each on all GPUs (mesh=auto, or DATA,FSDP,TENSOR):']
  return '\n'.join([*lines, *(_shell(line) for line in runs.values())])


def tpu(runs: Mapping[str, Sequence[str]], resources: Mapping) -> str:
  """A TPU pod slice: the same command on every worker, joined by jax.distributed."""
  kind = resources.get('tpu_type', 'v5litepod-64')
  image = resources.get('tpu_image', 'v2-alpha-tpuv5-lite')
  every = 'gcloud compute tpus tpu-vm ssh NAME --zone=ZONE --worker=all --command='
  copy = 'gcloud compute tpus tpu-vm scp --recurse --zone=ZONE --worker=all'
  lines = [
    '# The slice, and the repository with its data on every worker:',
    f'gcloud compute tpus tpu-vm create NAME --zone=ZONE --accelerator-type={kind} '
    f'--version={image}',
    f'{copy} . NAME:hintsight',
    every + shlex.quote(f'cd hintsight && {_INSTALL_TPU}'),
    '# The workers share no disk, so --workdir is a bucket:',
  ]
  for line in runs.values():
    lines.append(every + shlex.quote(f'cd hintsight && {_shell(together(line))}'))
  lines += ['# The slice costs until it is deleted:',
            'gcloud compute tpus tpu-vm delete NAME --zone=ZONE']
  return '\n'.join(lines)


def xpk(runs: Mapping[str, Sequence[str]], resources: Mapping) -> str:
  """The same on a Kubernetes cluster of TPUs, by Google's xpk."""
  kind, slices = resources.get('tpu_type', 'v5litepod-64'), resources.get('num_slices', 1)
  lines = ['pip install xpk',
           '# --workdir is a bucket; --script-dir is sent as it is, with the data in it:']
  for name, line in runs.items():
    command = f'{_INSTALL_TPU} && {_shell(together(line))}'
    workload = ''.join(c if c.isalnum() else '-' for c in name.lower()).strip('-')[:38]
    lines.append(
      f'xpk workload create --cluster=CLUSTER --project=PROJECT --zone=ZONE '
      f'--workload={workload} --tpu-type={kind} --num-slices={slices} '
      f'--base-docker-image=python:3.11 --script-dir=. --command={shlex.quote(command)}')
  return '\n'.join(lines)


def here(runs: Mapping[str, Sequence[str]], resources: Mapping) -> str:
  """The commands themselves."""
  del resources
  return '\n'.join(_shell(line) for line in runs.values())

"""How every entry point starts: flags, and errors that a person can read."""

import contextlib
import gc
import importlib
import logging as python_logging
import os
import pathlib
import re
import sys
import threading
from collections.abc import Callable

import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

from configs import common, help_screen, process
from data import errors


def define_config_flags(default: str | None = None, *, workdir: bool = True) -> None:
  """Defines `--config`, and `--workdir` for what writes a run, as almost all entry points do."""
  config_flags.DEFINE_config_file(
    'config', default, 'configs/NAME.py:KEY=VALUE,...; --config.KEY=VALUE changes one key.',
    lock_config=True)
  if workdir:
    flags.DEFINE_string('workdir', None, 'Folder for everything that the run writes.')


def define_process_flags() -> None:
  """Defines what joins several processes, for the entries that train."""
  flags.DEFINE_string(
    'coordinator', '', 'HOST:PORT of process 0 of several, or auto: TPU pod slice, SLURM.')
  flags.DEFINE_integer('num_processes', 0, 'How many there are, unless auto.')
  flags.DEFINE_integer('process_id', -1, 'Which one this is, from 0, unless auto.')


def _fail(message: str, code: int) -> None:
  print(f'error: {message}', file=sys.stderr)
  sys.exit(code)


def _parse_flags(argv: list[str]) -> list[str]:
  try:
    return app.parse_flags_with_usage(argv)
  except errors.UserError as error:
    _fail(str(error), 2)
  except FileNotFoundError as error:
    _fail(f'Config file {error.filename!r} does not exist; see configs/ for those there are.', 2)
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    # `--config.key=value` on a locked ConfigDict: name the key and the near ones.
    _fail(_override_message(argv, error), 2)


def _override_message(argv: list[str], error: Exception) -> str:
  with contextlib.suppress(Exception):
    path = next(a for a in argv if re.match(r'--?config=', a)).split('=', 1)[1]
    name, _, arg = path.partition(':')
    module = importlib.import_module(name.removesuffix('.py').replace('/', '.'))
    known = list(module.get_config(arg or None).keys())
    for a in argv:
      match = re.match(r'--?config\.([^=]+)=?(.*)', a)
      if match and match.group(1) not in known:
        return f'There is no config key {match.group(1)!r}.{common.near(match.group(1), known)}'
  return ' '.join(str(error).split())


def _full_disk_message(error: BaseException) -> str | None:
  """What to tell of a full disk, with the folder that the command writes to; None for others."""
  cause = errors.full_disk(error)
  if cause is None:
    return None
  # `out` is a file, `workdir` a folder; the system's error does not always name a file.
  given = [pathlib.Path(flags.FLAGS[name].value) for name in ('workdir', 'out')
           if name in flags.FLAGS and flags.FLAGS[name].value]
  folder = given[0] if given else None
  if folder is not None and 'workdir' not in flags.FLAGS:
    folder = folder.parent
  file = getattr(cause, 'filename', None)
  if isinstance(file, str) and not (folder and pathlib.Path(file).is_relative_to(folder)):
    folder = pathlib.Path(file).parent
  reason = next(text for text in errors.FULL_DISK if text in str(cause))
  return (f'The disk is full: {folder or "a file"} cannot be written ({reason}); free some space '
          'there and start the same command again, which goes on with what is safe.')


def _quieten_full_disks() -> None:
  """Keeps threads from telling of a full disk what `run` will tell.

  Checkpoints are written by threads of Orbax, which print and log their tracebacks, and raise the
  error in the main thread as well. Of the writes that were under way asyncio then logs those that
  nobody waited for, and TensorStore calls an event loop that is closed.
  """
  excepthook = threading.excepthook
  threading.excepthook = lambda arguments: (
    None if errors.full_disk(arguments.exc_value) else excepthook(arguments))
  unraisablehook = sys.unraisablehook
  sys.unraisablehook = lambda arguments: (
    None if str(arguments.exc_value) == 'Event loop is closed' else unraisablehook(arguments))
  for logger in (logging.get_absl_logger(), python_logging.getLogger('asyncio')):
    logger.addFilter(
      lambda record: not (record.exc_info and errors.full_disk(record.exc_info[1])))


def run(main: Callable[[list[str]], None], required: tuple[str, ...] = ('config', 'workdir')):
  """Runs `main` as absl does; a UserError becomes one sentence and exit code 1 (2 for flags).

  So does a full disk, whatever was being written.
  """
  if help_screen.is_asked(sys.argv):
    print(help_screen.screen(sys.modules['__main__'].__doc__, required))
    sys.exit(0)
  process.use_huge_pages()
  process.leave_tpu_alone()
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')

  def guarded(argv: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    _quieten_full_disks()
    full = None
    try:
      missing = [name for name in required if flags.FLAGS[name].value is None]
      if missing:
        _fail(f'--{missing[0]} is needed; --help shows how.', 2)
      if 'config' in flags.FLAGS and not isinstance(
          flags.FLAGS['config'].value, (ml_collections.ConfigDict, type(None))):
        # config_flags keeps the exception of a file that it could not load until a key is read.
        name = next((a for a in sys.argv if a.startswith(('--config=', '-config='))), '--config')
        _fail(f'{name.partition(":")[0]} is not a config file that can be loaded; '
              'configs/ holds those there are.', 2)
      main(argv)
    except errors.UserError as error:
      _fail(str(error), 1)
    except errors.Preempted as stopped:
      print(stopped, file=sys.stderr)
      sys.exit(errors.EXIT_PREEMPTED)
    except KeyboardInterrupt:
      _fail('Stopped; start the same command again to go on.', 130)
    except Exception as error:
      full = _full_disk_message(error)
      if full is None:
        raise
    if full:
      # Writers that were left waiting end here and not, noisily, in the interpreter's own end.
      gc.collect()
      _fail(full, 1)

  app.run(guarded, flags_parser=_parse_flags)

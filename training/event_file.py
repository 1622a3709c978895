"""Scalars as TensorBoard reads them, without TensorFlow."""

import os
import pathlib
import time
from collections.abc import Iterable, Mapping


class EventFile:
  """One event file that always holds a run's records from its first step on, each step once.

  What a stopped run wrote is not continued but replaced by the records that are kept, so that
  TensorBoard shows what metrics.jsonl says and nothing besides. A TensorBoard that is open
  meanwhile is told to forget the steps that it has seen. Every record is on its way to the disk
  when `add` returns, written by the calling thread: a full disk is an OSError there and not a
  traceback of another thread.
  """

  def __init__(self, folder: str | os.PathLike, records: Iterable[Mapping[str, float]]):
    """Replaces the event files of a folder.

    Args:
      folder: made if missing; what `tensorboard --logdir` is given, or a folder above it.
      records: of earlier starts, as `add` takes them.
    """
    # Imported here: it needs a moment, and another one where torch is installed.
    from tensorboardX import event_file_writer
    from tensorboardX.proto import event_pb2

    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # First of all: between here and the last line the steps may be missing (the next start writes
    # them again) but never there twice. Emptied and not removed: a TensorBoard that is open cannot
    # get past a file that is gone.
    for path in folder.glob('events.out.tfevents.*'):
      os.truncate(path, 0)
    self._event_pb2 = event_pb2
    self._writer = event_file_writer.EventsWriter(str(folder / 'events'))
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._writer.write_event(event_pb2.Event(wall_time=time.time(), step=0, session_log=start))
    for record in records:
      self._write(record)
    self._writer.flush()

  def add(self, record: Mapping[str, float]) -> None:
    """Writes one record.

    Args:
      record: 'step', 'unix_time' (seconds; now where a record has none) and scalars by name.
    """
    self._write(record)
    self._writer.flush()

  def _write(self, record: Mapping[str, float]) -> None:
    event = self._event_pb2.Event(
      wall_time=record.get('unix_time', time.time()), step=record['step']
    )
    for name, value in record.items():
      if name not in ('step', 'unix_time'):
        event.summary.value.add(tag=f'train/{name}', simple_value=value)
    self._writer.write_event(event)

  def close(self) -> None:
    """Ends the file."""
    self._writer.close()

"""The errors that a user is meant to read."""

import errno
import os

FULL_DISK = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT))


class UserError(Exception):
  """Bad input from outside: a missing file, a wrong key, a broken record.

  The message is one sentence that names the thing and the mend. Entry points print it without a
  traceback and exit with code 1.
  """


class Preempted(Exception):
  """The system has asked the run to stop (SIGTERM), and what it has done is saved.

  Entry points print the message and exit with `EXIT_PREEMPTED`.
  """


# 128 + SIGTERM, what a shell reports of a process that the signal ended.
EXIT_PREEMPTED = 143


def full_disk(error: BaseException | None) -> BaseException | None:
  """The error of a full disk (or an exceeded quota) among an exception and what led to it.

  Told by the system's sentence (`FULL_DISK`): libraries in C++ (ArrayRecord, TensorStore) raise
  errors of other classes with it in their text. Cleaning up on a full disk raises one error after
  the other, so the whole chain is looked at.
  """
  seen: set[int] = set()
  while error is not None and id(error) not in seen:
    if any(sentence in str(error) for sentence in FULL_DISK):
      return error
    seen.add(id(error))
    error = error.__cause__ or error.__context__
  return None

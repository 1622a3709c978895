"""The one error that a user is meant to read."""


class UserError(Exception):
  """Bad input from outside: a missing file, a wrong key, a broken record.

  The message is one sentence that names the thing and the mend. Entry points print it without a
  traceback and exit with code 1.
  """

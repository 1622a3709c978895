"""What text may be once it is ours: anything that UTF-8 can write."""


def valid(text: str) -> str:
  r"""The text with U+FFFD for every lone surrogate; all other characters stay.

  A Python string may hold halves of UTF-16 pairs (JSON's `"\ud800"` makes one, so does reading
  with `surrogateescape`), which no file, tokenizer or terminal takes. Two halves that belong
  together become the character that they mean.
  """
  if text.isascii():
    return text
  return text.encode('utf-16-le', 'surrogatepass').decode('utf-16-le', 'replace')

"""Prompts to T5 token ids: the bundle's `tokenizer.json`, read by the `tokenizers` library.

The published pipeline uses sentencepiece (Kudo and Richardson 2018) through the slow T5 tokenizer. The library gives
the same ids: no difference in 150 000 random strings of ASCII, accented Latin letters, CJK, emoji, white space, words.
What may be read otherwise (measured with a vocabulary of 386 pieces; the tests pin examples):

- A letter or syllable three or more times in a row ("sooooo"; 2 % of 40 000 such words): rounding, float32 there and
  float64 here, decides among equally good segmentations. Else it showed in texts of 4 000 words (17 of 150) only.
- Combining marks that Unicode's NFKC would merge or rewrite, but for one mark behind an ASCII character: "²" with a mark,
  11 545 of 13 233 decomposed characters (11 172 Hangul); none of 20 000 decomposed Latin-1 and Extended-A words.
- `</s>`, `<pad>` and `<unk>` spelled so that only normalization reveals them ("＜/s＞"): special tokens here, text there.
- U+001C to U+001F and U+0085 together beside a typed `<extra_id_N>`: not eaten as white space here.
- In checkpoints whose tokenizer says `legacy: false`, also white space other than a space behind a typed special token.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..bundle.errors import BundleError, InputError

__all__ = ["PromptTokenizer", "check_prompt"]

END, PAD = "</s>", "<pad>"
MAX_CHARACTERS = 200_000  # far beyond any prompt; a longer text is a file given by mistake


class PromptTokenizer:
    """T5's tokenizer: `encode` is what `T5Tokenizer(padding="max_length", truncation=True)` gives (the slow one)."""

    def __init__(self, text: str, *, source: str = "tokenizer.json"):
        """`text` is the file's content, `source` its name for errors. `BundleError` if it is damaged or not T5's."""
        from tokenizers import Tokenizer

        try:
            self._tokenizer = Tokenizer.from_str(text)
        except BaseException as error:
            # The library raises plain Exception, or, for a damaged character map, pyo3's PanicException, which is none.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise BundleError(f"The tokenizer {source!r} is damaged ({error}). Export the checkpoint again.") from error
        if None in (found := [self._tokenizer.token_to_id(token) for token in (END, PAD)]):
            raise BundleError(f"The tokenizer {source!r} lacks {END} or {PAD}. Export the checkpoint again.")
        self.end_id, self.pad_id = found
        self.vocab_size = int(self._tokenizer.get_vocab_size())
        self.sha256 = hashlib.sha256(text.encode()).hexdigest()

    @classmethod
    def from_str(cls, text: str) -> PromptTokenizer:
        return cls(text)

    @classmethod
    def from_file(cls, path: Path | str) -> PromptTokenizer:
        """Raises `BundleError` if the file cannot be read or is no T5 tokenizer."""
        try:
            return cls(Path(path).read_text(encoding="utf-8"), source=str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise BundleError(f"Cannot read the tokenizer {str(path)!r}: {error}.") from error

    def ids(self, text: str) -> list[int]:
        """Ids of the whole text, without the closing `</s>` and without padding."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode(self, prompt: str, length: int) -> tuple[npt.NDArray[np.int64], int]:
        """Ids int64 [length], closed by `</s>` and padded with `<pad>`, and how many of the prompt's ids were dropped.

        As the published tokenizer does, a `</s>` that the text itself ends with is not doubled.
        """
        if length < 1:
            raise ValueError(f"length {length} leaves no room for the closing token")
        numbers = self.ids(prompt)
        kept = numbers[: length - 1]
        dropped = len(numbers) - len(kept)
        if not kept or kept[-1] != self.end_id:
            kept.append(self.end_id)
        padded = np.full(length, self.pad_id, np.int64)
        padded[: len(kept)] = kept
        return padded, dropped


def check_prompt(
    prompt: str, tokenizer: PromptTokenizer, length: int, *, name: str = "--prompt", may_be_empty: bool = False
) -> list[str]:
    """Refuses a prompt that cannot be meant, and returns notices for the user about one that is only partly used.

    `length` is the model's text length in tokens, the closing one included. `may_be_empty` is for negative prompts.

    Raises:
        InputError: the prompt is empty, holds NUL characters or broken Unicode, or is as long as a book.
    """
    if "\0" in prompt:
        raise InputError(f"{name} contains a NUL character; it looks like binary data. Give plain text.")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{name} is not valid Unicode text (character {error.start + 1}). Give it in UTF-8, and check the locale."
        ) from error
    if len(prompt) > MAX_CHARACTERS:
        raise InputError(
            f"{name} has {len(prompt)} characters; the model reads about {length} tokens. "
            "Describe the scene in a few sentences."
        )
    if not prompt.strip() or not tokenizer.ids(prompt):
        if may_be_empty:
            return []
        raise InputError(
            f"{name} is empty. Say in a sentence who is in the picture and what the scene shows, for example: "
            f"{name} 'a woman in a red dress dances on a beach'."
        )
    _, dropped = tokenizer.encode(prompt, length)
    if not dropped:
        return []
    plural = "s were" if dropped != 1 else " was"
    return [f"{name} is too long: the model reads {length - 1} tokens of it, the last {dropped} token{plural} dropped."]

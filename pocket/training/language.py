"""The captions' language: a small sentencepiece vocabulary, and captions as token ids as the pipeline makes them."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import sentencepiece
from numpy.typing import NDArray

from ..exact import Stream
from ..wardrobe import MOTIONS, caption, draw_look, draw_place

__all__ = ["Language", "write_tokenizer"]

END, PAD = 1, 0


def write_tokenizer(folder: Path, most: int, captions: int = 4000) -> None:
    """Writes `spiece.model` and `tokenizer_config.json`: the captions' words, and letters for all others.

    The trainer of sentencepiece breaks the words of so small a language into scraps, so the pieces of its model are
    replaced: every word is a piece, with a score that no spelling in letters can reach. Capitals are read as small.
    Raises `ValueError` for more than `most` pieces.
    """
    from sentencepiece import sentencepiece_model_pb2

    folder.mkdir(parents=True, exist_ok=True)
    stream = Stream(0)
    lines = [caption(draw_look(stream), draw_place(stream), stream.choice(tuple(MOTIONS))) for _ in range(captions)]
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=buffer,
        vocab_size=most,
        hard_vocab_limit=False,
        normalization_rule_name="nmt_nfkc_cf",
        pad_id=PAD,
        eos_id=END,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(buffer.getvalue())
    del model.pieces[3:]  # padding, end and unknown stay
    words = sorted({"\u2581" + word.strip(",") for line in lines for word in line.split()})
    letters = ["\u2581", ",", ".", "-", "'", *"abcdefghijklmnopqrstuvwxyz"]
    for piece in [*words, *(letter for letter in letters if letter not in words)]:
        model.pieces.add(piece=piece, score=-5.0 if piece in words else -12.0)
    if len(model.pieces) > most:
        raise ValueError(f"{len(model.pieces)} pieces do not fit a vocabulary of {most}")
    model.trainer_spec.vocab_size = len(model.pieces)
    (folder / "spiece.model").write_bytes(model.SerializeToString(deterministic=True))
    config = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "legacy": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")


class Language:
    """Captions as rows of `length` ids: the pieces, the end, then padding, which the encoder sees as well."""

    def __init__(self, folder: Path, length: int) -> None:
        self.length = length
        self._processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))

    def ids(self, text: str) -> NDArray[np.int64]:
        """[length]; too long a text loses its end."""
        pieces = self._processor.encode(text)[: self.length - 1]
        return np.array([*pieces, END] + [PAD] * (self.length - 1 - len(pieces)), np.int64)

    def __len__(self) -> int:
        return int(self._processor.get_piece_size())

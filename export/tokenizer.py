"""A checkpoint's `tokenizer/` folder to one `tokenizer.json`, so that the runtime needs no sentencepiece.

The published pipeline tokenizes with sentencepiece through the slow T5 tokenizer, so `spiece.model` is the truth when
it is there; a `tokenizer.json` beside it is only held against it. What is written is an ordinary file of the
`tokenizers` library, always built from the same parts: pieces, character map, added tokens.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..bundle.errors import InputError, from_os_error

__all__ = ["convert_tokenizer"]

END, PAD, UNKNOWN = "</s>", "<pad>", "<unk>"
SENTINEL = re.compile(r"<extra_id_(\d+)>")
SENTINELS = 100  # T5's default for `extra_ids`
NORMAL, UNKNOWN_PIECE, CONTROL = 1, 2, 3  # sentencepiece piece types
UNIGRAM = 1  # sentencepiece model type

# Plain English behind a space: here all readings of one vocabulary agree, whatever the library and its settings.
SAMPLES = (
    " a woman in a red dress",
    " The person in the image is wearing a white, knee-length dress with short sleeves and a square neckline.",
    " A man dances on a sunny beach; the background shows golden sand and 3 tall palm trees.",
    " Two children jump, laugh and wave at the camera.",
)


@dataclass(frozen=True)
class AddedToken:
    """A string with an id of its own, cut out of a text before segmentation; `strip_*` also eats white space there."""

    content: str
    number: int
    strip_left: bool = False
    strip_right: bool = False
    special: bool = True


@dataclass(frozen=True)
class TokenizerParts:
    """All that a T5 tokenizer is. A piece's id is its place in `pieces`; scores are log probabilities."""

    pieces: tuple[tuple[str, float], ...]
    unknown_id: int
    character_map: bytes
    added: tuple[AddedToken, ...]
    prepend_scheme: str


def convert_tokenizer(folder: Path) -> str:
    """The text of `tokenizer.json` for the T5 tokenizer in `folder` (`spiece.model`, or else a `tokenizer.json`).

    Raises:
        InputError: no vocabulary file is there, one is damaged or not of the T5 kind, the token tables contradict each
            other, or `spiece.model` and `tokenizer.json` are different vocabularies. The file is named.
    """
    model_file, json_file = folder / "spiece.model", folder / "tokenizer.json"
    if not model_file.is_file() and not json_file.is_file():
        raise InputError(
            f"The tokenizer folder {str(folder)!r} has neither spiece.model nor tokenizer.json. "
            "Download the checkpoint's tokenizer folder completely."
        )
    config = _read_json(folder / "tokenizer_config.json", optional=True)
    _check_config(config, folder / "tokenizer_config.json")
    if not model_file.is_file():
        return str(_build(_parts_of_json(json_file, config), json_file).to_str())
    tokenizer = _build(_parts_of_sentencepiece(model_file, config), model_file)
    _compare_with_sentencepiece(tokenizer, model_file)
    if json_file.is_file():
        _compare_with_json(tokenizer, model_file, json_file)
    return str(tokenizer.to_str())


def _read_json(path: Path, *, optional: bool = False) -> dict[str, Any]:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        if optional:
            return {}
        raise from_os_error(error, "read", path) from error
    except OSError as error:
        raise from_os_error(error, "read", path) from error
    except ValueError as error:
        raise InputError(f"{str(path)!r} is not valid JSON ({error}). Download it again.") from error
    if not isinstance(table, dict):
        raise InputError(f"{str(path)!r} is not a JSON object. Download it again.")
    return table


def _check_config(config: Mapping[str, Any], path: Path) -> None:
    name = config.get("tokenizer_class", "T5Tokenizer")
    if name not in ("T5Tokenizer", "T5TokenizerFast"):
        raise InputError(f"{str(path)!r}: tokenizer_class is {name!r}; DynamiCtrl checkpoints use T5Tokenizer.")
    if config.get("sp_model_kwargs"):
        raise InputError(
            f"{str(path)!r}: sp_model_kwargs is {config['sp_model_kwargs']!r}; sentencepiece options are not supported."
        )
    if _prepend_scheme(config) == "first" and not config.get("add_prefix_space", True):
        raise InputError(f"{str(path)!r}: add_prefix_space is False; T5 tokenizers put a space in front.")
    for key, wanted in (("eos_token", END), ("pad_token", PAD), ("unk_token", UNKNOWN)):
        value = config.get(key, wanted)
        content = value.get("content") if isinstance(value, dict) else value
        if content != wanted:
            raise InputError(f"{str(path)!r}: {key} is {content!r}; T5 tokenizers have {wanted!r}.")


def _prepend_scheme(config: Mapping[str, Any]) -> str:
    """Where a space is put in front: before each stretch of text (`legacy`, T5's default), or only the first."""
    return "always" if config.get("legacy") in (None, True) else "first"


def _parts_of_sentencepiece(path: Path, config: Mapping[str, Any]) -> TokenizerParts:
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except OSError as error:
        raise from_os_error(error, "read", path) from error
    except DecodeError as error:
        raise InputError(f"{str(path)!r} is no sentencepiece model, or it is cut short. Download it again.") from error
    _check_model(proto, path)
    pieces = tuple((p.piece, p.score) for p in proto.pieces)
    return TokenizerParts(
        pieces=pieces,
        unknown_id=proto.trainer_spec.unk_id,
        character_map=proto.normalizer_spec.precompiled_charsmap,
        added=_added_tokens({piece: i for i, (piece, _) in enumerate(pieces)}, config, path),
        prepend_scheme=_prepend_scheme(config),
    )


def _check_model(proto: Any, path: Path) -> None:
    """Refuses sentencepiece features that T5's model does not use and `_build` does not write."""
    trainer, rules = proto.trainer_spec, proto.normalizer_spec
    expected = {
        "model_type": (trainer.model_type, UNIGRAM),
        "byte_fallback": (trainer.byte_fallback, False),
        "treat_whitespace_as_suffix": (trainer.treat_whitespace_as_suffix, False),
        "add_dummy_prefix": (rules.add_dummy_prefix, True),
        "remove_extra_whitespaces": (rules.remove_extra_whitespaces, True),
        "escape_whitespaces": (rules.escape_whitespaces, True),
    }
    for name, (value, wanted) in expected.items():
        if value != wanted:
            raise InputError(f"{str(path)!r}: {name} is {value}; T5's sentencepiece models have {wanted}.")
    if not proto.pieces:
        raise InputError(f"{str(path)!r} is not a sentencepiece model, or it is cut short: it has no pieces.")
    for i, piece in enumerate(proto.pieces):
        if piece.type not in (NORMAL, UNKNOWN_PIECE, CONTROL):
            raise InputError(f"{str(path)!r}: piece {piece.piece!r} has type {piece.type}, unknown to T5's models.")
        if (piece.type == UNKNOWN_PIECE) != (i == trainer.unk_id):
            raise InputError(f"{str(path)!r}: piece {piece.piece!r} contradicts unk_id {trainer.unk_id}.")
        if (piece.type != NORMAL) != (piece.piece in (END, PAD, UNKNOWN)):
            raise InputError(f"{str(path)!r}: piece {piece.piece!r} has type {piece.type}, unlike in T5's models.")


def _parts_of_json(path: Path, config: Mapping[str, Any]) -> TokenizerParts:
    table = _read_json(path)
    try:
        model = table["model"]
        if model["type"] != "Unigram" or model.get("byte_fallback"):
            raise ValueError(f"its model is {model['type']}, T5 has Unigram without byte fallback")
        scheme = table["pre_tokenizer"]["prepend_scheme"]
        vocabulary = [(str(piece), float(score)) for piece, score in model["vocab"]]
        # transformers' converter lists the sentinels as pieces; they are added tokens that no text may segment into.
        pieces = tuple(entry for entry in vocabulary if not SENTINEL.fullmatch(entry[0]))
        if tuple(vocabulary[: len(pieces)]) != pieces:
            raise ValueError("an <extra_id> token stands between ordinary pieces")
        steps = (table.get("normalizer") or {}).get("normalizers", [table.get("normalizer") or {}])
        blobs = [step["precompiled_charsmap"] for step in steps if step.get("type") == "Precompiled"]
        listed = {str(token["id"]): token for token in table["added_tokens"]}
        settings = {"extra_ids": len(vocabulary) - len(pieces), **config}
        settings["added_tokens_decoder"] = listed | dict(config.get("added_tokens_decoder") or {})
        return TokenizerParts(
            pieces=pieces,
            unknown_id=int(model["unk_id"]),
            character_map=base64.b64decode(blobs[0] or "", validate=True) if blobs else b"",
            added=_added_tokens({piece: i for i, (piece, _) in enumerate(pieces)}, settings, path),
            prepend_scheme=str(scheme),
        )
    except (KeyError, TypeError, ValueError, AttributeError, binascii.Error) as error:
        raise InputError(
            f"{str(path)!r} is damaged or no T5 tokenizer ({type(error).__name__}: {error}). "
            "Give the checkpoint's spiece.model instead."
        ) from error


def _added_tokens(pieces: Mapping[str, int], config: Mapping[str, Any], path: Path) -> tuple[AddedToken, ...]:
    """`</s>`, `<pad>`, `<unk>`, the sentinels as T5 numbers them (backwards, after the pieces), the config's table.

    A sentinel takes the white space around it along, unless that table says otherwise.
    """
    for content in (END, PAD, UNKNOWN):
        if content not in pieces:
            raise InputError(f"{str(path)!r} has no piece {content!r}, so it is not T5's vocabulary.")
    tokens = {content: AddedToken(content, pieces[content]) for content in (PAD, END, UNKNOWN)}
    count = config.get("extra_ids", SENTINELS)
    if not isinstance(count, int) or not 0 <= count <= 10_000:
        raise InputError(f"The tokenizer's extra_ids is {count!r}; T5 has {SENTINELS}.")
    for i in range(count):
        content = f"<extra_id_{i}>"
        tokens[content] = AddedToken(content, len(pieces) + count - 1 - i, strip_left=True, strip_right=True)
    try:
        for number, entry in (config.get("added_tokens_decoder") or {}).items():
            token = AddedToken(
                entry["content"], int(number), bool(entry["lstrip"]), bool(entry["rstrip"]), bool(entry["special"])
            )
            if entry["single_word"] or not token.content:
                raise InputError(f"The added token {token.content!r} is empty or single_word, which T5 does not use.")
            tokens[token.content] = token
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"The table of added tokens beside {str(path)!r} is damaged: {error!r}.") from error
    return tuple(sorted(tokens.values(), key=lambda token: token.number))


def _build(parts: TokenizerParts, path: Path) -> Any:
    """The `tokenizers.Tokenizer` made of `parts`; `InputError` names `path` if they do not fit together."""
    from tokenizers import AddedToken as LibraryToken
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    if not all(math.isfinite(score) for _, score in parts.pieces):
        raise InputError(f"{str(path)!r} has a piece whose score is not a number. Download it again.")
    try:
        tokenizer = Tokenizer(models.Unigram(list(parts.pieces), parts.unknown_id, byte_fallback=False))
        # Spaces only, for sentencepiece keeps what else counts as white space (U+0085).
        steps: list[Any] = [normalizers.Replace(Regex(r" +\z"), ""), normalizers.Replace(Regex(" {2,}"), "▁")]
        if parts.character_map:
            steps.insert(0, normalizers.Precompiled(parts.character_map))
        tokenizer.normalizer = normalizers.Sequence(steps)
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=parts.prepend_scheme)
        tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme=parts.prepend_scheme)
    except Exception as error:  # the library raises plain Exception
        raise InputError(f"{str(path)!r} cannot be made into a tokenizer: {error}. Download it again.") from error
    for token in parts.added:
        tokenizer.add_tokens(
            [
                LibraryToken(
                    token.content,
                    lstrip=token.strip_left,
                    rstrip=token.strip_right,
                    normalized=False,
                    special=token.special,
                )
            ]
        )
        # The library numbers by itself: the next free id, or the piece's.
        if (got := tokenizer.token_to_id(token.content)) != token.number:
            raise InputError(
                f"The added token {token.content!r} beside {str(path)!r} has id {token.number}, where {got} is the "
                "next free one: the tokenizer's files do not belong together. Download the tokenizer folder again."
            )
    end = tokenizer.token_to_id(END)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=["$A", END], pair=["$A", END, "$B", END], special_tokens=[(END, end)]
    )
    return tokenizer


def _compare_with_sentencepiece(tokenizer: Any, path: Path) -> None:
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    for text in SAMPLES:
        if tokenizer.encode(text, add_special_tokens=False).ids != processor.encode(text):
            raise InputError(f"{str(path)!r}: converted, it reads {text!r} otherwise than in sentencepiece.")


def _compare_with_json(tokenizer: Any, model_file: Path, json_file: Path) -> None:
    from tokenizers import Tokenizer

    table = _read_json(json_file)
    try:
        other = Tokenizer.from_str(json.dumps(table))
    except BaseException as error:
        # The library raises plain Exception, or, for a damaged character map, pyo3's PanicException, which is none.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise InputError(f"{str(json_file)!r} is damaged ({error}). Download it again, or remove it.") from error
    for text in SAMPLES:
        if other.encode(text, add_special_tokens=False).ids != tokenizer.encode(text, add_special_tokens=False).ids:
            raise InputError(
                f"{str(json_file)!r} and {str(model_file)!r} are different vocabularies (they number {text!r} "
                "differently). Download the tokenizer folder again, or remove the file that does not belong to it."
            )

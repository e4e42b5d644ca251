"""Prompts to embeddings: T5's encoder, one layer's weights at a time (Raffel et al. 2020, the v1.1 layout).

Embedding rows, the relative position bias and the final norm are computed here in float32; the layers run through the
graph `text_block`, once per layer. There is no attention mask: as in the published pipeline, pad tokens take part.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from ..bundle.errors import BundleError
from ..bundle.precision import widen
from ..bundle.store import Bundle
from .backends.base import Backend
from .prompt_cache import PromptCache
from .tokenizer import PromptTokenizer, check_prompt

__all__ = ["TextEncoder", "TextStage", "relative_position_bias"]

Floats = npt.NDArray[np.float32]
GraphCall = Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]

GROUP = 2  # prompts per graph call: the negative and the positive one


def relative_position_bias(table: np.ndarray, length: int, max_distance: int = 128) -> Floats:
    """What is added to the scores of query i and key j, by their distance: float32 [1, heads, length, length].

    `table` [buckets, heads] is layer 0's. Half of the buckets are for keys after the query; of each half, half count
    small distances singly, the others grow with the logarithm up to `max_distance`.
    """
    one_side = len(table) // 2
    singles = one_side // 2
    offset = np.arange(length)[None, :] - np.arange(length)[:, None]  # key - query
    distance = np.abs(offset)
    # float32 as in the published implementation: a distance on a bucket's edge is decided by rounding.
    ratio = np.maximum(distance, 1).astype(np.float32) / np.float32(singles)
    steps = np.log(ratio) / np.float32(math.log(max_distance / singles)) * np.float32(one_side - singles)
    far = np.minimum(singles + steps.astype(np.int64), one_side - 1)
    bucket = np.where(distance < singles, distance, far) + one_side * (offset > 0)
    return np.ascontiguousarray(widen(table)[bucket].transpose(2, 0, 1)[None])


class TextEncoder:
    """T5's encoder over mapped weights. Arrays may be float32, float16 or raw bfloat16 (uint16)."""

    def __init__(
        self,
        tokenizer: PromptTokenizer,
        embedding: np.ndarray,
        position_table: np.ndarray,
        final_norm_weight: np.ndarray,
        layers: Iterable[Mapping[str, np.ndarray]],
        graph: GraphCall,
        *,
        length: int,
        max_distance: int = 128,
        eps: float = 1e-6,
    ):
        """
        Args:
            tokenizer: makes the ids.
            embedding: [vocab, Dt]; only the rows of the prompt's tokens are read.
            position_table: [buckets, heads] of layer 0.
            final_norm_weight: [Dt].
            layers: per layer the weight inputs of `graph` by name. It is iterated once per `encode` call, and an item
                is not used any more when the next is asked for: a generator-like provider may drop it then.
            graph: `text_block`, from feeds by input name to outputs by name.
            length: tokens per prompt, padding included.
            max_distance, eps: of the checkpoint's configuration.

        Raises:
            BundleError: the tokenizer knows more tokens than the embedding has rows.
        """
        if tokenizer.vocab_size > len(embedding):
            raise BundleError(
                f"The bundle's tokenizer has {tokenizer.vocab_size} tokens, its text encoder {len(embedding)}: they do "
                "not belong together. Export the checkpoint again."
            )
        self._tokenizer, self._embedding, self._layers, self._graph = tokenizer, embedding, layers, graph
        self._final_weight, self._eps = widen(final_norm_weight), np.float32(eps)
        self._bias = relative_position_bias(position_table, length, max_distance)
        self.length = length

    def encode(self, prompts: Sequence[str], *, check: Callable[[], None] | None = None) -> Floats:
        """float32 [B, length, Dt] for B prompts. `check` is called before each layer and may raise to stop the work.

        Raises:
            BundleError: the result is not finite: the weights overflow in the bundle's precision.
        """
        ids = np.stack([self._tokenizer.encode(prompt, self.length)[0] for prompt in prompts])
        hidden = widen(self._embedding[ids])  # [B, S, Dt]
        groups = [np.ascontiguousarray(hidden[i : i + GROUP]) for i in range(0, len(prompts), GROUP)]
        for weights in self._layers:
            for i, group in enumerate(groups):
                if check is not None:
                    check()
                feeds = {"hidden": group, "position_bias": self._bias, **weights}
                groups[i] = self._graph(feeds)["hidden_out"]
        return self._normed(np.concatenate(groups))

    def _normed(self, hidden: Floats) -> Floats:
        with np.errstate(over="ignore", invalid="ignore"):  # reported below, in words
            scale = 1 / np.sqrt(np.mean(hidden * hidden, axis=-1, keepdims=True, dtype=np.float32) + self._eps)
            embeds: Floats = (hidden * scale * self._final_weight).astype(np.float32, copy=False)
        if not np.isfinite(embeds).all():
            raise BundleError(
                "The text encoder's result is not finite: its weights overflow in this bundle's precision. "
                "Export the checkpoint with --precision bf16 or fp32."
            )
        return embeds


class TextStage:
    """The text part of a bundle: checks prompts, asks the cache, and loads the encoder only if something is missing."""

    def __init__(self, bundle: Bundle, backend: Backend, *, cache: bool = True):
        """Raises `BundleError` if the tokenizer is missing or damaged. `cache`: keep embeddings on disk."""
        self._bundle, self._backend = bundle, backend
        self._tokenizer = PromptTokenizer.from_file(bundle.path("tokenizer.json"))
        self._cache = PromptCache.default() if cache else PromptCache(None)
        self.length = bundle.manifest.transformer.max_text_seq_length

    def encode(self, prompts: Sequence[str], *, check: Callable[[], None] | None = None) -> tuple[Floats, list[str]]:
        """Embeddings float32 [B, length, Dt] and notices for the user. `prompts` is [negative, prompt] or [prompt].

        Raises:
            InputError: a prompt is empty (the negative one may be) or no text.
            BundleError: the encoder's files are missing or changed.
        """
        notices: list[str] = []
        for i, prompt in enumerate(prompts):
            last = i == len(prompts) - 1
            name = "--prompt" if last else "--negative-prompt"
            notices += check_prompt(prompt, self._tokenizer, self.length, name=name, may_be_empty=not last)

        def encode(missing: Sequence[str]) -> Floats:
            return self._encoder().encode(missing, check=check)

        return self._cache.embeddings(prompts, encode, length=self.length, identity=self._identity()), notices

    def _identity(self) -> str:
        """Changes whenever other numbers could come out: tokenizer, weights and graph."""
        files = self._bundle.manifest.files
        graph = self._bundle.manifest.graphs["text_block"].file
        parts = (self._tokenizer.sha256, self._bundle.weights_digest("text"), files[graph].sha256)
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def _encoder(self) -> TextEncoder:
        config = self._bundle.manifest.text
        if config is None:
            raise BundleError(f"The bundle {str(self._bundle.root)!r} was exported without its text encoder.")
        shared = self._bundle.tensors("text")
        return TextEncoder(
            self._tokenizer,
            shared["embedding"],
            shared["relative_attention_bias"],
            shared["final_norm_weight"],
            _Layers(self._bundle, config.num_layers),
            self._backend.graph("text_block"),
            length=self.length,
            max_distance=config.relative_attention_max_distance,
            eps=config.layer_norm_epsilon,
        )


class _Layers(Iterable[Mapping[str, np.ndarray]]):
    """The layers' weight files, one mapped at a time."""

    def __init__(self, bundle: Bundle, count: int):
        self._bundle, self._count = bundle, count

    def __iter__(self) -> Iterator[Mapping[str, np.ndarray]]:
        for i in range(self._count):
            weights = self._bundle.tensors(f"text_block_{i:02d}")
            yield weights
            weights.release()

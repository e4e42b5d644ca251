"""What the parts of a model weigh on a GPU, in bytes: weights and the state of the VAE's convolutions.

All of it follows from the configuration, so that memory can be planned for a bundle that does not exist yet (int8, for
example). For a bundle that does, the sizes of its weight files are taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from ..bundle.config import TextConfig, TransformerConfig, VaeConfig
from ..bundle.errors import UsageError
from ..bundle.manifest import Manifest

__all__ = ["PRECISIONS", "QUANTIZED", "ModelFacts", "facts_of", "model_facts"]

FLOAT = 4
_BASES = {"fp32": 4, "bf16": 2, "fp16": 2}
QUANTIZED = ("int8", "fp8", "int8-weights")
PRECISIONS = (*_BASES, *QUANTIZED)
_USUAL_BASE = "bf16"  # CogVideoX-5B's own format


@dataclass(frozen=True)
class ModelFacts:
    """A model in one precision.

    `base` is the number format of what is not quantized: norms, attention, text encoder, VAE. Sizes in bytes: `block`,
    `modulation` and `text_block` of one block each, `shared` of the denoiser's other weights, `encoder` and `decoder` of the
    VAE's halves; `encoder_state` and `decoder_state` are what the VAE's convolutions hand from one time chunk to the next, per
    latent (a position of the tile, all its channels).
    """

    transformer: TransformerConfig
    vae: VaeConfig
    text: TextConfig | None
    precision: str
    base: str
    block: int
    modulation: int
    shared: int
    text_block: int
    encoder: int
    decoder: int
    encoder_state: int
    decoder_state: int

    @property
    def element(self) -> int:
        """Bytes of a number in matrix products that are not quantized."""
        return _BASES[self.base]

    @property
    def stream(self) -> int:
        """Bytes of a number in the streams between blocks: float32, except for bf16 (see `export.transformer.Formats`)."""
        return 2 if self.base == "bf16" else FLOAT

    @property
    def quantized(self) -> bool:
        return self.precision in QUANTIZED

    def convert(self, precision: str) -> ModelFacts:
        """The same model in another precision."""
        return model_facts(self.transformer, self.vae, self.text, precision, self.base)


def model_facts(
    transformer: TransformerConfig, vae: VaeConfig, text: TextConfig | None, precision: str, base: str | None = None
) -> ModelFacts:
    """Facts from configurations alone.

    `precision`: fp32, bf16, fp16, int8, fp8 or int8-weights. The last three quantize the transformer's blocks; text encoder and
    VAE are counted in `base`, which is bf16 where it is not given.

    Raises:
        UsageError: an unknown precision; the text lists them.
    """
    if precision not in PRECISIONS:
        raise UsageError(f"There is no precision {precision!r} to plan for. Precisions: {', '.join(PRECISIONS)}.")
    base = precision if precision in _BASES else base or _USUAL_BASE
    element = _BASES[base]
    encoder, decoder = list(_encoder(vae)), list(_decoder(vae))
    return ModelFacts(
        transformer=transformer,
        vae=vae,
        text=text,
        precision=precision,
        base=base,
        block=_block(transformer, precision, element),
        modulation=element * _modulation(transformer),
        shared=element * _shared(transformer),
        text_block=0 if text is None else _text_block(text, element),
        encoder=element * sum(layer.weights for layer in encoder),
        decoder=element * sum(layer.weights for layer in decoder),
        encoder_state=_state(vae, encoder, element),
        decoder_state=_state(vae, decoder, element),
    )


def facts_of(manifest: Manifest, precision: str | None = None) -> ModelFacts:
    """Facts of a bundle, with the sizes of its weight files; or of what it would be in another `precision`."""
    wanted = precision or manifest.label
    facts = model_facts(manifest.transformer, manifest.vae, manifest.text, wanted, manifest.precision)
    if wanted != manifest.label:
        return facts

    def largest(prefix: str, otherwise: int) -> int:
        names = [name for name in manifest.files if name.startswith(f"weights/{prefix}")]
        return max((manifest.files[name].bytes for name in names), default=otherwise)

    return replace(
        facts,
        block=largest("block_", facts.block),
        modulation=largest("modulation_", facts.modulation),
        shared=largest("denoiser.", facts.shared),
        text_block=largest("text_block_", facts.text_block),
        encoder=largest("vae_encoder.", facts.encoder),
        decoder=largest("vae_decoder.", facts.decoder),
    )


def _block(config: TransformerConfig, precision: str, element: int) -> int:
    """Query, key and value, output, and the two feed-forward matrices of widths 3, 1, 4 and 4 D, with their biases."""
    d = config.width
    matrices, vectors = 12 * d * d, 9 * d + 4 * config.attention_head_dim
    if precision not in QUANTIZED:
        return element * (matrices + vectors)
    scales = 9 * d if precision == "int8-weights" else 14 * d  # of outputs; of two inputs too
    return matrices + element * (vectors + scales)


def _modulation(config: TransformerConfig) -> int:
    """The projections of three adaptive norms to 6, 6 and 3 rows, and their affines."""
    d, e = config.width, config.time_embed_dim
    return 15 * d * (e + 1) + 6 * d


def _shared(config: TransformerConfig) -> int:
    d, e, k = config.width, config.time_embed_dim, config.patch_elements
    time = d * e + e + e * e + e
    if config.ofs_embed_dim is not None:
        time += 2 * (config.ofs_embed_dim + 1) * config.ofs_embed_dim
    embed = (config.text_embed_dim + 1) * d + 3 * k * d + d
    head = 2 * d * (e + 1) + 4 * d + (d + 1) * k
    position = 0
    if config.use_learned_positional_embeddings:
        frames = (config.sample_frames - 1) // config.temporal_compression_ratio + 1
        grid = config.token_grid(frames, config.sample_height, config.sample_width)
        position = (config.max_text_seq_length + grid[0] * grid[1] * grid[2]) * d
    return time + embed + head + position


def _text_block(config: TextConfig, element: int) -> int:
    """Its two norms stay float32."""
    return element * config.d_model * (4 * config.inner + 3 * config.d_ff) + 2 * FLOAT * config.d_model


class _Layer(NamedTuple):
    """`weights` counts numbers. `looks_back`: channels whose last two frames the next time chunk needs. `halvings`: its maps
    have the pixels' resolution, halved so often."""

    weights: int
    looks_back: int
    halvings: int


def _convolution(inputs: int, outputs: int, halvings: int) -> _Layer:
    """3 x 3 x 3, causal in time."""
    return _Layer(27 * inputs * outputs + outputs, inputs, halvings)


def _plain(weights: int) -> _Layer:
    return _Layer(weights, 0, 0)


def _resnet(inputs: int, outputs: int, halvings: int, guide: int) -> Iterator[_Layer]:
    """Two norms and convolutions, and a projection where the width changes. `guide`: channels that the norms look at."""
    for width, after in ((inputs, outputs), (outputs, outputs)):
        yield _norm(width, guide)
        yield _convolution(width, after, halvings)
    if inputs != outputs:
        yield _plain((inputs + 1) * outputs)


def _norm(width: int, guide: int) -> _Layer:
    """An affine; the decoder's norms also have a scale and a shift that are made of the latents."""
    return _plain(2 * width + (2 * (guide + 1) * width if guide else 0))


def _encoder(vae: VaeConfig) -> Iterator[_Layer]:
    widths = vae.block_out_channels
    yield _convolution(vae.in_channels, widths[0], 0)
    before = widths[0]
    for level, width in enumerate(widths):
        for _ in range(vae.layers_per_block):
            yield from _resnet(before, width, level, 0)
            before = width
        if level < len(widths) - 1:
            yield _plain((9 * width + 1) * width)  # halves rows and columns
    last = len(widths) - 1
    for _ in range(2):
        yield from _resnet(before, before, last, 0)
    yield _norm(before, 0)
    yield _convolution(before, 2 * vae.latent_channels, last)


def _decoder(vae: VaeConfig) -> Iterator[_Layer]:
    widths, guide = vae.block_out_channels[::-1], vae.latent_channels
    last = len(widths) - 1
    yield _convolution(guide, widths[0], last)
    before = widths[0]
    for _ in range(2):
        yield from _resnet(before, before, last, guide)
    for level, width in zip(range(last, -1, -1), widths, strict=True):
        for _ in range(vae.layers_per_block + 1):
            yield from _resnet(before, width, level, guide)
            before = width
        if level > 0:
            yield _plain((9 * width + 1) * width)  # doubles rows and columns
    yield _norm(before, guide)
    yield _convolution(before, vae.out_channels, 0)


def _state(vae: VaeConfig, layers: list[_Layer], element: int) -> int:
    pixels = vae.spatial_compression**2
    return 2 * element * sum(layer.looks_back * pixels // 4**layer.halvings for layer in layers)

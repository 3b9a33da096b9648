"""Model: trained encoders, ready to encode images, texts and sounds into the shared space.

Legend: n = images or sounds, m = texts, S = samples of a sound, D = width of the shared space.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F

from pretrain.data import BadSample
from pretrain.errors import UserError
from pretrain.model import DualEncoder, set_performance
from pretrain.runtime.performance import PerformanceConfig, process_settings
from pretrain.strategies import DTYPES

from .images import ImageLike, as_list, to_bytes
from .sounds import SoundLike, as_sounds, to_sound_bytes

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from finetune.explain.word_maps import WordMaps

PROGRESS_FROM = 2000
"""Items from which on a progress bar is shown, unless the caller says otherwise."""
_THREADS = 4
"""Threads that decode images while the model encodes: decoders release Python's lock."""


def similarity(images: Any, texts: Any) -> NDArray[np.float32]:
    """Return the cosines (n, m) of image embeddings (n, D) and text embeddings (m, D), or of any two sets of embeddings.

    Raises UserError where their shapes do not fit.
    """
    rows, columns = (np.asarray(vectors, dtype=np.float32) for vectors in (images, texts))
    if rows.ndim != 2 or columns.ndim != 2 or rows.shape[1] != columns.shape[1]:
        raise UserError(f"similarity needs embeddings (n, D) and (m, D) of one width, not {rows.shape} and {columns.shape}")
    norms = (np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12) for vectors in (rows, columns))
    row_norms, column_norms = norms
    cosines: NDArray[np.float32] = (rows / row_norms) @ (columns / column_norms).T
    return cosines


class Encoding:
    """What all kinds of models share: batches, progress, and errors that name the item. Subclasses encode one batch."""

    source: str
    """The run, folder or name the model was loaded from."""
    dim: int
    """D, the width of the shared space."""

    def encode_images(
        self, images: Iterable[ImageLike] | ImageLike, batch_size: int = 64, progress: bool | None = None
    ) -> NDArray[np.float32]:
        """Encode images into the shared space.

        Args:
            images: paths, PIL images, uint8 arrays (H, W, 3), bytes of image files, in any mixture; or one of these.
            batch_size: images encoded at a time.
            progress: show a progress bar; None = for 2,000 images or more.

        Returns:
            (n, D) float32, each row of unit length.

        Raises:
            UserError: an image cannot be read; the message gives its position.
        """
        items = as_list(images, "images")
        with ThreadPoolExecutor(_THREADS) as pool:
            return self._run_batches(
                items,
                batch_size,
                progress,
                "images",
                lambda batch, start: self._encode_images(self._decode(pool, batch, start)),
            )

    def encode_texts(
        self, texts: Iterable[str] | str, batch_size: int = 256, progress: bool | None = None
    ) -> NDArray[np.float32]:
        """Encode texts into the shared space; what is longer than the text tower's length is cut.

        Args:
            texts: strings, or one string.
            batch_size: texts encoded at a time.
            progress: show a progress bar; None = for 2,000 texts or more.

        Returns:
            (m, D) float32, each row of unit length.

        Raises:
            UserError: an item is not a string; the message gives its position.
        """
        items = as_list(texts, "texts")
        for position, text in enumerate(items):
            if not isinstance(text, str):
                raise UserError(f"texts[{position}] is {type(text).__name__}, not a string")
        return self._run_batches(items, batch_size, progress, "texts", lambda batch, start: self._encode_texts(list(batch)))

    def encode_audio(
        self, audio: Iterable[SoundLike] | SoundLike, batch_size: int = 64, progress: bool | None = None
    ) -> NDArray[np.float32]:
        """Encode sounds into the shared space; of what is longer than the audio tower's input, the center.

        Args:
            audio: paths, bytes of sound files (WAV, FLAC, Ogg, MP3), pairs (array, rate) of (S,) or (S, channels) floats in
                [-1, 1] or int16, in any mixture; or one of these.
            batch_size: sounds encoded at a time.
            progress: show a progress bar; None = for 2,000 sounds or more.

        Returns:
            (n, D) float32, each row of unit length.

        Raises:
            UserError: the model has no audio tower, or a sound cannot be read; the message gives its position.
        """

        def encode(batch: Sequence[SoundLike], start: int) -> Tensor:
            positions = range(start, start + len(batch))
            return self._encode_audio(torch.stack(list(pool.map(self._read_sound, batch, positions))))

        with ThreadPoolExecutor(_THREADS) as pool:
            return self._run_batches(as_sounds(audio), batch_size, progress, "sounds", encode)

    def similarity(self, images: Any, texts: Any) -> NDArray[np.float32]:
        """Return the cosines (n, m) of embeddings (n, D) and (m, D). Raises UserError where their shapes do not fit."""
        return similarity(images, texts)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Answer, match, classify or caption: of fine-tuned runs alone, see FinetunedModel. Raises UserError."""
        raise UserError(self._explain_encoders("predict"))

    def attend(self, *args: Any, **kwargs: Any) -> Any:
        """Map what each word attends to: of runs, see FinetunedModel and Model. Raises UserError."""
        raise UserError(self._explain_encoders("attend"))

    def _explain_encoders(self, method: str) -> str:
        return (
            f"{self.source} holds encoders alone: it can encode_images and encode_texts, but not {method}; "
            "load a fine-tuned run, as `clipfuse finetune vqa init=RUN` makes one"
        )

    # -----------------------------------------------------------------------------------------------------------------
    # One batch

    def _decode_image(self, data: bytes) -> Tensor:
        """Decode one image file to (3, S, S) uint8. Raises BadSample."""
        raise NotImplementedError

    def _encode_images(self, pixels: Tensor) -> Tensor:
        """Encode (b, 3, S, S) uint8 to (b, D)."""
        raise NotImplementedError

    def _encode_texts(self, texts: list[str]) -> Tensor:
        """Encode texts to (b, D)."""
        raise NotImplementedError

    def _decode_audio(self, data: bytes) -> Tensor:
        """Decode one sound file to (S,) int16. Raises BadSample, and UserError where the model has no audio tower."""
        raise UserError(f"{self.source} has no audio tower")

    def _encode_audio(self, waveforms: Tensor) -> Tensor:
        """Encode (b, S) int16 to (b, D)."""
        raise NotImplementedError

    # -----------------------------------------------------------------------------------------------------------------
    # Many batches

    def _decode(self, pool: ThreadPoolExecutor, batch: Sequence[ImageLike], start: int) -> Tensor:
        return torch.stack(list(pool.map(self._read_image, batch, range(start, start + len(batch)))))

    def _read_image(self, image: ImageLike, position: int) -> Tensor:
        name = f"images[{position}]"
        try:
            return self._decode_image(to_bytes(image, name))
        except BadSample as error:
            where = f" ({image})" if not isinstance(image, bytes | bytearray | memoryview | np.ndarray) else ""
            raise UserError(f"{name}{where} is not a usable image: {error}") from error

    def _read_sound(self, sound: SoundLike, position: int) -> Tensor:
        name = f"audio[{position}]"
        try:
            return self._decode_audio(to_sound_bytes(sound, name))
        except BadSample as error:
            where = f" ({sound})" if not isinstance(sound, bytes | bytearray | memoryview | tuple | list) else ""
            raise UserError(f"{name}{where} is not a usable sound: {error}") from error

    def _run_batches(
        self,
        items: Sequence[Any],
        batch_size: int,
        progress: bool | None,
        name: str,
        encode: Callable[[Sequence[Any], int], Tensor],
    ) -> NDArray[np.float32]:
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size} must be at least 1")
        starts: Iterable[int] = range(0, len(items), batch_size)
        if progress if progress is not None else len(items) >= PROGRESS_FROM:
            starts = track(starts, description=f"encoding {len(items):,} {name}", transient=True)
        rows = [encode(items[start : start + batch_size], start) for start in starts]
        if not rows:
            return np.zeros((0, self.dim), dtype=np.float32)
        embeddings: NDArray[np.float32] = torch.cat(rows).numpy()
        return embeddings


class Model(Encoding):
    """A trained pair of encoders. Made by `clipfuse.load`."""

    def __init__(
        self,
        encoder: DualEncoder,
        decoders: dict[str, Any],
        source: str,
        device: torch.device,
        precision: str = "fp32",
        performance: PerformanceConfig | None = None,
    ) -> None:
        """decoders: by modality, for evaluation. precision: of the towers' matrix products, fp32, bf16 or fp16.

        performance: how GPUs compute; None = the defaults. Flags of torch have their former values after each call.
        """
        if precision not in DTYPES:
            raise UserError(f"precision={precision!r} must be one of {', '.join(DTYPES)}")
        self._performance = performance or PerformanceConfig()
        set_performance(encoder, self._performance, device)
        self.encoder = encoder.to(device).eval()
        self.source, self.device, self.precision = source, device, precision
        self._decoders = decoders
        self.dim = _measure_dim(encoder)

    def __repr__(self) -> str:
        return f"<clipfuse {type(self).__name__} of {self.source}: {self.dim} numbers an embedding, on {self.device}>"

    @property
    def logit_scale(self) -> float:
        """What cosines are multiplied by before a softmax: `softmax(logit_scale * cosines)`."""
        return float(self.encoder.logit_scale.detach().exp())

    def attend(
        self,
        image: ImageLike,
        text: str,
        out: str | Path | None = None,
        method: str = "raw",
        layer: int | None = None,
    ) -> WordMaps:
        """Return how similar each word of a text is to each region of an image or a sound, with method="similarity".

        See FinetunedModel.attend, which has all methods. Encoders alone have no attention between words and images, and only
        those that pool the mean of their tokens have similarity maps. `answers` is the cosine.

        Raises:
            UserError: another method, or the image, the text or the towers cannot be used.
        """
        from finetune.explain import word_maps

        word_maps.check_method(method, layer)
        if method != word_maps.SIMILARITY:
            raise UserError(f'{self._explain_encoders("attend")}, or give method="{word_maps.SIMILARITY}"')
        data = to_bytes(image, "image") if "image" in self._decoders else to_sound_bytes(image, "audio")
        with self._settings():
            maps = word_maps.compute_encoder_maps(self.encoder, self._decoders, data, text)
        save_maps(maps, out)
        return maps

    def _decoder(self, modality: str) -> Any:
        if self._decoders.get(modality) is None:
            raise UserError(f"{self.source} has no {modality} tower; it encodes {', '.join(self._decoders)}")
        return self._decoders[modality]

    def _decode_image(self, data: bytes) -> Tensor:
        pixels: Tensor = self._decoder("image").decode_eval(data)
        return pixels

    @torch.inference_mode()
    def _encode_images(self, pixels: Tensor) -> Tensor:
        with self._settings(), self._autocast():
            return to_rows(self.encoder.encode("image", pixels.to(self.device)))

    @torch.inference_mode()
    def _encode_texts(self, texts: list[str]) -> Tensor:
        ids, mask = self._decoder("text").encode(texts)
        with self._settings(), self._autocast():
            return to_rows(self.encoder.encode("text", ids.to(self.device), mask.to(self.device)))

    def _decode_audio(self, data: bytes) -> Tensor:
        waveform: Tensor = self._decoder("audio").decode_eval(data)
        return waveform

    @torch.inference_mode()
    def _encode_audio(self, waveforms: Tensor) -> Tensor:
        with self._settings(), self._autocast():
            return to_rows(self.encoder.encode("audio", waveforms.to(self.device)))

    def _settings(self) -> AbstractContextManager[None]:
        """Return the context in which the `performance` settings of the model are in force."""
        return process_settings(self._performance)

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, DTYPES[self.precision])


def save_maps(maps: WordMaps, out: str | Path | None) -> None:
    """Write the figure of word maps, where a file is named. Raises UserError where it cannot be written."""
    if out is not None:
        try:
            maps.figure().save(out)
        except (OSError, ValueError) as error:
            raise UserError(f"cannot write {out}: {error}") from error


def to_rows(features: Tensor) -> Tensor:
    """Unit length in float32, whatever the precision of the towers, on the CPU."""
    return F.normalize(features.float(), dim=-1).cpu()


def _measure_dim(encoder: DualEncoder) -> int:
    return int(next(encoder.projection(name).out_features for name in encoder.towers))


def batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Yield consecutive slices of at most `size` items."""
    for start in range(0, len(items), size):
        yield items[start : start + size]

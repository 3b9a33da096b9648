"""The sounds of a scene: each object is heard once, at a time of its own.

Every kind has its pattern of tones: partials, notes and glides. The color shifts the pitch, the size gives the loudness, and
the position in the image gives the pan. All objects of a scene are heard, in any order, in turn or at once.

    F = samples of the file in each of its two channels, f = those of one sound
"""

from __future__ import annotations

import io
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pretrain.data.scenes.layout import COLORS, Scene
from pretrain.data.scenes.text import add_article, name_object
from pretrain.errors import UserError

RATE = 16_000  # Hz
SECONDS = 3.0
GAINS = {"small": 0.25, "medium": 0.5, "large": 1.0}
"""Loudness of an object by its size, as a factor of the amplitude: steps of 6 dB."""
LOUDNESS = {"small": "quiet", "medium": "", "large": "loud"}

_LEVEL = 0.24  # peak of a sound of gain 1 in both channels together, of full scale 1: four of them do not reach it
_COLOR_STEP = 1.5  # semitones from one color to the next
_RAMP = 0.008  # seconds in which a note begins and ends
_HIGHEST = 0.47 * RATE  # Hz; higher partials are left out

Note = tuple[float, float, float, float]
"""Start and length in seconds, and the pitch it begins and ends with, as factors of the fundamental."""


@dataclass(frozen=True)
class Pattern:
    """The tones of a kind."""

    fundamental: float
    """In Hz, of the middle color."""
    partials: tuple[tuple[float, float], ...]
    """Frequency, as a factor of the fundamental, and amplitude of each."""
    notes: tuple[Note, ...]
    decay: float = 0.0
    """Of each note, in nepers a second: 0 = it stays as loud as it begins."""

    @property
    def duration(self) -> float:
        """In seconds."""
        return max(start + length for start, length, _, _ in self.notes)


def _harmonics(count: int, exponent: float = 1.0, step: int = 1) -> tuple[tuple[float, float], ...]:
    """Return partials 1, 1 + step, ... with amplitudes that fall with a power of the frequency."""
    return tuple((float(k), k**-exponent) for k in range(1, 1 + count * step, step))


_PURE = ((1.0, 1.0),)
_BELL = ((1.0, 1.0), (2.76, 0.6), (5.4, 0.35), (8.93, 0.2))  # of a bar that is free at both ends
_CLUSTER = tuple((ratio, 0.5) for ratio in (1.0, 1.13, 1.31, 1.47, 1.71, 1.93))


def _repeat(count: int, spacing: float, length: float, begin: float = 1.0, end: float = 1.0) -> tuple[Note, ...]:
    return tuple((i * spacing, length, begin, end) for i in range(count))


PATTERNS = {
    "car": Pattern(98, _harmonics(14, 0.8), ((0.0, 0.65, 1.0, 1.4),)),
    "sofa": Pattern(233, _harmonics(6, 1.0, 2), ((0.0, 0.3, 1.0, 0.8), (0.35, 0.3, 1.1, 0.85))),
    "dog": Pattern(330, _harmonics(8), _repeat(3, 0.22, 0.12, 1.0, 0.65)),
    "house": Pattern(277, _BELL, ((0.0, 0.65, 1.0, 1.0),), decay=5.0),
    "tree": Pattern(1245, _CLUSTER, _repeat(2, 0.33, 0.27)),
    "boat": Pattern(139, ((1.0, 1.0), (2.0, 1.0), (3.0, 0.8), (4.0, 0.2)), ((0.0, 0.65, 1.0, 1.0),)),
    "ball": Pattern(208, _PURE, tuple((s, 0.08, 1.0, 0.8) for s in (0.0, 0.24, 0.41, 0.52, 0.6)), decay=20.0),
    "cup": Pattern(1480, _BELL, _repeat(2, 0.3, 0.3), decay=12.0),
    "chair": Pattern(165, _harmonics(10, 0.7, 2), _repeat(4, 0.18, 0.05)),
    "bird": Pattern(2489, _PURE, _repeat(5, 0.13, 0.08, 1.0, 1.3)),
    "fish": Pattern(523, _PURE, ((0.0, 0.12, 0.8, 1.8), (0.16, 0.12, 0.8, 1.8), (0.48, 0.12, 0.8, 1.8))),
    "cat": Pattern(622, _harmonics(5), ((0.0, 0.25, 0.8, 1.25), (0.25, 0.4, 1.25, 0.7))),
    "lamp": Pattern(740, _harmonics(4, 0.5, 2), _repeat(11, 0.06, 0.03)),
    "plane": Pattern(117, _harmonics(24, 0.3), ((0.0, 0.68, 1.6, 0.8),)),
    "flower": Pattern(880, _harmonics(3, 2.0, 2), ((0.0, 0.2, 1.0, 1.0), (0.22, 0.2, 1.26, 1.26), (0.44, 0.22, 1.5, 1.5))),
    "mushroom": Pattern(415, _harmonics(4, 0.6), ((0.0, 0.2, 1.5, 1.5), (0.22, 0.2, 1.19, 1.19), (0.44, 0.22, 1.0, 1.0))),
}
"""By kind. None is longer than 0.7 s, so that four are heard one after the other."""


@dataclass(frozen=True)
class Sound:
    """When and how an object is heard."""

    index: int
    """Of the object in `Scene.objects`."""
    start: float
    """In seconds, a multiple of a millisecond."""
    end: float
    pan: float
    """-1 (left) to 1 (right)."""
    gain: float


def build_sounds(scene: Scene) -> list[Sound]:
    """Return the sounds of a scene in the order in which they begin."""
    rng = scene.build_rng("sounds")
    order, in_turn = rng.shuffled(range(len(scene.objects))), rng.bernoulli(0.6)
    shares = [rng.random() for _ in range(len(order) + 1)]
    durations = [PATTERNS[scene.objects[i].spec.kind].duration for i in order]
    spare, at = SECONDS - sum(durations), 0.0
    sounds = []
    for i, share, duration in zip(order, shares, durations, strict=False):
        if in_turn:
            start = at + spare * share / sum(shares)
            at = start + duration
        else:
            start = (SECONDS - duration) * share
        start = math.floor(start * 1000) / 1000
        item = scene.objects[i]
        pan = round(min(1.0, max(-1.0, 2 * item.x - 1)), 3)
        sounds.append(Sound(i, start, round(start + duration, 3), pan, GAINS[item.spec.size]))
    return sorted(sounds, key=lambda sound: (sound.start, sound.index))


def render_sounds(scene: Scene, sounds: Sequence[Sound], skip: Collection[int] = ()) -> NDArray[np.int16]:
    """Render the sounds of a scene to (F, 2) int16 at RATE.

    Args:
        skip: indices of objects to leave out.
    """
    out = np.zeros((round(RATE * SECONDS), 2))
    for sound in sounds:
        if sound.index in skip:
            continue
        spec = scene.objects[sound.index].spec
        shift = 2 ** ((COLORS.index(spec.color) - (len(COLORS) - 1) / 2) * _COLOR_STEP / 12)
        samples = _LEVEL * sound.gain * _render_pattern(PATTERNS[spec.kind], shift)
        angle = (sound.pan + 1) * math.pi / 4  # equal power whatever the pan
        first = round(sound.start * RATE)
        out[first : first + len(samples)] += samples[:, None] * (math.cos(angle), math.sin(angle))
    return np.rint(out * 32767).astype(np.int16)


def _render_pattern(pattern: Pattern, shift: float) -> NDArray[np.float64]:
    """Return a pattern with its pitch multiplied by `shift`, (f,), between -1 and 1."""
    out = np.zeros(round(pattern.duration * RATE))
    total = sum(amplitude for _, amplitude in pattern.partials)
    for start, length, begin, end in pattern.notes:
        first, count = round(start * RATE), round(length * RATE)
        count = min(count, len(out) - first)
        time = np.arange(count) / RATE
        # The integral of a pitch that goes from `begin` to `end` in a straight line
        phase = 2 * np.pi * pattern.fundamental * shift * (begin * time + (end - begin) * time**2 / (2 * length))
        highest = pattern.fundamental * shift * max(begin, end)
        wave = np.zeros(count)
        for ratio, amplitude in pattern.partials:
            if ratio * highest < _HIGHEST:
                wave += amplitude * np.sin(ratio * phase)
        ramp = np.minimum(1.0, np.minimum(time, length - time) / _RAMP)
        out[first : first + count] += wave / total * ramp * np.exp(-pattern.decay * time)
    return out


def encode_flac(samples: NDArray[np.int16]) -> bytes:
    """Return (F, 2) int16 as a FLAC at RATE. Raises UserError where soundfile is not installed."""
    require_soundfile()
    import soundfile

    out = io.BytesIO()
    soundfile.write(out, samples, RATE, format="FLAC", subtype="PCM_16")
    return out.getvalue()


def require_soundfile() -> None:
    """Raise UserError where soundfile, which writes FLAC, is not installed."""
    try:
        import soundfile  # noqa: F401 - OSError where libsndfile is missing
    except (ImportError, OSError) as error:
        raise UserError("drawn sounds need soundfile: pip install 'clipfuse[audio]'") from error


def draw_sounds(scene: Scene) -> tuple[bytes, dict[str, Any]]:
    """Return KEY.flac of a scene and the fields that KEY.json has about it.

    The fields are:
        sounds: name, start and end in seconds, pan from -1 (left) to 1 (right), gain, and object: index into `objects`; in the
            order in which they begin.
        sound_captions: what is heard, the complete one first.
    """
    sounds = build_sounds(scene)
    fields = [
        {
            "name": scene.objects[sound.index].spec.kind,
            "start": sound.start,
            "end": sound.end,
            "pan": sound.pan,
            "gain": sound.gain,
            "object": sound.index,
        }
        for sound in sounds
    ]
    captions = build_sound_captions(scene, sounds)
    return encode_flac(render_sounds(scene, sounds)), {"sounds": fields, "sound_captions": captions}


# ---------------------------------------------------------------------------------------------------------------------
# Captions


def build_sound_captions(scene: Scene, sounds: Sequence[Sound]) -> list[str]:
    """Return captions of what is heard, the complete one first.

    The first names all sounds with their colors, in order. The others say where the sounds come from, or name one of them.
    """
    rng = scene.build_rng("sound captions")
    kinds = [scene.objects[sound.index].spec.kind for sound in sounds]
    names = [name_object(scene.objects[sound.index].spec, surface=False) for sound in sounds]
    loudness = [LOUDNESS[scene.objects[sound.index].spec.size] if rng.bernoulli(0.25) else "" for sound in sounds]
    complete = [add_article(f"{loud} {name}".strip()) for loud, name in zip(loudness, names, strict=True)]
    placed = [f"{add_article(kind)} {_describe_pan(sound.pan)}" for kind, sound in zip(kinds, sounds, strict=True)]
    prefix = rng.choice(("", "", "the sound of ", "we hear "))
    out = [prefix + _join_in_order(complete, sounds), _join_in_order(placed, sounds)]
    if len(sounds) > 1:
        out.append(_join_in_order([add_article(kind) for kind in kinds], sounds))
    return list(dict.fromkeys([*out, *names]))


def _describe_pan(pan: float) -> str:
    return "in the middle" if abs(pan) < 1 / 3 else "on the left" if pan < 0 else "on the right"


def _join_in_order(phrases: Sequence[str], sounds: Sequence[Sound]) -> str:
    """Join phrases by "then" where a sound begins after all before it have ended, else by "together with"."""
    text, end = phrases[0], sounds[0].end
    for phrase, sound in zip(phrases[1:], sounds[1:], strict=True):
        text += f", then {phrase}" if sound.start >= end else f" together with {phrase}"
        end = max(end, sound.end)
    return text

"""Free Spoken Digit Dataset: 3000 recordings as log-mel spectrograms."""

from __future__ import annotations

import io
import re
import wave
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from onward.data.base import SPLITS, DataSet, Split
from onward.data.files import FILES, folder_content, obtain, read_folder, verify
from onward.data.spec import DataSpec
from onward.data.splits import assemble, checked_hold_out, limited, standardise
from onward.data.task import Classification
from onward.errors import ConfigError, DataError

RATE = 8000  # Hz
WINDOW, HOP = 256, 128  # samples: 32 ms, 16 ms
N_RECORDINGS = 3000
N_TEST_INDEX = 5  # recordings 0 to 4 of every digit and speaker are the published test split
FLOOR = 1e-6  # power added before the logarithm: digital silence lies 2 deviations under speech, not 20
NAME = re.compile(r"(\d)_([a-z]+)_(\d+)\.wav")


def read_wave(path: Path, content: bytes) -> np.ndarray:
    """Samples of an 8 kHz mono wav file of 16 bits, in [-1, 1).

    Raises:
        DataError: not a wav file, another rate or width, or fewer samples than its header says.
    """
    try:
        with wave.open(io.BytesIO(content)) as sound:
            found = (sound.getframerate(), sound.getnchannels(), sound.getsampwidth() * 8)
            n, frames = sound.getnframes(), sound.readframes(sound.getnframes())
    except (wave.Error, EOFError) as reason:
        raise DataError(f"{path} is not a wav file: {reason or 'it ends early'}") from None
    if found != (RATE, 1, 16):
        raise DataError(f"{path} has {found[0]} Hz, {found[1]} channels and {found[2]} bits instead of "
                        f"{RATE} Hz, 1 and 16")
    if len(frames) != 2 * n:
        raise DataError(f"{path} is truncated: {len(frames) // 2:,} samples instead of {n:,}")
    return np.frombuffer(frames, "<i2").astype(np.float32) / 32768


def mel_filters(n_mels: int, n_fft: int = WINDOW, rate: int = RATE) -> Tensor:
    """Triangular filters (n_fft/2 + 1, n_mels), peak 1, evenly spaced on the mel scale from 0 to rate/2.

    mel(f) = 2595 log10(1 + f/700), f in Hz (O'Shaughnessy 1987).
    """
    top = 2595 * np.log10(1 + rate / 2 / 700)
    corners = 700 * (10 ** (np.linspace(0, top, n_mels + 2) / 2595) - 1)
    lower, centre, upper = corners[:-2], corners[1:-1], corners[2:]
    f = np.linspace(0, rate / 2, n_fft // 2 + 1)[:, None]
    rising, falling = (f - lower) / (centre - lower), (upper - f) / (upper - centre)
    return torch.from_numpy(np.clip(np.minimum(rising, falling), 0, None)).float()


def log_mel(sound: Tensor, n_mels: int) -> Tensor:
    """``log(mel(|FFT(hann x frame)|^2 / sum(hann^2)) + floor)``: (N, samples) to (N, frames, n_mels)."""
    hann = torch.hann_window(WINDOW)
    frames = sound.unfold(-1, WINDOW, HOP) * hann
    power = torch.fft.rfft(frames).abs().square() / hann.square().sum()
    return (power @ mel_filters(n_mels) + FLOOR).log()


class SpokenDigits(DataSet):
    """2700 and 300 recordings of six speakers saying ten digits, 10 classes (Jackson and others 2018).

    A sample is a log-mel spectrogram (frames, n_mels), one frame every 16 ms, cut or padded with silence at
    its end, standardised by band over the training recordings. Test recordings are the published ones
    (index 0 to 4 of every digit and speaker).

    Args:
        frames: length T; 64 frames are 1.04 s, longer than 99 in 100 recordings.
        n_mels: bands of the mel scale.
        common: see :class:`DataSet`.
    Raises:
        ConfigError: a size below 1, or more bands than a window of 256 samples can tell apart.
        DataError: recordings missing or damaged.
    """

    name = "spoken_digits"

    def __init__(self, frames: int = 64, n_mels: int = 32, **common):
        super().__init__(**common)
        if frames < 1:
            raise ConfigError("data.frames", frames, "a positive number of frames")
        if n_mels < 1 or (mel_filters(n_mels).sum(0) == 0).any():
            raise ConfigError("data.n_mels", n_mels, "1 to 86, so that every band holds a frequency")
        self.frames, self.n_mels = frames, n_mels

    def read(self) -> tuple[DataSpec, dict[str, Split]]:
        file = FILES[self.name]["recordings"]
        folder = obtain(file, self.root, self.download)
        contents = read_folder(folder, ".wav")
        strange = next((name for name in contents if NAME.fullmatch(name) is None), None)
        if strange is not None:
            raise DataError(f"{folder / strange} is not named digit_speaker_index.wav")
        if len(contents) != N_RECORDINGS:
            raise DataError(f"{folder} has {len(contents):,} recordings instead of {N_RECORDINGS:,}; "
                            f"a whole copy is at {file.address}")
        sounds = {name: read_wave(folder / name, content) for name, content in contents.items()}
        verify(file, folder, folder_content(contents))

        keys = sorted((int(digit), speaker, int(at)) for digit, speaker, at in
                      (NAME.fullmatch(name).groups() for name in sounds))
        length = WINDOW + (self.frames - 1) * HOP
        padded = torch.zeros(len(keys), length)
        for row, (digit, speaker, at) in enumerate(keys):
            sound = sounds[f"{digit}_{speaker}_{at}.wav"][:length]
            padded[row, :len(sound)] = torch.from_numpy(sound)
        x = torch.cat([log_mel(part, self.n_mels) for part in padded.split(250)])
        y = torch.tensor([digit for digit, _, _ in keys])
        index = split_by_index(torch.tensor([at for _, _, at in keys]), self.validation)
        index = {split: limited(index[split], self.limit, split) for split in SPLITS}
        parts = standardise({split: (x[index[split]], y[index[split]]) for split in SPLITS}, (0, 1))
        return assemble(self.name, "sequence", Classification(10), parts)


def split_by_index(at: Tensor, validation: float) -> dict[str, Tensor]:
    """Rows of the splits from the recordings' index: 0 to 4 test, validation held out of the others."""
    rest = (at >= N_TEST_INDEX).nonzero().flatten()
    train, val = checked_hold_out(len(rest), validation)
    return {"train": rest[train], "val": rest[val], "test": (at < N_TEST_INDEX).nonzero().flatten()}

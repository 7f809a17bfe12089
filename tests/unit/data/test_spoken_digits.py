"""Spoken digits: wav files, the mel scale, and the published test recordings."""

from __future__ import annotations

import io
import shutil
import wave
from pathlib import Path

import numpy as np
import pytest
import torch

from onward.data.spoken_digits import FLOOR, SpokenDigits, log_mel, mel_filters, read_wave, split_by_index
from onward.errors import ConfigError, DataError


def recording(samples: np.ndarray, rate: int = 8000, channels: int = 1) -> bytes:
    out = io.BytesIO()
    with wave.open(out, "wb") as sound:
        sound.setnchannels(channels), sound.setsampwidth(2), sound.setframerate(rate)
        sound.writeframes(samples.astype("<i2").tobytes())
    return out.getvalue()


@pytest.fixture(scope="module")
def spoken(data_root) -> SpokenDigits:
    if not (data_root / "fsdd" / "recordings").is_dir():
        pytest.skip("no recordings of the Free Spoken Digit Dataset")
    data = SpokenDigits(root=str(data_root))
    data.setup()
    return data


@pytest.mark.real
def test_counts_and_shapes(spoken):
    spec = spoken.spec
    assert (spec.layout, spec.input_shape) == ("sequence", (64, 32))
    assert (spec.n_train, spec.n_val, spec.n_test) == (2430, 270, 300)
    train, val, test = (spoken.split(s).y.bincount() for s in ("train", "val", "test"))
    assert test.tolist() == [30] * 10
    assert (train + val).tolist() == [270] * 10


@pytest.mark.real
def test_bands_are_standardised_by_training_recordings(spoken):
    x = spoken.split("train").x.double()
    assert x.mean((0, 1)).abs().max().item() < 1e-6
    assert (x.std((0, 1), correction=0) - 1).abs().max().item() < 1e-6
    assert spoken.split("test").x.double().mean((0, 1)).abs().max().item() > 1e-3  # not by its own


@pytest.mark.real
def test_no_two_recordings_of_different_splits_are_equal(spoken):
    rows = {s: {row.numpy().tobytes() for row in spoken.split(s).x} for s in ("train", "val", "test")}
    assert not rows["train"] & rows["test"]
    assert not rows["train"] & rows["val"]
    assert not rows["val"] & rows["test"]


@pytest.mark.real
def test_a_recording_missing_or_truncated_is_named(spoken, data_root, tmp_path):
    target = tmp_path / "fsdd" / "recordings"
    shutil.copytree(data_root / "fsdd" / "recordings", target,
                    copy_function=lambda source, copy: Path(copy).symlink_to(source))
    one = target / "3_theo_7.wav"
    content = one.read_bytes()
    one.unlink()
    with pytest.raises(DataError, match="recordings has 2,999 recordings instead of 3,000"):
        SpokenDigits(root=str(tmp_path)).setup()
    one.write_bytes(content[:-100])
    with pytest.raises(DataError, match=r"3_theo_7\.wav is truncated: .* samples instead of"):
        SpokenDigits(root=str(tmp_path)).setup()
    one.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(DataError, match="recordings is not the published file: sha256"):
        SpokenDigits(root=str(tmp_path)).setup()


def test_published_test_recordings_are_index_0_to_4():
    at = torch.arange(50).repeat(60)
    index = split_by_index(at, 0.1)
    assert sorted(set(at[index["test"]].tolist())) == [0, 1, 2, 3, 4]
    assert at[index["train"]].min().item() == at[index["val"]].min().item() == 5
    assert torch.equal(torch.cat(list(index.values())).sort().values, torch.arange(3000))


def test_wav_is_read_and_scaled():
    got = read_wave(Path("f"), recording(np.array([0, 16384, -32768])))
    assert got.tolist() == [0.0, 0.5, -1.0]


@pytest.mark.parametrize(("content", "said"), [
    (b"", "is not a wav file"), (b"RIFFxxxxWAVE", "is not a wav file"), (b"no wav" * 9, "is not a wav file"),
    (recording(np.zeros(10), rate=16000), "has 16000 Hz, 1 channels and 16 bits instead of 8000 Hz"),
    (recording(np.zeros(10), channels=2), "has 8000 Hz, 2 channels"),
    (recording(np.zeros(10))[:-8], "is truncated: 6 samples instead of 10"),
])
def test_wav_that_is_none(content, said):
    with pytest.raises(DataError) as error:
        read_wave(Path("some/file.wav"), content)
    assert f"some/file.wav {said}" in str(error.value)


def test_mel_filters_are_triangles_of_peak_one_on_the_mel_scale():
    filters = mel_filters(32)
    assert filters.shape == (129, 32)
    assert (filters >= 0).all()
    assert (filters <= 1).all()
    # between the first and the last centre, neighbouring triangles add up to 1 at every frequency
    f = np.linspace(0, 4000, 129)
    mel = 2595 * np.log10(1 + f / 700)
    step = 2595 * np.log10(1 + 4000 / 700) / 33
    inner = (mel >= step) & (mel <= 32 * step)
    assert filters.sum(1).numpy()[inner] == pytest.approx(1, abs=1e-5)
    centres = 700 * (10 ** (step * np.arange(1, 33) / 2595) - 1)
    assert np.abs(f[filters.argmax(0).numpy()] - centres).max() < 4000 / 128


def test_log_mel_of_silence_and_of_a_tone():
    silence = log_mel(torch.zeros(1, 256 + 3 * 128), 32)
    assert silence.shape == (1, 4, 32)
    torch.testing.assert_close(silence, torch.full((1, 4, 32), float(np.log(FLOOR))))
    t = torch.arange(256 + 3 * 128) / 8000
    tone = log_mel(torch.sin(2 * torch.pi * 1000 * t).unsqueeze(0), 32)  # exactly the 32nd frequency
    step = 2595 * np.log10(1 + 4000 / 700) / 33
    band = round(2595 * np.log10(1 + 1000 / 700) / step) - 1
    assert tone.argmax(-1).unique().tolist() == [band]


def test_log_mel_equals_a_direct_discrete_fourier_sum():
    sound = torch.randn(1, 256, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    n = torch.arange(256, dtype=torch.float64)
    hann = 0.5 - 0.5 * torch.cos(2 * torch.pi * n / 256)
    angle = 2 * torch.pi * torch.arange(129, dtype=torch.float64)[:, None] * n / 256
    framed = sound[0] * hann
    power = ((angle.cos() @ framed).square() + (angle.sin() @ framed).square()) / hann.square().sum()
    expected = (power @ mel_filters(20).double() + FLOOR).log()
    torch.testing.assert_close(log_mel(sound.float(), 20)[0, 0].double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("values", "key"), [({"frames": 0}, "data.frames"), ({"n_mels": 0}, "data.n_mels"),
                                             ({"n_mels": 87}, "data.n_mels")])
def test_sizes_out_of_range(values, key):
    with pytest.raises(ConfigError) as error:
        SpokenDigits(**values)
    assert error.value.key == key

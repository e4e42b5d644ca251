"""PSNR, SSIM and GMSD against slow formulas written from the papers, and the contact sheet."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamictrl_edge.bundle.errors import InputError, UsageError
from dynamictrl_edge.runtime.metrics import compare_clips, contact_sheet, gmsd, psnr, ssim


def clip(seed=0, frames=2, height=20, width=24):
    """Smooth shapes with some noise, so that every measure has something to see."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    phase = random.uniform(0, 6, (frames, 3))
    waves = np.sin(x / 4 + phase[..., None, None]) * np.cos(y / 5 + seed)
    values = 128 + 90 * waves + random.normal(0, 6, waves.shape)
    return np.clip(values, 0, 255).astype(np.uint8).transpose(0, 2, 3, 1).copy()


def noisy(of, amount, seed=9):
    noise = np.random.default_rng(seed).normal(0, amount, of.shape)
    return np.clip(of + noise, 0, 255).round().astype(np.uint8)


def luma(frame):
    return frame.astype(float) @ np.array([0.299, 0.587, 0.114])


def slow_ssim(a, b):
    """Equation 13 of Wang et al. 2004, window by window, with weighted deviations as in equations 14 to 16."""
    offsets = np.arange(11) - 5
    window = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    values = []
    for top in range(a.shape[0] - 10):
        for left in range(a.shape[1] - 10):
            p, q = (image[top : top + 11, left : left + 11] for image in (a, b))
            mean_p, mean_q = (window * p).sum(), (window * q).sum()
            var_p, var_q = (window * (p - mean_p) ** 2).sum(), (window * (q - mean_q) ** 2).sum()
            cov = (window * (p - mean_p) * (q - mean_q)).sum()
            c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
            luminance = (2 * mean_p * mean_q + c1) / (mean_p**2 + mean_q**2 + c1)
            values.append(luminance * (2 * cov + c2) / (var_p + var_q + c2))
    return np.mean(values)


def slow_gmsd(a, b):
    """Equations 1 to 6 of Xue et al. 2014, pixel by pixel, on pictures halved by 2 x 2 means."""
    kernel = np.array([[1, 0, -1]] * 3) / 3

    def magnitudes(image):
        rows, columns = image.shape[0] // 2, image.shape[1] // 2
        small = np.array(
            [[image[2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean() for j in range(columns)] for i in range(rows)]
        )
        return np.array(
            [
                [
                    math.hypot((small[i : i + 3, j : j + 3] * k).sum(), (small[i : i + 3, j : j + 3] * k.T).sum())
                    for k in (kernel,)
                    for j in range(columns - 2)
                ]
                for i in range(rows - 2)
            ]
        )

    m, n = magnitudes(a), magnitudes(b)
    similarity = (2 * m * n + 170) / (m**2 + n**2 + 170)
    return math.sqrt(np.mean((similarity - similarity.mean()) ** 2))


@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 100),
    height=st.integers(11, 25),
    width=st.integers(11, 25),
    amount=st.floats(0.0, 60.0),
)
def test_the_measures_are_those_of_the_papers(seed, height, width, amount):
    a = clip(seed, 1, height, width)
    b = noisy(a, amount)
    np.testing.assert_allclose(ssim(a, b), [slow_ssim(luma(a[0]), luma(b[0]))], rtol=0, atol=1e-9)
    np.testing.assert_allclose(gmsd(a, b), [slow_gmsd(luma(a[0]), luma(b[0]))], rtol=0, atol=1e-9)


def test_psnr_is_the_definition():
    a = np.full((2, 12, 12, 3), 100, np.uint8)
    b = a.copy()
    b[0] += 5  # squared error 25 everywhere
    b[1, 0, 0, 0] = 255  # wraps in uint8 arithmetic, if anybody computes there
    expected = [10 * math.log10(255**2 / 25), 10 * math.log10(255**2 / (155**2 / (12 * 12 * 3)))]
    np.testing.assert_allclose(psnr(a, b), expected)
    np.testing.assert_allclose(psnr(b, a), expected)


def test_equal_clips_are_perfect():
    a = clip()
    result = compare_clips(a, a.copy())
    assert (result.psnr == np.inf).all()
    assert (result.ssim == 1).all()
    assert (result.gmsd == 0).all()


def test_every_measure_worsens_with_noise_and_is_symmetric():
    a = clip(3)
    results = [compare_clips(a, noisy(a, amount)) for amount in (2, 10, 40)]
    for better, worse in itertools.pairwise(results):
        assert (better.psnr > worse.psnr).all()
        assert (better.ssim > worse.ssim).all()
        assert (better.gmsd < worse.gmsd).all()
    forth, back = compare_clips(a, clip(4)), compare_clips(clip(4), a)
    for name in ("psnr", "ssim", "gmsd"):
        np.testing.assert_allclose(getattr(forth, name), getattr(back, name), rtol=1e-12)


def test_frames_are_judged_apart():
    a = clip(1, frames=4)
    b = a.copy()
    b[2] = noisy(b[2], 20)
    result = compare_clips(a, b)
    assert np.isinf(result.psnr).tolist() == [True, True, False, True]
    assert (result.ssim == 1).tolist() == [True, True, False, True]
    assert (result.gmsd == 0).tolist() == [True, True, False, True]


def test_results_can_be_written_as_json():
    a = clip(1, frames=3)
    b = a.copy()
    b[1] = noisy(b[1], 20)
    result = compare_clips(a, b)
    read = json.loads(json.dumps(result.as_json(), allow_nan=False))
    assert read["frames"] == 3
    assert read["psnr"]["mean"] is None
    assert read["psnr"]["per_frame"][0] is None
    assert read["psnr"]["worst"] == pytest.approx(result.psnr[1])
    assert read["ssim"]["worst"] == pytest.approx(result.ssim[1])
    assert read["ssim"]["per_frame"][0] == 1
    assert read["gmsd"]["worst"] == pytest.approx(result.gmsd[1])
    assert read["gmsd"]["mean"] == pytest.approx(result.gmsd[1] / 3)


@pytest.mark.parametrize("measure", [psnr, ssim, gmsd, compare_clips])
def test_clips_that_do_not_match_are_refused_with_both_numbers(measure):
    with pytest.raises(InputError, match="24x20 and 32x20"):
        measure(clip(), clip(width=32))
    with pytest.raises(InputError, match="2 and 3 frames"):
        measure(clip(), clip(frames=3))
    with pytest.raises(InputError, match="no frames"):
        measure(clip()[:0], clip()[:0])
    with pytest.raises(InputError, match="float64"):
        measure(clip() / 255, clip())


@pytest.mark.parametrize("measure", [ssim, gmsd])
def test_frames_smaller_than_the_window_are_refused(measure):
    small = clip(height=10)
    with pytest.raises(InputError, match=r"24x10.*11x11"):
        measure(small, small)


def flat(colour, frames=9, height=40, width=60):
    return np.broadcast_to(np.array(colour, np.uint8), (frames, height, width, 3))


def count(sheet, colour):
    return int((sheet == np.array(colour, np.uint8)).all(axis=-1).sum())


def test_a_contact_sheet_shows_every_clip_with_its_label_on_a_dark_ground():
    sheet = contact_sheet([("ours", flat((250, 0, 0))), ("theirs", flat((0, 250, 0)))], columns=3)
    assert sheet.dtype == np.uint8
    assert sheet.ndim == 3
    assert sheet.shape[2] == 3
    red, green = ((sheet == np.array(c, np.uint8)).all(axis=-1) for c in ((250, 0, 0), (0, 250, 0)))
    assert red.sum() == green.sum() == 3 * 40 * 60
    assert np.nonzero(red)[0].max() < np.nonzero(green)[0].min()  # from top to bottom in the order given
    left = np.nonzero(red)[1].min()
    assert sheet[:, :left].max() > 200  # the labels' ink, left of all frames
    assert np.median(sheet[:, :left]) < 40


def test_frames_are_evenly_spaced_from_the_first_to_the_last():
    moving = np.repeat(np.arange(100, 109, dtype=np.uint8), 12 * 12 * 3).reshape(9, 12, 12, 3)
    sheet = contact_sheet([("", moving)], columns=5)
    assert [count(sheet, (v, v, v)) >= 144 for v in range(100, 109)] == [i % 2 == 0 for i in range(9)]
    one = contact_sheet([("", moving)], columns=1)
    assert count(one, (100, 100, 100)) >= 144
    assert count(one, (104, 104, 104)) < 144
    all_of_them = contact_sheet([("", moving)], columns=50)
    assert all(count(all_of_them, (v, v, v)) >= 144 for v in range(100, 109))


def test_large_frames_are_shrunk_and_keep_their_shape():
    sheet = contact_sheet([("big", flat((250, 0, 0), 2, 300, 600))], columns=2, cell=100)
    rows, _ = np.nonzero((sheet == np.array((250, 0, 0), np.uint8)).all(axis=-1))
    assert rows.max() - rows.min() + 1 == 50
    assert len(rows) == 2 * 50 * 100


def test_long_and_unusual_labels_do_not_push_the_frames_away():
    short = contact_sheet([("a" * 30, flat((250, 0, 0)))])
    long = contact_sheet([("a" * 3000 + "\nübung 图", flat((250, 0, 0)))])
    assert long.shape == short.shape


def test_sheets_that_cannot_be_drawn_are_refused():
    with pytest.raises(InputError, match="no clip"):
        contact_sheet([])
    with pytest.raises(InputError, match="60x40 and 30x40"):
        contact_sheet([("a", flat((1, 2, 3))), ("b", flat((1, 2, 3), width=30))])
    with pytest.raises(InputError, match="9 and 8 frames"):
        contact_sheet([("a", flat((1, 2, 3))), ("b", flat((1, 2, 3), frames=8))])
    with pytest.raises(UsageError, match="column"):
        contact_sheet([("a", flat((1, 2, 3)))], columns=0)

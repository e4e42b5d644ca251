from __future__ import annotations

import io
import os
import subprocess
import sys
import tempfile
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from dynamictrl_edge.bundle.errors import InputError, UsageError
from dynamictrl_edge.runtime.media import FITS, Fit, load_photo, photo_to_tensor
from tests.golden import case
from tests.media_samples import corners, noise, real_file, write_png_header

SIDES = st.integers(16, 70)


# --- the published preprocessing ---------------------------------------------------------------------------------


def test_stretch_and_scaling_equal_the_published_pipeline_bit_for_bit() -> None:
    tensors, _ = case("pipeline10_tiled_resized")
    photo = load_photo(tensors["image_u8"], 64, 96, "stretch")
    assert photo.shape == (64, 96, 3) and tensors["image_u8"].shape == (90, 120, 3)
    np.testing.assert_array_equal(photo_to_tensor(photo), tensors["image_preprocessed"])


@pytest.mark.parametrize("name", ["pipeline10_cfg3", "pipeline15_cfg3_f13"])
@pytest.mark.parametrize("fit", FITS)
def test_a_photo_of_the_wanted_size_comes_through_untouched_whatever_the_fit(name: str, fit: Fit) -> None:
    tensors, settings_ = case(name)
    height, width = settings_["settings"]["height"], settings_["settings"]["width"]
    photo = load_photo(tensors["image_u8"], height, width, fit)
    np.testing.assert_array_equal(photo, tensors["image_u8"])
    np.testing.assert_array_equal(photo_to_tensor(photo), tensors["image_preprocessed"])


def test_the_tensor_is_contiguous_float32_channels_first() -> None:
    tensor = photo_to_tensor(noise(16, 32, 3))
    assert tensor.dtype == np.float32 and tensor.shape == (1, 3, 16, 32) and tensor.flags.c_contiguous


# --- fits --------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None, derandomize=True)
@given(SIDES, SIDES, SIDES, SIDES)
def test_stretch_is_pillows_resize(rows: int, columns: int, height: int, width: int) -> None:
    picture = Image.fromarray(noise(rows, columns, 3))
    expected = np.asarray(picture.resize((width, height), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(load_photo(picture, height, width, "stretch"), expected)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(SIDES, SIDES, SIDES, SIDES)
def test_cover_leaves_no_bars_and_contain_leaves_only_those_it_must(
    rows: int, columns: int, height: int, width: int
) -> None:
    white = np.full((rows, columns, 3), 255, np.uint8)
    assert load_photo(white, height, width, "cover").min() == 255

    contained = load_photo(white, height, width, "contain")[..., 0]
    assert contained.shape == (height, width) and set(np.unique(contained)) <= {0, 255}
    filled_rows, filled_columns = np.flatnonzero(contained.any(axis=1)), np.flatnonzero(contained.any(axis=0))
    scale = min(height / rows, width / columns)
    assert abs(len(filled_rows) - rows * scale) <= 0.5 and abs(len(filled_columns) - columns * scale) <= 0.5
    assert len(filled_rows) == height or len(filled_columns) == width
    # centred: the bars differ by one pixel at most
    assert abs(int(filled_rows[0]) - (height - 1 - int(filled_rows[-1]))) <= 1
    assert abs(int(filled_columns[0]) - (width - 1 - int(filled_columns[-1]))) <= 1


@pytest.mark.parametrize(("rows", "columns"), [(40, 120), (120, 40), (20, 60)])
def test_cover_keeps_the_middle_and_the_proportions(rows: int, columns: int) -> None:
    picture = np.zeros((rows, columns, 3), np.uint8)
    picture[..., 0] = 255
    side = min(rows, columns)
    middle = (slice((rows - side) // 2, (rows + side) // 2), slice((columns - side) // 2, (columns + side) // 2))
    picture[middle] = (0, 255, 0)
    covered = load_photo(picture, 64, 64, "cover")
    assert (covered[12:-12, 12:-12] == (0, 255, 0)).all()  # the filter mixes in neighbours near the cut only
    assert (covered[..., 1] > 100).all()


def test_cover_scales_the_middle_with_lanczos() -> None:
    picture = noise(64, 96, 3)
    covered = load_photo(picture, 32, 32, "cover")
    whole = Image.fromarray(picture).resize((48, 32), Image.Resampling.LANCZOS)
    np.testing.assert_allclose(covered, np.asarray(whole)[:, 8:40], atol=1)


def test_cover_of_a_plain_crop_is_that_crop() -> None:
    picture = noise(48, 80, 3)
    np.testing.assert_array_equal(load_photo(picture, 48, 64, "cover"), picture[:, 8:72])


def test_contain_puts_black_around_and_the_whole_picture_inside() -> None:
    contained = load_photo(corners(32, 32), 32, 96, "contain")
    np.testing.assert_array_equal(contained[:, 32:64], corners(32, 32))
    assert contained[:, :32].max() == 0 and contained[:, 64:].max() == 0


# --- what a photo may be -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif"])
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int, suffix: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"photo{suffix}"
    Image.fromarray(corners(32, 48)).save(path, exif=exif, quality=95)
    with Image.open(path) as opened:
        expected = np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))
    height, width = expected.shape[:2]
    assert (height, width) == ((32, 48) if orientation < 5 else (48, 32))
    np.testing.assert_array_equal(load_photo(path, height, width), expected)
    with Image.open(path) as opened:  # a Pillow image as well as a file
        np.testing.assert_array_equal(load_photo(opened, height, width), expected)


def test_a_photo_with_broken_exif_data_is_still_a_photo(tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    Image.fromarray(corners(32, 32)).save(path, exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_photo(path, 32, 32).shape == (32, 32, 3)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGBa"])
def test_transparent_parts_become_white(mode: str) -> None:
    rgba = np.full((16, 16, 4), (0, 0, 0, 255), np.uint8)
    rgba[:8, :, 3] = 0
    source = Image.fromarray(rgba)
    if mode == "P":
        image = Image.fromarray((rgba[..., 3] == 0).astype(np.uint8)).convert("P")
        image.putpalette([0, 0, 0, 90, 90, 90])
        image.info["transparency"] = 1
    else:
        image = source.convert(mode)
    assert image.mode == mode
    photo = load_photo(image, 16, 16)
    assert (photo[:8] == 255).all() and (photo[8:] == 0).all()


def test_half_transparent_is_half_white() -> None:
    rgba = np.full((16, 16, 4), (255, 0, 0, 128), np.uint8)
    np.testing.assert_allclose(load_photo(rgba, 16, 16)[0, 0], (255, 127, 127), atol=1)


def test_grey_cmyk_bilevel_and_sixteen_bit_photos_are_converted(tmp_path: Path) -> None:
    ramp = np.tile(np.arange(0, 256, 16, dtype=np.uint8), (16, 1))
    grey = np.repeat(ramp[..., None], 3, axis=2)
    np.testing.assert_array_equal(load_photo(ramp, 16, 16), grey)
    path = tmp_path / "deep.png"
    Image.fromarray(ramp.astype(np.uint16) * 257).save(path)
    np.testing.assert_array_equal(load_photo(path, 16, 16), grey)
    np.testing.assert_array_equal(load_photo(Image.fromarray(ramp.astype(np.int32) * 257), 16, 16), grey)
    assert set(np.unique(load_photo(Image.fromarray(ramp > 100), 16, 16))) == {0, 255}
    cmyk = tmp_path / "print.jpg"
    Image.fromarray(corners(32, 32)).convert("CMYK").save(cmyk, quality=95)
    np.testing.assert_allclose(load_photo(cmyk, 32, 32)[2, 2], (220, 30, 30), atol=6)


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png"])
def test_of_an_animated_file_the_first_frame_is_used(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"moving{suffix}"
    first, second = (Image.new("RGB", (32, 32), colour) for colour in ("red", "blue"))
    first.save(path, save_all=True, append_images=[second], lossless=True)
    assert (load_photo(path, 32, 32) == (255, 0, 0)).all()


def test_the_array_that_was_given_is_not_handed_out() -> None:
    source = noise(32, 32, 3)
    load_photo(source, 32, 32)[:] = 0
    assert source.max() > 0


def test_a_real_photo() -> None:
    photo = load_photo(real_file("human1.jpg"), 256, 160)
    assert photo.shape == (256, 160, 3) and photo.std() > 20


# --- bad input ---------------------------------------------------------------------------------------------------


def save(path: Path, height: int = 32, width: int = 32, form: str | None = None) -> Path:
    Image.fromarray(noise(height, width, 3)).save(path, format=form)
    return path


def bad_photos(folder: Path) -> dict[str, tuple[Path, str]]:
    """Name of the case: (path, what the message must say)."""
    (folder / "folder").mkdir()
    (folder / "empty.jpg").touch()
    (folder / "text.jpg").write_text("I am not a picture\n" * 50)
    (folder / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    (folder / "plan.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\nshowpage\n")
    Image.fromarray(np.ones((32, 32), np.float32)).save(folder / "float.tif")
    truncated = {}
    for suffix in ("jpg", "png", "webp"):
        path = save(folder / f"cut.{suffix}", 200, 200)
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2])
        truncated[f"truncated {suffix}"] = (path, "damaged or incomplete|not a picture")
    return {
        "missing": (folder / "missing.jpg", "does not exist"),
        "folder": (folder / "folder", "is a folder"),
        "empty": (folder / "empty.jpg", "empty file"),
        "not an image": (folder / "text.jpg", "not a picture that can be read. Give a JPEG, PNG or WebP"),
        "heic": (folder / "phone.heic", "HEIC photos have to be converted"),
        "eps": (folder / "plan.eps", "EPS drawing"),
        "float": (folder / "float.tif", "8-bit RGB"),
        "1x1": (save(folder / "dot.png", 1, 1), "1x1 pixels; each side must have at least 16"),
        "narrow": (save(folder / "line.png", 400, 15), "15x400 pixels; each side must have at least 16"),
        "20000x20000": (write_png_header(folder / "bomb.png", 20000, 20000), "400 megapixels.*more than the 100"),
        "just above": (write_png_header(folder / "big.png", 10001, 10000), "10001x10000.*more than the 100 megapixels"),
        **truncated,
    }


def test_each_bad_photo_is_refused_by_name_with_the_reason(tmp_path: Path) -> None:
    for name, (path, reason) in bad_photos(tmp_path).items():
        with pytest.raises(InputError, match=reason) as caught:
            load_photo(path, 64, 64)
        message = str(caught.value)
        assert repr(str(path)) in message and "\n" not in message and caught.value.exit_code == 3, name


def test_a_size_bomb_is_refused_before_anything_is_decoded(tmp_path: Path) -> None:
    path = write_png_header(tmp_path / "bomb.png", 9990, 10011)  # above our limit, below Pillow's own
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match="more than the 100 megapixels"):
            load_photo(path, 64, 64)
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


def test_a_large_photo_below_the_limit_brings_no_warning(tmp_path: Path) -> None:
    path = write_png_header(tmp_path / "large.png", 9800, 10000)  # Pillow itself warns from 89 megapixels on
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(InputError, match="damaged or incomplete"):  # it has no pixels
            load_photo(path, 64, 64)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(InputError, match="not a regular file"):
        load_photo(tmp_path / "pipe.png", 64, 64)


def test_an_unreadable_photo_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "secret.png")

    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(InputError, match=r"secret\.png.*permission denied\. Check its access rights"):
        load_photo(path, 64, 64)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_a_damaged_photo_gives_an_input_error_or_a_picture_and_nothing_else(data: st.DataObject) -> None:
    buffer = io.BytesIO()
    form = data.draw(st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "BMP"]))
    Image.fromarray(corners(32, 32)).save(buffer, form)
    content = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(0, 5))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    del content[data.draw(st.integers(1, len(content))) :]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "damaged.bin"
        path.write_bytes(content)
        try:
            assert load_photo(path, 16, 16).shape == (16, 16, 3)
        except InputError as error:
            assert str(path) in str(error)


@pytest.mark.parametrize(
    "array",
    [np.zeros((32, 32, 3), np.float32), np.zeros((32, 32, 2), np.uint8), np.zeros((1, 32, 32, 3), np.uint8)],
    ids=["float", "two channels", "a batch"],
)
def test_arrays_of_another_kind_are_usage_errors(array: np.ndarray) -> None:
    with pytest.raises(UsageError, match="uint8 with shape"):
        load_photo(array, 32, 32)


def test_unknown_fit_and_impossible_size_are_usage_errors() -> None:
    with pytest.raises(UsageError, match="cover, contain, stretch"):
        load_photo(noise(32, 32, 3), 32, 32, "fill")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="0x32"):
        load_photo(noise(32, 32, 3), 32, 0)


# --- lean --------------------------------------------------------------------------------------------------------


def test_importing_media_loads_neither_pillow_nor_pyav() -> None:
    code = (
        "import sys, dynamictrl_edge.runtime.media.pose, dynamictrl_edge.runtime.media.writer\n"
        "print(sorted({'av', 'PIL', 'torch', 'onnx', 'transformers', 'diffusers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

import json

import pytest
import torch
import torch.nn.functional as F

from millrace.engine.config import AttentionAlignment, Teacher
from millrace.engine.encoders import teacher as module
from millrace.engine.encoders.small_classifier import SmallClassifier, save_classifier
from millrace.engine.encoders.teacher import open_teacher, vision_entry
from millrace.engine.util.errors import UserError

CPU = torch.device("cpu")
SIZES = [(32, 32), (48, 16), (32, 32), (16, 48)]
GRIDS = [(2, 2), (3, 1), (2, 2), (1, 3)]
KEYS = ["a", "b", "c", "d"]


def pictures(sizes=SIZES):
    torch.manual_seed(1)
    return [torch.rand(3, *size) * 2 - 1 for size in sizes]


def save_teacher(kind, folder):
    if kind != "classifier":
        pytest.importorskip("transformers")
        return vision_entry(kind).tiny(folder)
    torch.manual_seed(0)
    return save_classifier(SmallClassifier(10, 4), folder)


def settings(kind, folder, **changes):
    return Teacher(kind=kind, path=str(folder), **{"dtype": "float32", **changes})


def opened(kind, folder, attention=None, data="", **changes):
    return open_teacher(settings(kind, folder, **changes), CPU, attention, data)


@pytest.mark.parametrize("resize", ["bicubic", "nearest"])
@pytest.mark.parametrize(("kind", "patch"), [("dinov2", 14), ("dinov3", 16), ("classifier", 4)])
def test_one_row_for_each_token_in_the_order_of_the_layout(tmp_path, kind, patch, resize):
    teacher = opened(kind, save_teacher(kind, tmp_path), resize=resize)
    assert teacher.patch == patch
    found = teacher.features(pictures(), GRIDS, KEYS)
    assert found.attention == []
    assert found.tokens.dtype == torch.float32
    rows = found.tokens.split([rows * columns for rows, columns in GRIDS])
    for image, (height, width), row in zip(pictures(), GRIDS, rows, strict=True):
        mode = {"mode": "bicubic", "antialias": True} if resize == "bicubic" else {"mode": "nearest"}
        fitted = F.interpolate(image[None], size=(height * patch, width * patch), **mode)
        with torch.no_grad():
            if kind == "classifier":
                expected = teacher.network.features(fitted)[0].flatten(1).T
            else:
                expected = teacher.dino.patch_tokens(fitted)[0]
        assert row.shape == (height * width, teacher.dim)
        torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-5)


def test_a_picture_that_fits_is_not_resized(tmp_path, monkeypatch):
    teacher = opened("dinov3", save_teacher("dinov3", tmp_path))
    monkeypatch.setattr(module.F, "interpolate", None)
    assert teacher.features(pictures(), GRIDS, KEYS).tokens.shape == (14, 32)


def test_nearest_is_the_default_interpolation_by_a_factor_of_photoroom(tmp_path):
    """prx/algorithm/repa.py resizes by teacher patch / denoiser ratio with interpolate's default mode."""
    teacher = opened("dinov2", save_teacher("dinov2", tmp_path), resize="nearest")
    (image,) = pictures([(64, 96)])
    expected = F.interpolate(image[None], scale_factor=14 / 16)
    assert torch.equal(teacher._fit(image[None], (4, 6)), expected)


def test_pictures_of_one_size_go_through_together(tmp_path, monkeypatch):
    teacher = opened("classifier", save_teacher("classifier", tmp_path))
    sizes, compute = [], teacher._compute

    def counted(stack):
        sizes.append(len(stack))
        return compute(stack)

    monkeypatch.setattr(teacher, "_compute", counted)
    teacher.features(pictures(), GRIDS, KEYS)
    assert sorted(sizes) == [1, 1, 2]


def test_attention_of_the_named_layers(tmp_path):
    attention = AttentionAlignment(weight=0.5, blocks=(0, 1), teacher_layers=(2, 0), heads=3)
    teacher = opened("dinov3", save_teacher("dinov3", tmp_path), attention)
    found = teacher.features(pictures(), GRIDS, KEYS)
    assert [(q.shape, k.shape) for q, k in found.attention] == [((14, 3, 8), (14, 3, 8))] * 2
    start = 4
    with torch.no_grad():
        _, expected = teacher.dino.tokens_and_attention(pictures()[1][None], (2, 0))
    for (q, k), (one_q, one_k) in zip(found.attention, expected, strict=True):
        torch.testing.assert_close(q[start : start + 3], one_q[0, :, :3], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(k[start : start + 3], one_k[0, :, :3], rtol=1e-4, atol=1e-5)


def test_last_layers_by_default(tmp_path):
    attention = AttentionAlignment(weight=0.5, blocks=(4, 5), heads=4)
    assert opened("dinov2", save_teacher("dinov2", tmp_path), attention).layers == (1, 2)
    off = AttentionAlignment(weight=0)
    assert opened("dinov2", tmp_path, off).layers == ()


def test_bfloat16(tmp_path):
    exact = opened("classifier", save_teacher("classifier", tmp_path)).features(pictures(), GRIDS, KEYS)
    found = opened("classifier", tmp_path, dtype="bfloat16").features(pictures(), GRIDS, KEYS)
    assert found.tokens.dtype == torch.bfloat16
    assert (found.tokens.float() - exact.tokens).norm() / exact.tokens.norm() < 0.05


def test_features_carry_no_gradient(tmp_path):
    images = [image.requires_grad_() for image in pictures()]
    assert (
        not opened("dinov3", save_teacher("dinov3", tmp_path))
        .features(images, GRIDS, KEYS)
        .tokens.requires_grad
    )


def test_cache_keeps_features_exactly(tmp_path, monkeypatch):
    save_teacher("classifier", tmp_path / "teacher")
    cache = str(tmp_path / "cache")
    uncached = opened("classifier", tmp_path / "teacher").features(pictures(), GRIDS, KEYS).tokens
    first = opened("classifier", tmp_path / "teacher", cache=cache)
    assert torch.equal(first.features(pictures()[:3], GRIDS[:3], KEYS[:3]).tokens, uncached[:11])
    again = opened("classifier", tmp_path / "teacher", cache=cache)
    seen, compute = [], again._compute

    def counted(stack):
        seen.append(len(stack))
        return compute(stack)

    monkeypatch.setattr(again, "_compute", counted)
    assert torch.equal(again.features(pictures(), GRIDS, KEYS).tokens, uncached)
    assert seen == [1]
    again.features(pictures(), GRIDS, KEYS)
    assert seen == [1]
    # The same picture at another size, or with tokens of another size, is another entry.
    again.features([F.interpolate(pictures()[0][None], size=64)[0]], [(2, 2)], ["a"])
    again.features(pictures()[:1], [(4, 4)], ["a"])
    assert seen == [1, 1, 1]


def one_line(caught):
    assert "\n" not in str(caught.value)


def test_cache_of_another_teacher_or_data_set_is_refused(tmp_path):
    cache = str(tmp_path / "cache")
    save_teacher("classifier", tmp_path / "teacher")
    opened("classifier", tmp_path / "teacher", cache=cache, data="digits 16")
    opened("classifier", tmp_path / "teacher", cache=cache, data="digits 16")
    with pytest.raises(UserError, match=r"cache.* is of the data 'digits 16', not of 'digits 32'") as caught:
        opened("classifier", tmp_path / "teacher", cache=cache, data="digits 32")
    one_line(caught)
    with pytest.raises(UserError, match=r"is of the teacher .*float32.*, not of .*bfloat16") as caught:
        opened("classifier", tmp_path / "teacher", cache=cache, data="digits 16", dtype="bfloat16")
    one_line(caught)
    torch.manual_seed(7)
    save_classifier(SmallClassifier(10, 4), tmp_path / "teacher")
    with pytest.raises(UserError, match=r"cache.* is of the teacher") as caught:
        opened("classifier", tmp_path / "teacher", cache=cache, data="digits 16")
    one_line(caught)


@pytest.mark.parametrize("content", ["{", "[]", json.dumps({"format": 0})])
def test_a_folder_that_is_no_cache_is_refused(tmp_path, content):
    save_teacher("classifier", tmp_path / "teacher")
    (tmp_path / "cache.json").write_text(content)
    with pytest.raises(UserError, match=r"alignment\.teacher\.cache .*; name another folder") as caught:
        opened("classifier", tmp_path / "teacher", cache=str(tmp_path))
    one_line(caught)


def test_spoiled_features_name_the_file(tmp_path):
    teacher = opened("classifier", save_teacher("classifier", tmp_path / "t"), cache=str(tmp_path / "cache"))
    teacher.features(pictures(), GRIDS, KEYS)
    for path in (tmp_path / "cache").rglob("*.safetensors"):
        path.write_bytes(b"x" * 20)
    with pytest.raises(UserError, match=r"unreadable features .*; delete that file") as caught:
        teacher.features(pictures(), GRIDS, KEYS)
    one_line(caught)


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        (
            {"blocks": (0,), "teacher_layers": (3,), "heads": 4},
            "names layer 3, .* has 3 layers; the last is 2",
        ),
        ({"blocks": (0, 1, 2, 3), "heads": 4}, "names 4 blocks, .* has 3 layers"),
        ({"blocks": (0,), "heads": 5}, "heads is 5, .* has 4 heads; set it to 4 or less"),
    ],
)
def test_layers_and_heads_that_the_teacher_lacks_are_refused(tmp_path, attention, message):
    save_teacher("dinov2", tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        opened("dinov2", tmp_path, AttentionAlignment(weight=0.5, **attention))
    one_line(caught)


def test_classifier_without_a_path_is_refused():
    with pytest.raises(UserError, match=r"set alignment\.teacher\.path") as caught:
        open_teacher(Teacher(kind="classifier"), CPU)
    one_line(caught)


@pytest.mark.cuda
def test_on_its_own_stream_as_on_the_host(tmp_path):
    path = save_teacher("dinov3", tmp_path)
    attention = AttentionAlignment(weight=0.5, blocks=(0, 1), heads=4)
    expected = opened("dinov3", path, attention).features(pictures(), GRIDS, KEYS)
    teacher = open_teacher(settings("dinov3", path), torch.device("cuda"), attention)
    for _ in range(3):
        images = [image.cuda() for image in pictures()]
        found = teacher.features(images, GRIDS, KEYS)
        # Memory that is given back too early would be overwritten here.
        del images
        torch.full((1 << 20,), float("nan"), device="cuda")
        torch.testing.assert_close(found.tokens.cpu(), expected.tokens, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(
            found.attention[0][0].cpu(), expected.attention[0][0], rtol=1e-3, atol=1e-3
        )

"""Tests: on a CPU, without network, in two minutes.

You changed a loss: test_terms_by_hand and test_gradients_flow_one_way are its arithmetic, and the README has SimSiam's
once more (test_the_method_on_a_page). All else should pass. You dropped BYOL or SimCLR: shorten METHODS.
Several ranks: `pytest -k ranks`, or all but these: `pytest -k "not ranks"`. What needs CUDA, and skips without it:
`pytest -m skipif`. All other tests see no CUDA, even where there is one.
"""
import contextlib
import copy
import functools
import gc
import importlib
import inspect
import io
import itertools
import json
import math
import os
import re
import shlex
import socket
import subprocess
import sys
import weakref
from collections import defaultdict
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from einops import rearrange
from PIL import Image, ImageEnhance, ImageOps, features
from torch import nn
from torchvision import models, transforms

import augment
import linear_eval
import simsiam_dssl as simsiam
from augment import OPS, SPACES, EvalLoader, Jigsaw, RandAugment, TrainLoader, parse_policy, standard

METHODS = {"simsiam_dssl": "SimSiam", "byol_dssl": "BYOL", "simclr_dssl": "SimCLR"}  # script: its model
MODULES = list(map(importlib.import_module, METHODS))
cases = pytest.mark.parametrize
assert_same = functools.partial(torch.testing.assert_close, rtol=0, atol=0)
each_method = cases("m", MODULES)
ROOT = Path(augment.__file__).parent
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.fixture(autouse=True)
def seeded_and_on_cpu(request):
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        if not request.node.get_closest_marker("skipif"):  # others compare bits, or start several ranks
            patch.setattr(torch.cuda, "is_available", lambda: False)
            patch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
            patch.setenv("CUDA_VISIBLE_DEVICES", "")  # for processes that a test starts
        yield
    if dist.is_initialized():  # all runs of a test are in one process group, as those of a notebook
        dist.destroy_process_group()


def seeded(function, *args):
    torch.manual_seed(0)
    return function(*args)


def refusal(function, *args):
    """The one line with which it ends: an error's, sys.exit's or, after one line of usage, argparse's."""
    with contextlib.redirect_stderr(io.StringIO()) as text, pytest.raises((SystemExit, OSError, ValueError)) as end:
        function(*args)
    argparse = isinstance(end.value, SystemExit) and end.value.code == 2
    line, = text.getvalue().splitlines()[1:] if argparse else str(end.value).splitlines()
    return line


def is_share(count, n, p):  # within five standard deviations
    return abs(count - n * p) <= 5 * math.sqrt(n * p * (1 - p))


def is_spread(values, low, high):  # as uniform numbers are
    u = (torch.tensor(values) - low) / (high - low)
    quarters = all(is_share((u < q).sum(), len(u), q) for q in (0.25, 0.5, 0.75))
    return quarters and -1e-6 <= u.min() < 0.02 and 0.98 < u.max() <= 1 + 1e-6


def images(h=32, w=32):
    """Six uint8 images: smooth, smooth and pale, smooth with noise, noise, one colour, two levels."""
    g = torch.Generator().manual_seed(0)
    noise, tint = torch.rand(6, 3, h, w, generator=g), torch.rand(6, 3, 1, 1, generator=g)
    wave = 0.5 + 0.5 * (9 * (tint * torch.linspace(0, 1, w) + (1 - tint) * torch.linspace(0, 1, h)[:, None])).sin()
    x = [wave[0], 0.3 + 0.3 * wave[1], 0.7 * wave[2] + 0.3 * noise[2], noise[3], tint[4].expand(3, h, w),
         0.3 + 0.4 * (noise[5] > 0.5)]
    return (torch.stack(x) * 255).round().byte()


def write_images(root, train, val, classes, draw):
    """train/class0/0.png and so on: image i is of class i % classes and has the levels draw(i), (h, w, 3)."""
    for split, n in (("train", train), ("val", val)):
        for i in range(n):
            path = root / split / f"class{i % classes}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draw(i).to(torch.uint8).numpy()).save(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """36 training and 10 test images of 3 classes, 20 × 16 px: noise, for class c a little brighter in channel c."""
    root, g = tmp_path_factory.mktemp("images"), torch.Generator().manual_seed(0)
    write_images(root, 36, 10, 3, lambda i: torch.randint(0, 200, (16, 20, 3), generator=g) + 40 * torch.eye(3)[i % 3])
    return root


def link(path, to):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(to)


def load_folder(path, size=16):
    return augment.load_data(str(path), "", size)


# ------------------------------------------------------------ losses

TERMS = [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]


def arguments(m):
    """Of its loss, in pairs: z, z_hat for SimCLR, or else p, z, p_hat, z_hat."""
    n, g = 2 if m.__name__ == "simclr_dssl" else 4, torch.Generator().manual_seed(0)
    return [[torch.randn(5, 8, generator=g, dtype=torch.float64).requires_grad_() for _ in range(2)] for _ in range(n)]


def cosine(pair, others):  # negative, the mean over the rows of both
    rows = list(zip(torch.cat(pair), torch.cat(others)))
    return sum(-(x @ y / x.norm() / y.norm()).item() for x, y in rows) / len(rows)


def naive_nt_xent(z1, z2, t):
    z, n = [(x / x.norm()).detach() for x in [*z1, *z2]], len(z1)
    e = [[math.exp(a @ b / t) for b in z] for a in z]
    return -sum(math.log(e[i][(i + n) % (2 * n)] / (sum(e[i]) - e[i][i])) for i in range(2 * n)) / (2 * n)


@each_method
def test_terms_by_hand(m):
    pairs = arguments(m)
    if m.__name__ == "simclr_dssl":
        (z, z_hat), (p, p_hat), temperature = pairs, pairs, [0.2]  # a term with a direction takes projections alone
        both = naive_nt_xent(*z, 0.2), naive_nt_xent(*z_hat, 0.2)
    else:
        (p, z, p_hat, z_hat), temperature = pairs, []
        both = cosine(p, z[::-1]), cosine(p_hat, z_hat[::-1])  # each view and the other one
    expected = [*both, cosine(p_hat, z), cosine(p, z_hat)]  # each HV and its own SV
    for weights in [*TERMS, (1, 1, 1, 1), (1, 0, 0.7, 0.3)]:
        value = m.dssl_loss(*pairs, *temperature, weights)
        assert value.item() == pytest.approx(sum(w * e for w, e in zip(weights, expected)), abs=1e-5)
    assert m.dssl_loss(*pairs, *temperature).item() == pytest.approx(expected[0] + expected[2], abs=1e-5)
    plain = m.dssl_loss(*pairs[: len(pairs) // 2], weights=(1, 0, 0, 0)).item()  # without HVs
    assert plain == pytest.approx(naive_nt_xent(*z, 0.5) if temperature else expected[0], abs=1e-5)
    with pytest.raises(IndexError):  # tensors for pairs, of which only two rows would count
        m.dssl_loss(*[x for x, _ in pairs], *temperature)


@each_method
@cases("weights, learner", list(zip(TERMS, ["SV", "HV", "HV", "SV"])))
def test_gradients_flow_one_way(m, weights, learner):
    """Into the predictions of whom the arrow starts at, in SimCLR into the projections; never into a target."""
    pairs = arguments(m)
    m.dssl_loss(*pairs, weights=weights).backward()
    for name, pair in zip(["SV", "HV"] if len(pairs) == 2 else ["SV", "target", "HV", "target"], pairs):
        assert [x.grad is not None and x.grad.any().item() for x in pair] == [name == learner] * 2


@cases("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
@each_method
def test_loss_pasted_into_an_empty_file(m, device):
    """And there taken in float, whatever the input or the caller's autocast: images may be nearly equal."""
    sources = [inspect.getsource(getattr(m, name)) for name in ("D", "nt_xent", "dssl_loss") if hasattr(m, name)]
    pasted, weights, centre = {}, (1, 1, 1, 1), torch.randn(1, 64)
    exec("\n".join(["import torch", "import torch.nn.functional as F", *sources]), pasted)
    loss = pasted["dssl_loss"]
    for dtype in (torch.bfloat16, torch.float16):
        half = [[(centre + 0.05 * torch.randn(256, 64)).to(device, dtype) for _ in pair] for pair in arguments(m)]
        full = [[x.float() for x in pair] for pair in half]
        value = loss(*full, weights=weights)
        with torch.autocast(device, dtype):
            again = loss(*full, weights=weights)
        assert again.dtype == torch.float32 and again.item() == value.item()
        assert loss(*half, weights=weights).item() == pytest.approx(value.item(), abs=1e-6)


# ------------------------------------------------------------ views

AFFINE = Image.Transform.AFFINE
PILLOW = {  # name: (Pillow's own, magnitudes, by how many levels we may differ)
    "AutoContrast": (lambda i, v: ImageOps.autocontrast(i), [0], 1),
    "Equalize": (lambda i, v: ImageOps.equalize(i), [0], 0),
    "Invert": (lambda i, v: ImageOps.invert(i), [0], 0),
    "Posterize": (lambda i, v: ImageOps.posterize(i, max(1, int(v))), [0, 1, 2.7, 4, 8], 0),
    "Solarize": (lambda i, v: ImageOps.solarize(i, v), [0, 77, 128, 200.5, 256], 0),
    "SolarizeAdd": (lambda i, v: ImageOps.solarize(i.point(lambda p: min(255, p + int(v))), 128), [0, 36.6, 110], 0),
    **{name: (lambda i, v, enhance=getattr(ImageEnhance, name): enhance(i).enhance(v), [0.1, 0.7, 1, 1.9], 1)
       for name in ("Color", "Contrast", "Brightness", "Sharpness")},
    "Rotate": (lambda i, v: i.rotate(v), [-30, -7.3, 0, 12, 25], 0),
    "ShearX": (lambda i, v: i.transform(i.size, AFFINE, (1, v, 0, 0, 1, 0)), [-0.3, -0.11, 0, 0.21], 0),
    "ShearY": (lambda i, v: i.transform(i.size, AFFINE, (1, 0, 0, v, 1, 0)), [-0.3, -0.11, 0, 0.21], 0),
    "TranslateX": (lambda i, v: i.transform(i.size, AFFINE, (1, 0, v, 0, 1, 0)), [-50, -9.2, 0, 3.7, 10], 0),
    "TranslateY": (lambda i, v: i.transform(i.size, AFFINE, (1, 0, 0, 0, 1, v)), [-50, -9.2, 0, 3.7, 10], 0)}
MOVES = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")


@cases("name", PILLOW)
def test_operation_is_pillows(name):
    pillow, magnitudes, levels = PILLOW[name]
    x, v = images(24, 40), torch.tensor(magnitudes).repeat_interleave(6).float()
    ours = OPS[name](x.repeat(len(magnitudes), 1, 1, 1) / 255, v)
    theirs = torch.stack([TF.pil_to_tensor(pillow(TF.to_pil_image(i), v)) for v in magnitudes for i in x])
    close = (ours * 255 - theirs).abs() <= levels + 1e-3
    assert close.float().mean((1, 2, 3)).min() >= (0.98 if name in MOVES else 1)  # Pillow's steps are fixed-point there


def test_cutout():
    v = torch.tensor([0.0, 3.5, 8, 20]).repeat(1000)
    y = OPS["Cutout"](torch.zeros(4000, 3, 32, 32), v)
    hole = y[:, 0] > 0
    assert torch.allclose(y.movedim(1, 3)[hole], torch.tensor([125, 123, 114]) / 255)
    count = hole.sum((1, 2)).float()
    assert (count[v == 0] == 0).all() and (count <= (v.floor() + 1) ** 2).all()
    assert count[v == 8].mean() == pytest.approx(((28 * 9 + 8 + 7 + 6 + 5) / 32) ** 2, rel=0.03)  # 28 of 32 columns fit
    assert len(hole[v == 8].unique(dim=0)) > 400


@cases("size", [12, 80])
def test_crop_is_pillows(size):
    x = images(40, 56).repeat(4, 1, 1, 1)
    boxes = augment.crop_boxes(len(x), 40, 56, (0.2, 1.0), generator=torch.Generator().manual_seed(1))
    crops = [TF.to_pil_image(i).crop((x0, y0, x0 + w, y0 + h)) for i, (x0, y0, w, h) in zip(x, boxes.tolist())]
    theirs = torch.stack([TF.pil_to_tensor(c.resize((size, size), Image.Resampling.BILINEAR)) for c in crops])
    ours = augment.random_resized_crop(x, size, (0.2, 1.0), torch.Generator().manual_seed(1))
    floats = augment.random_resized_crop(x / 255, size, (0.2, 1.0), torch.Generator().manual_seed(1))
    assert ours.dtype == torch.uint8 and (ours.int() - theirs.int()).abs().max() <= 1
    assert floats.dtype == torch.float32 and (floats * 255 - ours).abs().max() <= 0.501


def test_crop_boxes_are_torchvisions():
    """They go everywhere, and where no candidate fits, the largest box of a legal ratio lies in the middle."""
    h, w, scale, ratio, draw = 96, 120, (0.2, 1.0), (3 / 4, 4 / 3), transforms.RandomResizedCrop.get_params
    ours = augment.crop_boxes(4000, h, w, scale)
    theirs = torch.tensor([draw(torch.empty(3, h, w), scale, ratio) for _ in range(4000)])
    left, top, width, height = ours.T
    area, aspect = width * height / (h * w), width / height
    assert 0.19 < area.min() < 0.22 and 0.72 < aspect.min() < 0.77 and 1.3 < aspect.max() < 1.37
    for mine, other in zip((top, left, height, width, area), (*theirs.T, theirs[:, 2] * theirs[:, 3] / (h * w))):
        error = (mine.float().var() + other.float().var()).sqrt() / 4000 ** 0.5
        assert abs(mine.float().mean() - other.float().mean()) < 5 * error
    left, top, width, height = augment.crop_boxes(5000, 8, 8, scale=(0.25, 0.25), ratio=(1, 1)).T
    assert {*width.tolist(), *height.tolist()} == {4}
    assert all(is_share(count, 5000, 1 / 25) for count in (5 * left + top).bincount(minlength=25))
    assert augment.crop_boxes(2, 10, 101, scale=(1, 1)).tolist() == [[44, 0, 13, 10]] * 2
    assert augment.crop_boxes(2, 101, 10, scale=(1, 1)).tolist() == [[0, 44, 10, 13]] * 2


def test_hue_blur_and_normalize_are_torchvisions():
    x, v = images().repeat(4, 1, 1, 1) / 255, torch.linspace(-0.5, 0.5, 24)
    theirs = torch.stack([TF.adjust_hue(i, float(turn)) for i, turn in zip(x, v)])
    assert torch.allclose(augment.hue(x, v), theirs, atol=1e-4)
    theirs = TF.normalize(x, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert torch.allclose(augment.normalize(x), theirs, atol=1e-6)
    x, sigma = images(48, 40) / 255, torch.tensor([0.1, 0.4, 0.9, 1.3, 1.7, 2.0])
    theirs = torch.stack([TF.gaussian_blur(i, 29, float(s)) for i, s in zip(x, sigma)])
    error = (augment.gaussian_blur(x, sigma) - theirs).abs()
    assert error[..., 14:-14, 14:-14].max() < 1e-5 and error[4].max() < 1e-5  # one colour stays, up to the borders


@cases("on", [True, False])
def test_standard_draws(monkeypatch, on):
    sigmas, n = [], 4000
    monkeypatch.setattr(augment, "color_jitter", torch.clone)
    monkeypatch.setattr(augment, "gaussian_blur", lambda x, v: sigmas.extend(v.tolist()) or x)
    x = torch.tensor([[51, 204], [128, 26], [76, 153]], dtype=torch.uint8)[:, None].expand(n, 3, 1, 2)
    y = seeded(standard, x, on, on)
    assert is_share(len(sigmas), n, 0.5 * on) and (not on or is_spread(sigmas, 0.1, 2))
    grey = (y[:, 0] == y[:, 1]).all((1, 2))
    assert is_share(grey.sum(), n, 0.2)
    mirrored = (y[~grey] == x[0].flip(2) / 255).all(3).all((1, 2))
    assert is_share(mirrored.sum(), len(mirrored), 0.5 * on)
    assert torch.equal(y, seeded(standard, x / 255, on, on))  # bytes or fractions


def test_jitter_is_its_operations():
    x = images().repeat(400, 1, 1, 1)[..., ::8, ::8] / 255
    ours = seeded(augment.color_jitter, x)
    torch.manual_seed(0)  # the same draws again, by the paper's numbers
    factor = (torch.rand(2400, 4) * 2 - 1) * torch.tensor([0.4, 0.4, 0.4, 0.1]) + torch.tensor([1, 1, 1, 0])
    order, apply = torch.rand(2400, 4).argsort(1), torch.rand(2400) < 0.8
    functions = [OPS["Brightness"], OPS["Contrast"], OPS["Color"], augment.hue]
    for i in range(0, 2400, 5):
        one = x[i : i + 1]
        for k in order[i].tolist() if apply[i] else ():
            one = functions[k](one, factor[i : i + 1, k])
        assert torch.allclose(ours[i : i + 1], one, atol=2 / 255), i  # a grey may round to another level
    assert len(order.unique(dim=0)) == 24


POLICIES = "ra(2,5)", "ra(2,5,paper)", "ua", "jigsaw(4)", "ra(8,16)+jigsaw(4)", "0.9*ra(2,5)|0.1*jigsaw(4)"
VIEWS = {text: parse_policy(text) for text in POLICIES} | {
    "crop": lambda x: augment.random_resized_crop(x, 24), "jitter": augment.color_jitter,
    "standard": lambda x: standard(x, blur=True)}
each_view = cases("view", VIEWS.values(), ids=VIEWS)


@each_view
def test_a_view_depends_on_its_image_alone(view):
    """And its own draws: not on neighbours, memory format, autocast or who came first. A gradient can go through."""
    x, others = images().repeat(4, 1, 1, 1) / 255, torch.rand(24, 3, 32, 32)
    y, others[::5] = seeded(view, x), x[::5]
    assert torch.equal(seeded(view, others)[::5], y[::5])
    for same in (x.to(memory_format=torch.channels_last), x.repeat_interleave(2, 3)[..., ::2]):
        assert torch.allclose(seeded(view, same), y, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(seeded(view, x), y)
    assert len(view(images()[2].expand(64, 3, 32, 32) / 255).unique(dim=0)) > 32
    with torch.inference_mode():
        augment.normalize(view(x.double()))
    y = augment.normalize(view(x.double().requires_grad_()))
    y.square().sum().backward()
    assert y.dtype == torch.float64


@needs_cuda
@each_view
def test_cuda_gives_the_same_without_a_wait(view):
    x = images().repeat(32, 1, 1, 1) / 255
    on_host, on_device = seeded(view, x), x.cuda()
    seeded(view, on_device)  # kernels are loaded and constants made
    torch.manual_seed(0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        y = view(on_device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert ((y.cpu() - on_host).abs() <= 2 / 255).float().mean() >= 0.98


def record(monkeypatch):
    """Operations then only note their magnitudes: {name: [v, …]}."""
    drawn = defaultdict(list)
    for name in OPS:
        monkeypatch.setitem(OPS, name, lambda x, v, name=name: drawn[name].extend(v.tolist()) or x)
    return drawn


@cases("policy, space, count", [("ra(2,5)", "released", 16), ("ra(2,5,paper)", "paper", 14), ("ua", "uniform", 15)])
def test_policies_draw_evenly(policy, space, count, monkeypatch):
    drawn, n = record(monkeypatch), 16000
    parse_policy(policy)(torch.zeros(n // 2, 3, 10, 40))
    total = sum(map(len, drawn.values()))
    assert is_share(total, n, 0.5) if space == "uniform" else total == n
    assert drawn.keys() == SPACES[space].keys() and len(drawn) == count
    for name, v in drawn.items():
        assert is_share(len(v), total, 1 / count)
        assert name not in MOVES or is_share(sum(value < 0 for value in v), len(v), 0.5)
        side = {"TranslateX": 40, "TranslateY": 10, "Cutout": 40}.get(name, 1)  # its ranges are shares of these
        low, high = (end * side for end in SPACES[space][name])
        assert space != "uniform" or (is_spread(v, low, high) if low < high else set(v) == {0})
    ends = [SPACES["uniform"][name] for name in ("TranslateX", "TranslateY", "Cutout", "Posterize")]
    assert ends == [(-0.45, 0.45), (-0.45, 0.45), (0, 0.2), (4, 8)]


@cases("space, m, magnitudes", [
    ("released", 15, {"Rotate": {-15, 15}, "Posterize": {2}, "Solarize": {128}, "SolarizeAdd": {55}, "Color": {1},
                      "Sharpness": {1}, "ShearX": {-0.15, 0.15}, "Cutout": {20}, "TranslateX": {-50, 50},
                      "TranslateY": {-50, 50}}),
    ("released", 0, {"Rotate": {0}, "Posterize": {0}, "Solarize": {0}, "Contrast": {0.1}, "TranslateX": {0}}),
    ("paper", 30, {"Rotate": {-30, 30}, "Posterize": {4.5}, "Solarize": {0}, "Color": {0.1, 1.9}, "ShearY": {-0.3, 0.3},
                   "TranslateX": {-18.1269, 18.1269}, "TranslateY": {-9.0634, 9.0634}})])  # 150 / 331 of 40 and 20
def test_randaugment_magnitudes(monkeypatch, space, m, magnitudes):
    drawn = record(monkeypatch)
    RandAugment(2, m, space)(torch.zeros(500, 3, 20, 40))
    assert {name: {round(v, 4) for v in drawn[name]} for name in magnitudes} == magnitudes


@cases("n", [1, 2, 4, 8])
def test_jigsaw_moves_whole_tiles_evenly(n):
    x, cut = torch.arange(3 * 8 * 16).view(1, 3, 8, 16), "b c (i y) (j x) -> b (i j) (c y x)"
    tiles, whole = (rearrange(y, cut, i=n, j=n) for y in (Jigsaw(n)(x.expand(4000, 3, 8, 16)), x))
    shown = (tiles[:, :, :1] == whole[:, :, 0]).int().argmax(2)  # which tile each place shows
    assert torch.equal(tiles, whole[0, shown])
    assert torch.equal(shown.sort(1).values, torch.arange(n * n).expand(4000, -1))
    count = (n * n * torch.arange(n * n) + shown).flatten().bincount(minlength=n**4)  # of each tile at each place
    assert all(is_share(c, 4000, 1 / n**2) for c in count.tolist())


@cases("text, part", [
    ("", "''"), ("ra(2)", "'ra(2)'"), ("ra(2,50)", "ra(2,50"), ("ra(0,5)", "ra(0,5"), ("foo", "'foo'"),
    ("ra(2,5)+", "read ''"), ("0.9*ra(2,5)|0.2*ua", "add up to 1"), ("0.9*ra(2,5)|ua", "every branch"),
    ("ra(2,5,blue)", "'blue'"), ("jigsaw(0)", "jigsaw(0)"), ("x*ua", "'x'"), ("ua|ua+jigsaw(3)", "jigsaw(3)")])
def test_bad_policy(text, part):
    assert part in refusal(parse_policy, text, 32)
    for h, w in ((32, 40), (40, 32)):  # where the size was not known beforehand
        assert "jigsaw(16) needs sides that 16 divides, not" in refusal(Jigsaw(16), torch.zeros(1, 3, h, w))


def test_policy_order_and_chances():
    x, policy = images() / 255, parse_policy("RA(2, 5) + Jigsaw(4)")  # also as the paper writes it
    assert torch.equal(seeded(policy, x), seeded(lambda x: Jigsaw(4)(RandAugment(2, 5)(x)), x))
    assert parse_policy("ua|jigsaw(4)")(x[:0]).shape == (0, 3, 32, 32)
    x = torch.arange(64.0).expand(4000, 3, 64).view(4000, 3, 8, 8)
    for text, p in (("0.9*jigsaw(1)|0.1*jigsaw(4)", 0.1), ("jigsaw(1)|jigsaw(4)|jigsaw(1)", 1 / 3)):
        assert is_share((parse_policy(text)(x) != x).any(3).any((1, 2)).sum(), len(x), p)


# ------------------------------------------------------------ data

@cases("size", [16, 72])  # in memory, streamed
def test_train_loader(size, folder):
    train, _ = load_folder(folder, size)

    def epoch(number, order=None, seed=3, **place):
        loader = TrainLoader(train, 12, 2, size, seed=seed, **place)
        loader.set_epoch(number)
        loader.order = order or loader.order
        return loader.order, list(loader)

    order, batches = epoch(1)
    assert len(batches) == 3 and sorted(sum(order, [])) == list(range(36))
    assert order not in (epoch(2)[0], epoch(1, seed=4)[0])
    for (x, y), (again, _) in zip(batches, epoch(1)[1]):
        assert x.shape == (12, 2, 3, size, size) and x.dtype == torch.uint8 and torch.equal(x, again)
        assert not torch.equal(x[:, 0], x[:, 1])  # two crops of an image differ
        assert (x.float().mean((1, 3, 4)).argmax(1) == y).all()  # the label is that image's
    a, b = (epoch(1, rank=rank, world=2)[0] for rank in range(2))
    assert [left + right for left, right in zip(a, b)] == order  # the ranks share each global batch
    (here, _), (later, _), (there, _) = (
        epoch(number, [[0, 1, 2]], rank=rank, world=2)[1][0] for number, rank in ((1, 0), (2, 0), (1, 1)))
    assert not torch.equal(here, later)
    assert torch.equal(here, there) == (size == 72)  # in memory a rank draws, streamed an image


@cases("size", [16, 72])
def test_eval_loader(size, folder):
    """Every image once, and on all ranks equally many: those that fill up have a label of -1."""
    _, test = load_folder(folder, size)
    assert torch.is_tensor(test.images) == (size == 16)
    for world in (1, 2, 3):
        batches = [list(EvalLoader(test, 4, size, rank=rank, world=world)) for rank in range(world)]
        assert all(x.dtype == torch.uint8 and x.shape[1:] == (3, size, size) for x, _ in sum(batches, []))
        seen = [torch.cat([y for _, y in share]).tolist() for share in batches]
        assert {len(labels) for labels in seen} == {-(-10 // world)}
        assert sorted(y for labels in seen for y in labels if y >= 0) == sorted(test.labels.tolist())
    many = augment.Data(["image.png"] * 300, torch.zeros(300), [])  # no batch is larger in memory than 256 of 224 px
    assert [len(EvalLoader(many, 256, size).order[0]) for size in (32, 224, 448, 10**5)] == [256, 256, 64, 1]


def test_many_small_images_are_streamed(folder, tmp_path, monkeypatch):
    """Memory is decided by the training set, for both; what evaluation shows follows from the size alone."""
    def evaluated(data, size=16):
        return torch.cat([x for x, _ in EvalLoader(data, 4, size)])

    kept = load_folder(folder)
    monkeypatch.setattr(augment, "MEMORY", 36 * 3 * 16 * 16 - 1)  # a byte less than the training set, not the test set
    streamed = load_folder(folder)
    for resident, paths in zip(kept, streamed):
        assert torch.is_tensor(resident.images) and isinstance(paths.images, list)
        assert torch.equal(evaluated(resident), evaluated(paths)) and torch.equal(resident.labels, paths.labels)
    assert isinstance(load_folder(folder / "train")[0].images, list)  # without labels
    link(tmp_path / "train", folder / "val")
    link(tmp_path / "val", folder / "train")  # a test set that alone would be too much
    assert all(torch.is_tensor(data.images) for data in load_folder(tmp_path))
    for size, shorter in ((64, 64), (72, 82)):
        by_hand = [augment.read_centre(path, size, shorter) for path in streamed[1].images]
        assert torch.equal(evaluated(streamed[1], size), torch.stack(by_hand))


def test_streamed_crops_are_pillows(tmp_path):
    image = Image.effect_noise((40, 30), 99).convert("RGB").resize((400, 300), Image.Resampling.BICUBIC)
    image.save(tmp_path / "image.png")
    (ours, _), = TrainLoader(augment.Data([str(tmp_path / "image.png")], None, []), 1, 50, 72, seed=5)
    boxes = augment.crop_boxes(50, 300, 400, (0.2, 1), generator=augment.generator(5, 0, 0)).tolist()
    for crop, (x, y, w, h) in zip(ours[0], boxes):
        theirs = TF.pil_to_tensor(image.crop((x, y, x + w, y + h)).resize((72, 72), Image.Resampling.BILINEAR))
        assert (crop.int() - theirs.int()).abs().max() <= 1


@cases("ranks, workers", [("", 2), ("0", 2), ("2", 1), ("8", 1)])
def test_workers_change_nothing(ranks, workers, folder, monkeypatch):
    """They are as many as the cores, here 2, shared by the ranks. And batches that people keep hold no file open."""
    def counted(*args, num_workers, real=torch.utils.data.DataLoader, **options):
        asked.append(num_workers)
        return real(*args, num_workers=num_workers, **options)

    asked, (train, test) = [], load_folder(folder, 72)
    monkeypatch.setattr(torch.utils.data, "DataLoader", counted)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    alone, many = (list(TrainLoader(train, 12, 2, 72, workers=n)) for n in (0, 5))
    assert len(many) == 3 and all(torch.equal(a, b) for (a, _), (b, _) in zip(alone, many))
    assert not any(t.is_shared() for batch in many + list(EvalLoader(test, 4, 72, workers=1)) for t in batch)
    assert asked == [0, workers, 1]


def test_glyphs_are_the_same_everywhere():
    (a, labels, classes), b, other = (augment.glyphs(50, 24, seed) for seed in (0, 0, 1))
    assert torch.equal(a, b.images) and not torch.equal(a, other.images) and labels.max() < len(classes) == 36
    assert a.shape == (50, 3, 24, 24) and a.dtype == torch.uint8 and a.float().std() > 20


def test_odd_images_are_read(tmp_path):
    """Levels of 16 or 32 bits are not cut off at 255, and not darkened; of floats nobody knows what is white."""
    x, ramp = Image.effect_noise((60, 40), 99), torch.arange(4096).view(64, 64)  # 12 bits, in a file of 16
    twelve = Image.fromarray(ramp.to(torch.uint16).numpy())
    files = [(x.convert("L"), "png"), (x.convert("CMYK"), "jpg"), (x.convert("P"), "gif"), (x.convert("1"), "png"),
             (x.convert("RGBA"), "png"), (x.resize((1, 1)), "png"), (x.resize((2000, 2)), "jpg"), (twelve, "png")]
    files += [(Image.new(mode, (60, 40), level), ending) for mode, level, ending in (
        ("I;16", 2**15, "png"), ("I;16", 2**15, "tif"), ("I;16B", 2**15, "tif"), ("I", 2**15, "tif"),
        ("I", 128, "tif"))]
    for i, (image, ending) in enumerate(files):
        image.save(path := str(tmp_path / f"odd.{ending}"))
        (crops, _), = TrainLoader(augment.Data([path], None, []), 1, 2, 72)
        centre = augment.read_centre(path, 72, 82)
        assert crops.shape == (1, 2, 3, 72, 72) and centre.shape == (3, 72, 72)
        assert i < 8 or centre.unique().tolist() == [128]
        assert image is not twelve or torch.equal(TF.pil_to_tensor(augment.read_image(path))[0].long(), ramp // 16)
    Image.fromarray((ramp / 4095).numpy()).save(tmp_path / "float.tif")
    assert "float.tif: its pixels are floats" in refusal(augment.read_image, tmp_path / "float.tif")


def test_photographs_stand_upright(tmp_path):
    """Six pixels, red at the top left as it is to be seen, whichever way the camera was held (EXIF)."""
    upright, exif = Image.new("RGB", (3, 2), "white"), Image.Exif()
    upright.putpixel((0, 0), (255, 0, 0))
    for exif[0x0112], turn in ((1, 0), (3, 180), (6, 90), (8, 270)):
        upright.rotate(turn, expand=True).save(tmp_path / "held.png", exif=exif)
        assert augment.read_image(tmp_path / "held.png").tobytes() == upright.tobytes(), turn
    upright.save(tmp_path / "broken.jpg", exif=b"Exif\x00\x00no TIFF")
    assert augment.read_image(tmp_path / "broken.jpg").size == (3, 2)


@cases("mode, ground, ink", [
    ("RGBA", (0, 0, 0, 0), (0, 0, 0, 255)), ("LA", (0, 0), (0, 255)), ("P", 1, 0), ("RGB", (1, 0, 0), (0, 0, 0)),
    ("L", 1, 0), *[("I;16", 1, 0)] * (Image.__version__ > "11")])  # which Pillow 10 reads, but cannot write
def test_what_is_transparent_is_white(mode, ground, ink, tmp_path):
    """Black ink at one pixel; the rest is seen through, by its alpha or by having the ground's level."""
    image = Image.new(mode, (4, 4), ground)
    image.putpixel((1, 2), ink)
    if mode == "P":
        image.putpalette([0, 0, 0, 9, 9, 9])
    image.save(tmp_path / "ink.png", **({} if "A" in mode else dict(transparency=ground)))
    found = TF.pil_to_tensor(augment.read_image(tmp_path / "ink.png"))
    assert (found[:, 2, 1] == 0).all() and (found == 255).sum() == 3 * 15


@pytest.fixture
def broken(folder, tmp_path):
    """Paths of five files that are no images, and of the 36 that are."""
    good = sorted(map(str, (folder / "train").rglob("*.png")))
    png = Path(good[0]).read_bytes()
    for name, content in dict(zero=b"", text=b"text", cut=png[: len(png) // 2], wrong=png[:60] + b"x" * 300).items():
        (tmp_path / f"{name}.png").write_bytes(content)
    link(tmp_path / "link.png", tmp_path / "nowhere")
    return sorted(map(str, tmp_path.iterdir())), good


def test_a_few_broken_images_end_no_run(broken, monkeypatch):
    """Each is named in one write: else, before the end of the line, there may be another process's."""
    (bad, good), written = broken, []
    monkeypatch.setattr("sys.stderr", type("Stream", (), dict(write=written.append, flush=lambda: None)))
    for paths, k in ((good + bad[:3], 36), (good * 17 + bad, 612)):  # the last are broken: 3 of 39, 5 of 617
        n, data = len(paths), augment.Data(paths, torch.arange(len(paths)), [])
        train = TrainLoader(data, 10, 1, 72)
        train.order = [list(range(n - 10, n))]  # the broken ones
        (crops, labels), = train  # each replaced by another
        assert len(crops) == 10 and labels.max() < k and crops.float().std((1, 2, 3, 4)).min() > 5
        labels = torch.cat([y for _, y in EvalLoader(data, 50, 72)])
        assert labels.tolist() == list(range(k)) + [-1] * (n - k)  # not counted
        images, readable = augment.read_all(paths, 16)
        assert len(images) == k and readable.tolist() == [True] * k + [False] * (n - k)
    packed = augment.pack(dict(a=bad[:1] + good[:20], b=good[20:]), 16, resident=True)
    assert packed.labels.tolist() == [0] * 20 + [1] * 16
    assert {re.fullmatch(r"WARNING: cannot read (.*?): .*\n", text)[1] for text in written} == set(bad)


def test_many_broken_images_stop_the_run(broken):
    bad, good = broken
    for paths in (good * 10 + bad, good[:5] + bad, bad[:2]):  # 5 of 365, 5 of 10, 2 of 2
        evaluation = EvalLoader(augment.Data(paths, torch.arange(len(paths)), []), 50, 72)
        for read, *args in ((augment.read_all, paths, 16), (list, evaluation)):
            assert f"of {len(paths)} images cannot be read" in refusal(read, *args)
    many = augment.Data(good + 4 * bad, torch.arange(56), [])  # each rank judges by its own share
    assert all("of 14 images cannot be read" in refusal(list, EvalLoader(many, 50, 72, rank, 4)) for rank in range(4))
    assert "five images in a row" in refusal(list, TrainLoader(augment.Data(bad, None, []), 5, 1, 72))


def test_folders_as_people_have_them(folder, tmp_path, monkeypatch):
    """Hidden files and folders are nobody's data, links are, and no link leads round in circles."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for split in ("train", "val"):
        for name in ("class0", "class1", "class2"):
            link(tmp_path / "imagenet" / split / name, folder / split / name)
        for name in ("empty", ".ipynb_checkpoints"):
            (tmp_path / "imagenet" / split / name).mkdir()
    for train, test in (load_folder(tmp_path / "imagenet", 72), augment.load_data("imagenet", "~", 224)):
        assert train.classes == test.classes == ["class0", "class1", "class2"]
        assert train.labels.tolist() == [0] * 12 + [1] * 12 + [2] * 12 and len(train.images) == 36

    train, test = load_folder(folder / "train" / "class0")  # without labels
    assert train.images.shape == (12, 3, 16, 16) and train.labels is None and test is None
    for name in ("1.jpg", "deep/2.JPG", ".store/3.png", "._4.jpg", "deep/._5.jpg", "deep/.cache/6.jpg"):
        link(tmp_path / "flat" / name, folder / "train" / "class0" / "0.png")
    for name, to in (("flat/circle", "flat"), ("flat/deep/up", "flat"), ("flat/deep/above", "."), ("link", "flat"),
                     ("flat/twice", "flat/deep"), ("flat/stored", "flat/.store")):
        link(tmp_path / name, tmp_path / to)
    for spelling in (tmp_path / "flat", f"{tmp_path}/flat/", tmp_path / "link", "~/flat"):
        assert len(load_folder(spelling, 72)[0].images) == 3


def test_what_is_left_out_is_said(folder, tmp_path, capsys, monkeypatch):
    """In one line, by one of several processes. Our own pictures are nobody's data."""
    endings = ["jpg", "JPEG", "jfif", "gif", "png", "webp"] + ["avif"] * features.check("avif")
    others = "a.heic", "b.HEIC", "deep/c.heic", "deep/README", "deep/.not", "x.\u00fc", "../loose.jpg", "my-views.png"
    for split in ("train", "val"):
        part = tmp_path / "data" / split / "class"
        (part / "deep").mkdir(parents=True)
        for ending in endings:
            Image.new("RGB", (16, 16)).save(part / f"image.{ending}")
        for name in others:
            (part / name).touch()
        link(part.parent / "other" / "0.png", part / "image.png")
    counts = "{'.heic': 6, 'outside the class folders': 2, '': 2, 'views.png': 2, '.\\xfc': 2}"
    for rank, lines in ((None, 1), ("", 1), ("0", 1), ("1", 0)):
        monkeypatch.setattr(os, "environ", {} if rank is None else dict(RANK=rank))
        assert [len(data.images) for data in load_folder(tmp_path / "data")] == [len(endings) + 1] * 2
        assert capsys.readouterr().err == f"WARNING: 14 files are left out: {counts}\n" * lines
    monkeypatch.undo()
    link(tmp_path / "both" / "Training", folder / "train")
    link(tmp_path / "both" / "Testing", folder / "val")
    said = f"WARNING: no {tmp_path}/both/train: taken together, without labels: {{'Training': 36, 'Testing': 10}}\n"
    for path, n, line in ((tmp_path / "both", 46, said), (f"{tmp_path}/both/", 46, said),
                          (folder / "train" / "class0", 12, ""), (folder, 36, "")):
        assert len(load_folder(path)[0].images) == n and capsys.readouterr().err == line


def test_a_folder_that_cannot_be_listed(folder, monkeypatch):
    """Rather than to be a class less. (For root every folder can be listed, hence the fault by hand.)"""
    def fail(path, scandir=os.scandir):
        if os.fspath(path) == str(lost):
            raise PermissionError(13, "Permission denied", str(lost))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", fail)
    for data, below in ((folder, "train"), (folder, "val"), (folder, "train/class1"), (folder, "val/class2"),
                        (folder / "train", "class1")):  # the last without labels
        lost = data / below
        assert refusal(load_folder, data) == f"[Errno 13] Permission denied: '{lost}'"


def test_wrong_folders(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    for name, to in (("flat/train", "train/class0"), ("half/train", "train"), ("other/train", "train"),
                     ("other/val/class0", "val/class0"), ("one/train/images", "train/class0"),
                     ("one/val/images", "val/class0")):  # the last two as other tools lay images out
        link(tmp_path / name, folder / to)
    for name in ("missing", "empty", "other"):
        assert re.search("expected .*train/<class>/<image>", refusal(load_folder, tmp_path / name))
    for name, said in (("flat", "no images in"), ("half", "no images in"), ("one", "one class tells nothing apart: ")):
        advice = f"{said}.*expected .*train/<class>/<image>.*without labels --data {tmp_path}/{name}/train$"
        assert re.search(advice, refusal(load_folder, tmp_path / name))
        assert load_folder(tmp_path / name / "train")[0].labels is None  # and that does it
    for name, said in (("imagenet", "imagenet/train/<class>"), ("cifar10", "no CIFAR-10")):
        assert said in refusal(augment.load_data, name, str(tmp_path), 32, False)


# ------------------------------------------------------------ monitors

@cases("k", [1, 5, 1000])
def test_knn_against_a_loop(k, monkeypatch):
    """In eval mode, without a copy of the bank. A label of -1 says that this is no image, neither vote nor query."""
    simsiam.join()
    monkeypatch.setattr(dist, "broadcast", None)
    net, labels = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12)), torch.randint(4, (60,))
    bank, query = (torch.randint(0, 256, (n, 3, 2, 2), dtype=torch.uint8) for n in (60, 300))
    labels[::3], query[::15] = -1, bank[::3]
    expected, points = [], augment.normalize(bank / 255).flatten(1)
    for q in augment.normalize(query / 255).flatten(1):
        votes, similarity = [0.0] * 4, F.cosine_similarity(q, points).tolist()
        for i in sorted([i for i in range(60) if i % 3], key=lambda i: -similarity[i])[:k]:
            votes[labels[i]] += math.exp(similarity[i] / 0.1)
        expected.append(votes.index(max(votes)))
    expected[7] = -1
    loaders = (list(zip(x.split(64), y.split(64))) for x, y in ((bank, labels), (query, torch.tensor(expected))))
    assert simsiam.knn_accuracy(net, *loaders, 4, k) == 100 and net.training


def test_report(capsys):
    """The line of an epoch, and warnings: of collapse, and where kNN has gone less than a twentieth of its way."""
    simsiam.join()

    def said(untrained=40, epochs=30, **last):
        simsiam.report([dict(epoch=0, knn=untrained), last], epochs)
        return capsys.readouterr().out

    trained = dict(loss=-1.23456, std=0.2, lr=0, images_per_s=12345.6, seconds=61.7)
    line = "epoch   2/30  loss -1.2346  std 0.20  12,346 images/s  62 s  kNN 40.00 %\n"
    assert said(epoch=2, knn=40, **trained) == line  # too early to warn
    assert "\nWARNING: std is low" in said(epoch=1, **trained | dict(std=0.19))
    for untrained, low, high in ((40, 42.9, 43), (98, 98.05, 98.11), (6.35, 9.28, 11.05)):
        for epoch, epochs in ((3, 30), (1, 2)):
            texts = [said(untrained, epochs, epoch=epoch, knn=knn) for knn in (low, high)]
            assert ["WARNING: kNN is hardly above the untrained" in text for text in texts] == [True, False]


# ------------------------------------------------------------ runs: what is built

def model(m):
    return getattr(m, METHODS[m.__name__])(m.parse_args(["--arch", "small", "--dim", "16"]))


def projections(out):
    """Those that are trained, a list of (b, d)."""
    if len(out) == 5:  # BYOL
        return out[4]
    return out[1] + out[3] if len(out) == 4 else out[0] + out[1]  # SimSiam, SimCLR


def run(m, folder, out, flags=""):
    line = "--recipe glyphs --size 16 --batch 12 --epochs 2 --k 5 --workers 0 " + flags
    m.train(m.parse_args([*line.split(), "--data", str(folder), *(["--out", str(out)] if out else [])]))


def log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def saved(out, name="backbone.pt"):
    return torch.load(out / name, weights_only=True)


def evaluate(line, capsys):
    """What it prints, but for the seconds, and its result."""
    linear_eval.train(linear_eval.parse_args(line.split()))
    text = re.sub(r"\d+ s\n", "\n", capsys.readouterr().out)
    return text, json.loads(text.splitlines()[-1])


@cases("arch", ["resnet18", "resnet50"])
@cases("stem", ["cifar", "imagenet"])
def test_backbone_loads_into_torchvision(arch, stem, tmp_path):
    """And from a file, also with fc, into linear evaluation."""
    (ours, d), theirs, x = simsiam.make_backbone(arch, stem), getattr(models, arch)(), torch.rand(2, 3, 32, 32)
    torch.save(ours.state_dict() | {"fc.weight": theirs.fc.weight}, tmp_path / "net.pt")
    found, width = linear_eval.load_backbone(tmp_path / "net.pt")
    assert width == d == theirs.fc.in_features
    theirs.fc = nn.Identity()
    if stem == "cifar":
        theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    for net in (ours.eval(), found):
        assert torch.equal(net(x), theirs.eval()(x))


# By script and data: projector, predictor, lr for the batch, momentum, weight decay, optimizer, batch, epochs, warm-up.
# 256>512 is a linear layer and 256>512+ one with a bias; bn is without weight and bias, BN- with a bias that stays 0.
PREDICTOR, BYOL, SIMCLR = "2048>512 BN ReLU 512>2048+", "256>4096+ BN ReLU 4096>256+", "256>256 BN ReLU 256>128 BN-"
DEEP = "256>2048 BN ReLU 2048>2048 BN ReLU 2048>2048 bn"
BUILT = {
    "simsiam_dssl cifar10": ["256>2048 BN ReLU 2048>2048 bn", PREDICTOR, 0.06, 0.9, 5e-4, "SGD", 512, 800, 0],
    "simsiam_dssl imagenet": [DEEP, PREDICTOR, 0.1, 0.9, 1e-4, "SGD", 512, 100, 0],
    "byol_dssl cifar10": [BYOL, BYOL, 0.06, 0.9, 5e-4, "SGD", 512, 800, 0],
    "byol_dssl imagenet": [BYOL, BYOL, 0.1, 0.9, 1e-4, "SGD", 512, 100, 0],
    "simclr_dssl cifar10": [SIMCLR, "", 0.06, 0.9, 5e-4, "SGD", 512, 800, 0],
    "simclr_dssl imagenet": [SIMCLR, "", 0.6, 0.9, 1e-6, "LARS", 512, 100, 10]}


@each_method
@cases("data", ["cifar10", "imagenet"])
def test_what_a_recipe_builds(m, data, folder, tmp_path, monkeypatch):
    """By train(), but for the backbone: here it has 256 features."""
    def described(layer):
        if isinstance(layer, nn.Linear):
            return f"{layer.in_features}>{layer.out_features}" + "+" * (layer.bias is not None)
        trained = tuple(x.requires_grad for x in layer.parameters())
        kinds = {(): "bn", (True, True): "BN", (True, False): "BN-"}
        return kinds[trained] if isinstance(layer, nn.BatchNorm1d) else type(layer).__name__

    args, seen = m.parse_args(["--data", data]), []
    monkeypatch.setattr(m, "train_epoch", lambda epoch, ddp, optimizer, *_: seen.extend([ddp.module, optimizer]) or {})
    run(m, folder, tmp_path, f"--recipe {data} --epochs 1 --warmup 0 --arch small")
    (net, optimizer), (group,) = seen, seen[1].param_groups  # all parameters in one
    assert list(map(id, group["params"])) == list(map(id, net.parameters()))
    heads = [" ".join(map(described, head)) for head in (net.projector, getattr(net, "predictor", []))]
    wd = getattr(optimizer, "decay", group["weight_decay"])
    assert [*heads, pytest.approx(args.lr * args.batch / 256), group["momentum"], wd,
            type(optimizer).__name__, args.batch, args.epochs, args.warmup] == BUILT[f"{m.__name__} {data}"]


@cases("m", [m for m in MODULES if m.__name__ == "simclr_dssl"])
def test_lars_leaves_vectors_alone(m):
    w, v, g = nn.Parameter(torch.full((2, 2), 2.0)), nn.Parameter(torch.ones(2)), torch.tensor([[3.0, -3], [3, 3]])
    w.grad, v.grad, along = g.clone(), torch.full((2,), 3.0), g + 0.1 * 2
    m.LARS([w, v], 0.5, momentum=0.9, weight_decay=0.1).step()
    assert torch.allclose(w, 2 - 0.5 * 0.001 * 4 * along / along.norm(), atol=1e-7)  # lr · 0.001 · ‖w‖, along g + wd w
    assert torch.allclose(v, torch.full((2,), 1 - 0.5 * 3.0))  # plain SGD without decay


@cases("m", [m for m in MODULES if m.__name__ == "byol_dssl"])  # skips if there is none
def test_target_follows_each_step(m, folder, tmp_path, monkeypatch):
    """From the same weights on, after the optimizer, and in parameters alone."""
    seen = []

    def spy(net, momentum, real=m.BYOL.update_target):
        online, before = [*net.backbone.parameters(), *net.projector.parameters()], copy.deepcopy(net.target)
        real(net, momentum)
        for x, old, other in zip(net.target.parameters(), before.parameters(), online, strict=True):
            assert torch.allclose(x, momentum * old + (1 - momentum) * other, atol=1e-6) and not x.requires_grad
        assert_same(list(net.target.buffers()), list(before.buffers()))
        seen.append((momentum, next(before.parameters()), online[0].detach().clone()))

    monkeypatch.setattr(m.BYOL, "update_target", spy)
    run(m, folder, tmp_path, "--dim 16 --hidden 16 --ema-cosine --ema 0.4")
    momenta, targets, online = zip(*seen)
    assert momenta == pytest.approx([1 - 0.6 * (1 + math.cos(math.pi * step / 6)) / 2 for step in range(6)])
    assert m.target_momentum(3, 6, 0.99, False) == 0.99
    assert torch.equal(targets[0], seeded(model, m).backbone.conv1.weight)
    assert torch.equal(online[5], saved(tmp_path)["conv1.weight"])


# ------------------------------------------------------------ runs: flags

SCRIPTS = ["augment", "linear_eval", *METHODS]
SHARED = ["D", "make_backbone", "positive", "count", "nonnegative", "spread", "knn_predict", "features", "gather",
          "knn_accuracy", "learning_rate", "make_views", "record_graphs", "say", "report", "join", "save", "load",
          "main"]


def test_common_blocks_are_identical():
    """So what is tested on one script holds for all. Not shared: model, optimizer, loss, target and their flags."""
    def source(m, name):
        return inspect.getsource(getattr(m, name))

    changed = dict(simsiam_dssl=[0, 0, 0], byol_dssl=[2, 5, 6], simclr_dssl=[5, 7, 5])  # lines of the first three
    for m in MODULES:
        lines = [set(source(m, name).splitlines()) ^ set(source(simsiam, name).splitlines())
                 for name in ("train", "train_epoch", "parse_args")]
        assert [len(part) for part in lines] == changed[m.__name__], lines
        assert [name for name in SHARED if source(m, name) != source(simsiam, name)] == []
        assert not hasattr(m, "LARS") or source(m, "LARS") == source(linear_eval, "LARS")
    for name in ("make_backbone", "positive", "count", "nonnegative", "say", "join", "main"):
        assert source(linear_eval, name) == source(simsiam, name), name


WRONG = {  # command lines that are refused: by flag, its values
    "simsiam_dssl": {
        "weights": "0 0 0 0|1 0 -1 0|1 0 1", "batch": "0|2.5", "epochs": "0", "lr": "-1|nan|inf", "wd": "-1",
        "warmup": "5", "size": "4", "crop": "1.1", "workers": "-1", "seed": "x|-1|4294967296", "pairs": "0",
        "flip": "yes", "hv-from": "no", "data": "no", "recipe": "no", "arch": "resnet19", "stem": "big", "k": "0",
        "knn-every": "0", "dim": "0", "layers": "0", "heavy": "jigsaw(13)", "dat": "cifar10", "": "nonsense"},
    "byol_dssl": {"ema": "1.1|-1", "hidden": "0"},
    "simclr_dssl": {"temperature": "0|nan", "lars": "1"},
    "linear_eval": {
        "protocol": "adam", "batch": "0", "epochs": "0", "lr": "-1", "size": "7", "prot": "sgd", "data": "no",
        "recipe": "no", "seed": "-1", "workers": "-1", "": "net.pt"},
    "augment": {
        "size": "4|x", "heavy": "|ra(0,5)|jigsaw(20)", "seed": "x|-1|4294967296", "out": "no/views.png|figure.png",
        "nonsense": "", "": "missing.jpg"}}


@cases("script", SCRIPTS)
def test_wrong_command_lines(script, monkeypatch):
    """Each is answered in one line, which names the flag."""
    for flag, value in [(flag, value) for flag, values in WRONG[script].items() for value in values.split("|")]:
        first = [f"{script}.py", "net.pt"] if script == "linear_eval" else [f"{script}.py"]
        monkeypatch.setattr("sys.argv", [*first, *[f"--{flag}"] * bool(flag), *value.split()])
        message = refusal(getattr(sys.modules[script], "parse_args", augment.main))
        assert message.startswith(f"{script}.py: ") and message.isascii(), message
        assert f"--{flag}" in message or "unrecognized" in message or script == "augment", message


@each_method
@cases("data", simsiam.RECIPES)
def test_recipes_are_complete_and_flags_override_them(m, data):
    args, recipe = vars(m.parse_args(["--data", data])), m.RECIPES[data]
    assert None not in [args[key] for key in args if key != "out"] and args.items() >= recipe.items()
    assert vars(m.parse_args(["--data", "photos", "--recipe", data])) == args | dict(data="photos")
    for key, value in recipe.items():
        if not isinstance(value, (bool, str)):
            other = 0.5 if key in ("crop", "ema") else type(value)(value + 1)
            line = f"--data {data} --epochs 30 --heavy ua --{key.replace('_', '-')} {other}"
            assert vars(m.parse_args(line.split()))[key] == other


@cases("script", SCRIPTS)
def test_help_also_without_docstrings(script, tmp_path, monkeypatch, capsys):
    """As python -OO would compile the script, and with the recipe of --data. augment.py also draws."""
    code = compile((ROOT / f"{script}.py").read_text(), script, "exec", optimize=2)
    for data, recipe in getattr(sys.modules[script], "RECIPES", {"": {}}).items():
        monkeypatch.setattr("sys.argv", [script, *["--data", data] * bool(data), "--help"])
        with pytest.raises(SystemExit) as end:
            exec(code, dict(__name__="__main__", __doc__=None))
        text = " ".join(capsys.readouterr().out.split())
        assert end.value.code == 0 and text.startswith("usage: ") and text.isascii()
        for key in ("arch", "batch", "epochs", "lr", "heavy") if script in METHODS else ():
            assert f"(default: {recipe[key]})" in text
    monkeypatch.setattr("sys.argv", ["augment.py", "--out", str(tmp_path / "my-views.png")])
    augment.main()
    assert capsys.readouterr().out.endswith("my-views.png': 5 rows of 10\n") and any(tmp_path.iterdir())


# ------------------------------------------------------------ runs

def test_learning_rate(folder, tmp_path, monkeypatch):
    """Linear over two of five epochs of three steps each, then half a cosine; over 2.5 steps it is never above base."""
    rates, real = [], torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: rates.append(self.param_groups[0]["lr"]) or real(self))
    run(simsiam, folder, tmp_path, "--epochs 5 --warmup 2 --lr 0.64 --dim 16")
    cosine = [(1 + math.cos(math.pi * step / 9)) / 2 for step in range(9)]
    assert rates == pytest.approx([0.03 * share for share in (1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1, *cosine)])
    assert [entry["lr"] for entry in log(tmp_path)[1:]] == rates[2::3]
    assert max(simsiam.learning_rate(step, 110, 2.5, 2) for step in range(110)) <= 2


def test_each_step_and_rank_draws_its_own_views(folder, monkeypatch):
    def made(flags="", epoch=1, rank=0):
        """The SVs and HVs of each step; whatever epoch and rank, of the same images and crops."""
        loader = TrainLoader(load_folder(folder)[0], 12, 2, 16)
        loader.order, loader.set_epoch = [loader.order[0]] * 2, lambda epoch: None
        monkeypatch.setattr(dist, "get_rank", lambda: rank)
        return list(simsiam.make_views(loader, simsiam.parse_args(["--size", "16", *flags.split()]), epoch))

    steps = made() + made(epoch=2) + made(rank=1) + made("--seed 1")
    for one, two in itertools.combinations(steps, 2):
        assert not any(torch.equal(a, b) for a, b in zip(one, two))
    monkeypatch.setattr(augment, "parse_policy", lambda *_: lambda x: 1 - x)
    for source, n in (("sv", 2), ("image", 1)):  # of two crops; a heavy view comes from its own SV, or from none
        for sv, hv in made(f"--hv-from {source}"):
            assert [torch.equal(a, 1 - b) for a, b in zip(hv, sv, strict=True)] == [source == "sv"] * n


@each_method
@cases("flags, views", [
    ("--weights 1 0 0 0", (2, 0)), ("--weights 1 0 0 0 --pairs 2", (4, 0)), ("--weights 0 1 0 0 --pairs 2", (0, 4)),
    ("--weights 1 1 1 1 --hv-from image", (2, 2)), ("--weights 0 0 0 0.5 --bf16", (2, 2)),
    ("--weights 0 0 1 0 --batch 2 --size 20 --heavy ra(1,9)+jigsaw(5)|ua", (2, 2))])
def test_what_is_forwarded_and_logged(m, flags, views, folder, tmp_path, monkeypatch, capsys):
    """Logged are means over steps: of the pasted loss, summed over the pairs; of the std of all trained projections."""
    losses, forwards, network = [], [], getattr(m, METHODS[m.__name__])
    loss, forward = m.dssl_loss, network.forward
    monkeypatch.setattr(m, "dssl_loss", lambda *args: losses.append((args, loss(*args))) or losses[-1][1])
    monkeypatch.setattr(network, "forward", lambda *args: forwards.append((args, forward(*args))) or forwards[-1][1])
    monkeypatch.setattr(m, "Gather", None, raising=False)  # for ranks alone: gloo's copies would slow torch down
    run(m, folder / "train" / "class1", tmp_path, "--epochs 1 --batch 6 --dim 16 " + flags)
    text, (_, entry) = capsys.readouterr().out, log(tmp_path)
    assert ("heavy views none" in text) == (views[1] == 0)
    assert "knn" not in entry and "no labels, so no kNN" in text and text.endswith("backbone.pt'\n")  # no command
    weights, steps, n = list(map(float, flags.split()[1:5])), 6 if "--batch" in flags else 2, len(losses)
    assert n == steps * (2 if "--pairs" in flags else 1) and all(args[-1] == weights for args, _ in losses)
    assert entry["loss"] == pytest.approx(sum(value.item() for _, value in losses) / steps, abs=1e-6)
    used = [x for args, _ in losses[: n // steps] for x in next(pair for pair in args if len(pair))]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(used, 2))  # each pair of views once
    state = saved(tmp_path, "checkpoint.pt")["model"]
    batches = {n.item() for key, n in state.items() if key.endswith("_tracked") and not key.startswith("target")}
    assert batches == {steps * sum(views)}  # BN takes each view by itself
    std = 0
    for (_, sv, hv), out in forwards:
        assert (len(sv), len(hv)) == views and all(x.min() < -1 for x in [*sv, *hv])  # normalised
        z = torch.stack(projections(out))
        assert z.dtype == (torch.bfloat16 if "--bf16" in flags else torch.float32)
        std += 4 * F.normalize(z.float(), dim=-1).std(1).mean().item() / steps
        if len(out) == 5:  # BYOL: targets only of views that the loss has as such, and without gradient
            _, z, _, z_hat, _ = out
            assert [len(z), len(z_hat)] == [len(sv) * any(weights[::2]), len(hv) * any(weights[1::2])]
            assert not any(x.requires_grad for x in [*z, *z_hat])
    assert entry["std"] == pytest.approx(std, abs=1e-5)


def test_k_and_knn_every(folder, tmp_path, monkeypatch, capsys):
    """k is at most a quarter of the images of a class, and at least 1."""
    seen = []
    monkeypatch.setattr(simsiam, "train_epoch", lambda *_: {})
    monkeypatch.setattr(simsiam, "knn_accuracy", lambda net, bank, query, classes, k, bf16: seen.append(k) or 50)
    write_images(tmp_path / "few", 2, 2, 2, lambda i: torch.zeros(8, 8, 3))
    for data, k, used in ((folder, 1, 1), (folder, 4, 3), (folder, 200, 3), (tmp_path / "few", 200, 1)):
        out = tmp_path / f"{data.name}{k}"
        run(simsiam, data, out, f"--epochs 4 --knn-every 3 --batch 2 --k {k}")
        assert seen.pop() == used and f"kNN with k {used}\n" in capsys.readouterr().out
        assert [entry["epoch"] for entry in log(out) if "knn" in entry] == [0, 3, 4]


@cases("what", ["loss", "weight"])
def test_what_is_not_finite_is_never_saved(what, folder, tmp_path, monkeypatch):
    """In the last step of epoch 2: an infinite loss with a good gradient, or the other way round."""
    def broken(p, *rest, real=simsiam.dssl_loss, calls=itertools.count(1)):
        fault = math.inf if what == "loss" else (0 * p[0].sum()).sqrt()
        return real(p, *rest) + (fault if next(calls) == 6 else 0)

    monkeypatch.setattr(simsiam, "dssl_loss", broken)
    assert "not finite in epoch 2, which is not saved: lower --lr" in refusal(run, simsiam, folder, tmp_path)
    assert len(saved(tmp_path, "checkpoint.pt")["history"]) == 2


def interrupted(m, folder, out):
    """A crash in the second step of the second of two epochs."""
    calls, real = itertools.count(), m.dssl_loss
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(m, "dssl_loss", lambda *args: real(*args) if next(calls) < 4 else 1 / 0)
        run(m, folder, out)
    assert [entry["epoch"] for entry in log(out)] == [0, 1]


@each_method
def test_a_run_and_the_same_interrupted(m, folder, tmp_path, monkeypatch):
    """As in a notebook: all in one process, whose output can do less than a file. It is in ASCII."""
    for name, value in dict(RANK="", WORLD_SIZE="", LOCAL_WORLD_SIZE="0", MASTER_PORT="1").items():
        monkeypatch.setenv(name, value)  # no torchrun
    out, half = tmp_path / "r\u00fcn", tmp_path / "half"
    with contextlib.redirect_stdout(io.StringIO()) as text:
        run(m, folder, out)
    entries, text, told = log(out), text.getvalue(), json.loads((out / "settings.json").read_text())
    for said in ("loss 1 (SV <-> SV) + 1 (SV <- HV), pairs 1, heavy views ra(2,9,paper)\n", "2 epochs of 3 steps",
                 "lr 0.0225, ", f"--out {str(out)!a} goes on\nepoch   0  the kNN", f"loss {entries[2]['loss']:.4f}"):
        assert said in text and text.isascii()
    assert [entry["epoch"] for entry in entries] == [0, 1, 2]
    assert list(entries[1]) == "epoch loss std lr images_per_s seconds knn".split()
    assert sorted(os.listdir(out)) == ["backbone.pt", "checkpoint.pt", "log.jsonl", "settings.json", "views.png"]
    assert told.keys() == vars(m.parse_args([])).keys() | {"script", "images"}
    assert (told["script"], told["images"], told["lr"], told["data"]) == (m.__name__, [36, 10], 0.48, str(folder))
    free = {"data", "root", "out", "workers", "bf16", "k", "knn_every"}  # all else must agree when a run goes on
    assert saved(out, "checkpoint.pt")["settings"] == {key: told[key] for key in told if key not in free}

    interrupted(m, folder, half)
    run(m, folder, half)
    assert_same(saved(half), saved(out))
    for key in ("epoch", "loss", "std", "lr", "knn"):
        assert [entry.get(key) for entry in log(half)] == [entry.get(key) for entry in entries]
    with contextlib.redirect_stdout(io.StringIO()) as text:  # of a complete run nothing is left to do
        run(m, folder, out, "--workers 1")
    assert f"complete: {str(out / 'backbone.pt')!a}" in text.getvalue() and "\nepoch" not in text.getvalue()
    assert log(out) == entries


@needs_cuda
@each_method
def test_run_on_cuda(m, folder, tmp_path):
    """Its weights are in full precision; bf16 and, in a world of one, SyncBN change little."""
    run(m, folder, tmp_path)
    net, _ = linear_eval.load_backbone(tmp_path / "backbone.pt")
    assert {x.dtype for x in net.state_dict().values()} == {torch.float32, torch.int64}
    net, x = model(m).cuda(), torch.rand(32, 3, 24, 24, device="cuda")
    full = projections(net([x], []))[0]
    with torch.autocast("cuda", torch.bfloat16):
        half = projections(nn.SyncBatchNorm.convert_sync_batchnorm(net)([x], []))[0]
    assert F.cosine_similarity(full, half.float(), dim=-1).mean() > 0.98


@cases("weights", TERMS)
def test_record_graphs(weights, folder, monkeypatch):
    """It records batches of the very shapes that steps have, and leaves BN's statistics as they were."""
    def warm_up(model, views):
        shapes.extend(x.shape for x in views)
        model(*views)

    shapes = []
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", warm_up)
    args = simsiam.parse_args(["--size", "16", "--batch", "12", "--pairs", "2", "--weights", *map(str, weights)])
    net = model(simsiam)
    before = copy.deepcopy(net.state_dict())
    simsiam.record_graphs(net, args, torch.device("cpu"))
    assert_same(net.state_dict(), before)
    loader = TrainLoader(load_folder(folder)[0], 12, 4, 16)
    simsiam.join()
    assert shapes == [x.shape for x in next(simsiam.make_views(loader, args, 1))]


@needs_cuda
@each_method
@cases("flags", ["", "--weights 0 1 0 0 --pairs 2", "--weights 1 0 0 0"])
def test_recorded_steps_on_cuda(m, flags, folder, tmp_path, monkeypatch):
    """A run that replays graphs is the run that launches kernels, up to rounding; in the end its graphs are gone."""
    graphs, replay = [], torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(
        torch.cuda.CUDAGraph, "replay", lambda graph: graphs.append(weakref.ref(graph)) or replay(graph))
    flags += " --no-bf16 --lr 0.05"  # at a higher rate a ReLU that rounding tips over moves weights by too much
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        run(m, folder, tmp_path / "recorded", flags)
        monkeypatch.setattr(m, "record_graphs", lambda *_: None)
        run(m, folder, tmp_path / "launched", flags)
    gc.collect()
    assert len(graphs) == 12 and not any(graph() for graph in graphs)  # forward's and backward's, in six steps
    a, b = (saved(tmp_path / name, "checkpoint.pt") for name in ("launched", "recorded"))
    torch.testing.assert_close(a["model"], b["model"], rtol=0.005, atol=0.0005)
    assert [x.get("loss") for x in a["history"]] == pytest.approx([x.get("loss") for x in b["history"]], abs=1e-3)


def test_save_and_load(tmp_path, monkeypatch):
    """A full disk leaves the last good file. Refused are another run's settings, also rank 0's, and damaged files."""
    def full(path, data, real=Path.write_bytes):
        real(path, bytes(data)[:100])
        raise OSError("No space left on device")

    simsiam.join()
    path = tmp_path / "checkpoint.pt"
    simsiam.save(dict(settings=dict(lr=1, seed=0), history=[], model={}, optimizer={}), path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        assert refusal(simsiam.save, {"x": torch.ones(3)}, path) == "No space left on device"
    good, said = path.read_bytes(), f"{path} is of a run with lr 1, not 2; wd None, not 3: take that, or another --out"
    assert simsiam.load(path, dict(seed=0, lr=1), None, None) == []
    assert refusal(simsiam.load, path, dict(seed=0, lr=2, wd=3), None, None) == said
    for content in (b"", b"no checkpoint", good[: len(good) // 2], {"conv1.weight": torch.ones(3)}, [1, 2]):
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        assert f"{path} is damaged, or not a checkpoint of ours (" in refusal(simsiam.load, path, {}, None, None)
    monkeypatch.setattr(dist, "broadcast_object_list", lambda x: x[0].update(settings=dict(images=[40, 10])))
    assert "images [40, 10], not [36, 10]" in refusal(simsiam.load, tmp_path / "new", dict(images=[36, 10]), None, None)


def test_where_a_run_writes(folder, tmp_path, monkeypatch, capsys):
    """Nowhere before all is checked; and without --out into a folder of its own."""
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    for batch in ("--batch 48", "--batch 1"):
        assert "at most the 36 images" in refusal(run, simsiam, folder, "run", batch)
    assert "no folder" in refusal(run, simsiam, "typo", "run") and "file" in refusal(run, simsiam, folder, "file/run")
    with monkeypatch.context() as patch:
        patch.setattr(simsiam, "load", lambda *_: sys.exit("refused"))
        assert refusal(run, simsiam, folder, "run") == "refused" and os.listdir() == ["file"]
    monkeypatch.setattr(simsiam, "train_epoch", lambda *_: {})
    run(simsiam, folder, None)
    text, (name,) = capsys.readouterr().out, os.listdir("runs")
    assert re.fullmatch(rf"simsiam_dssl-\d{{8}}-\d{{6}}-{os.getpid()}", name)
    assert f"the same command with --out 'runs/{name}' goes on" in text
    python, script, *flags = shlex.split(text.splitlines()[-1])  # the linear evaluation, as it stands
    assert (python, script) == ("python", linear_eval.__file__)
    assert evaluate(" ".join(flags) + " --epochs 1", capsys)[1]["images"] == 10


@cases("fault, data, code, said", [
    ("", "typo", 1, r"simsiam_dssl.py: no folder typo: .*\n"),
    ("m.train_epoch = lambda *_: 1 / 0", "", 1, r"(?s).*Traceback .*ZeroDivisionError: .*\n"),
    ("atexit.unregister(time.sleep); os.close(1); sys.stdout = None", "", 0, "")])
def test_how_a_process_ends(fault, data, code, said, folder, tmp_path):
    """At once after an error, where NCCL's group, here a sleep, would wait for others; and well without an output."""
    text = f"""import atexit, os, sys, time; atexit.register(time.sleep, 1000); import simsiam_dssl as m; {fault}
sys.argv = "x --data {data or folder} --recipe glyphs --size 16 --batch 36 --epochs 1 --out {tmp_path}/run".split()
m.main()"""
    ended = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert ended.returncode == code and re.fullmatch(said, ended.stderr), ended
    assert ("epoch   0/1" in ended.stdout) == ("1 / 0" in fault) and (code or len(log(tmp_path / "run")) == 2)


# ------------------------------------------------------------ ranks

TRAINING = "--dim 16 --size 72 --epochs 1 --batch 12 --lr 20 --warmup 0 --weights 1 0.7 0.5 0.3"


def without_chance(patch):
    """Views without a draw and BN with fixed statistics: then a step depends on its images, not on who has them."""
    patch.setattr(augment, "standard", lambda x, *_: x / 255)
    patch.setattr(augment, "parse_policy", lambda *_: lambda x: 1 - x)
    patch.setattr(nn.modules.batchnorm._BatchNorm, "forward", lambda self, x: F.batch_norm(
        x, self.running_mean, self.running_var, self.weight, self.bias, training=False))


def rank_main(rank, world, folder, out, port):
    """What every rank does; results go to out/rank<i>.pt."""
    torch.set_num_threads(1)
    os.environ |= dict(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    result = {}

    def watched(backbone, *rest, real=simsiam.knn_accuracy):  # what the monitor sees on this rank
        result.update(buffers=[b.clone() for b in backbone.buffers()], knn=real(backbone, *rest))
        return result["knn"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simsiam, "knn_accuracy", watched)
        run(simsiam, folder, f"{out}/run")  # one rank began it
    with pytest.MonkeyPatch.context() as patch:
        without_chance(patch)
        for m in MODULES:
            run(m, folder, f"{out}/{m.__name__}", TRAINING)
    torch.save(result, f"{out}/rank{rank}.pt")
    dist.destroy_process_group()


@cases("world", [2, 4])
def test_ranks(world, folder, tmp_path, monkeypatch):
    """They go on with a run that one began; monitor and training give what they give in one process."""
    interrupted(simsiam, folder, tmp_path / "run")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        arguments = world, str(folder), str(tmp_path), str(s.getsockname()[1])
    ranks = torch.multiprocessing.spawn(rank_main, arguments, nprocs=world, join=False)
    if not any(ranks.join(timeout=5) for _ in range(30)):
        for process in ranks.processes:
            process.kill()
        pytest.fail("the ranks hang")
    first, *others = [saved(tmp_path, f"rank{rank}.pt") for rank in range(world)]
    for other in others:
        assert_same(first, other)
    assert [entry["epoch"] for entry in log(tmp_path / "run")] == [0, 1, 2]
    assert 0.7 < log(tmp_path / "run")[2]["std"] < 1.3  # a mean over the ranks

    for m in MODULES:
        one, several = tmp_path / "alone" / m.__name__, tmp_path / m.__name__
        with monkeypatch.context() as patch:
            without_chance(patch)
            run(m, folder, one, TRAINING)
        start = seeded(m.make_backbone, "small", "cifar")[0].state_dict()
        alone, together = saved(one), saved(several)
        torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-4)
        assert max((alone[key].float() - start[key].float()).abs().max() for key in alone) > 5e-3  # it has learnt
        assert log(one)[1]["loss"] == pytest.approx(log(several)[1]["loss"], abs=1e-4)

    net = simsiam.make_backbone("small", "cifar")[0]
    net.load_state_dict(saved(tmp_path / "run"))
    loaders = [EvalLoader(data, 256, 16) for data in load_folder(folder)]
    assert simsiam.knn_accuracy(net, *loaders, 3, 3) == first["knn"]


# ------------------------------------------------------------ linear evaluation

def test_linear_eval_settings():
    def settings(line, images=50000, world=1):
        args = linear_eval.parse_args(["net.pt", *line.split()])
        linear_eval.choose(args, images, world)
        lr = round(args.lr * args.batch / 256, 6)
        return args.size, args.crop, args.flip, args.protocol, args.batch, args.epochs, lr, args.norm

    folder, many = "--data folder --recipe imagenet --size 24", 1281167
    for line, images, expected in (
            ("", 8192, (24, 0.8, False, "sgd", 256, 30, 100, 1)),
            ("--data cifar10", 50000, (32, 0.8, True, "sgd", 256, 100, 30, 1)),
            ("--data imagenet", many, (224, 0.08, True, "lars", 4096, 90, 1.6, 1)),
            ("--data imagenet --protocol sgd-linear", many, (224, 0.08, True, "sgd-linear", 4096, 90, 1.6, 1)),
            (folder, 409600, (24, 0.08, True, "lars", 4096, 90, 1.6, 1)),
            (folder, 409599, (24, 0.08, True, "sgd", 256, 100, 30, None)),
            (folder, 300, (24, 0.08, True, "sgd", 30, 100, 30, None)),  # what is asked for means what it says:
            (f"{folder} --protocol sgd", 300, (24, 0.08, True, "sgd", 256, 100, 30, 1)),
            (f"{folder} --protocol lars", 300, (24, 0.08, True, "lars", 300, 90, 0.117188, 1)),
            (f"{folder} --batch 64 --epochs 3 --lr 4", 300, (24, 0.08, True, "sgd", 64, 3, 1, None))):
        assert settings(line, images) == expected, line
    assert [settings(folder, *n)[4] for n in ((1, 1), (40, 1), (40, 8), (2999, 8))] == [1, 4, 8, 256]
    assert "fewer than the 8 ranks" in refusal(settings, folder, 7, 8)


@cases("scale", [10, 0.1])  # of the features: nearest neighbours do not depend on it
def test_linear_eval_and_neighbours(scale, tmp_path, capsys, monkeypatch):
    """By default, on a folder of few images: 5 classes, a colour each, under noise. LARS was far behind."""
    colour = torch.rand(5, 3)
    write_images(tmp_path, 100, 100, 5, lambda i: 255 * (colour[i % 5] + 4 * torch.rand(16, 16, 3)) / 5)
    net = nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(12, 12, bias=False))
    nn.init.eye_(net[2].weight).data.mul_(scale)
    monkeypatch.setattr(linear_eval, "load_backbone", lambda path: (net, 12))
    text, result = evaluate(f"net.pt --data {tmp_path} --recipe imagenet --size 16", capsys)
    knn = simsiam.knn_accuracy(net, *(EvalLoader(data, 256, 16) for data in load_folder(tmp_path)), 5, 5)
    assert "\nprotocol sgd: batch 10, lr 30, features / " in text and result["top1"] >= knn - 3 > 57, (knn, text)


@cases("flags, kind, batch, rates", [
    ("--epochs 2", "SGD", 3, [1] * 15 + [0.1] * 5 + [0.01] * 4),  # a tenth from 60 % on, again from 80 %
    ("--protocol sgd --batch 12 --epochs 2 --lr 0.3", "SGD", 12, [1, 1, 1, 1, 0.1, 0.01]),
    ("--protocol lars --epochs 4", "LARS", 36, [1, 0.853553, 0.5, 0.146447]),
    ("--protocol sgd-linear --epochs 4 --size 72", "SGD", 36, [1, 0.75, 0.5, 0.25])])
def test_linear_eval(flags, kind, batch, rates, folder, tmp_path, capsys, monkeypatch):
    """The settings in the result, given as flags, give the same again. The backbone stays what it is, its BN, too."""
    def step(self, real=torch.optim.SGD.step):
        steps.append((type(self).__name__, self.param_groups[0]["lr"], self.param_groups[0]["momentum"]))
        real(self)

    steps, nets, load = [], [], linear_eval.load_backbone
    torch.save(simsiam.make_backbone("small", "cifar")[0].state_dict(), tmp_path / "net.pt")
    monkeypatch.setattr(torch.optim.SGD, "step", step)
    monkeypatch.setattr(linear_eval, "load_backbone", lambda path: nets.append(load(path)) or nets[-1])
    line = f"{tmp_path}/net.pt --data {folder} --recipe glyphs --size 16 --workers 0 {flags}"
    text, result = evaluate(line, capsys)
    tops, base = [float(top) for top in re.findall(r"top-1 (\S+) %", text)], result["lr"] * batch / 256
    found = result["images"], result["batch"], result["epochs"], result["top5"]
    assert found == (10, batch, len(tops), 100)  # of three classes all are among the first five
    assert (result["top1"], result["best_top1"]) == pytest.approx((tops[-1], max(tops)), abs=0.006)
    assert steps == [(kind, pytest.approx(base * rate, rel=1e-5), 0.9) for rate in rates]
    assert_same(nets[0][0].state_dict(), saved(tmp_path, "net.pt"))
    assert evaluate(line + "".join(f" --{key} {result[key]}" for key in ("batch", "epochs", "lr")), capsys)[0] == text


def test_linear_eval_refuses(tmp_path):
    (tmp_path / "text.pt").write_text("no weights")
    torch.save({"conv1.weight": torch.zeros(8, 3, 3, 3)}, tmp_path / "other.pt")
    torch.save({"model": {}, "step": 1}, tmp_path / "checkpoint.pt")
    for name in ("text.pt", "other.pt", "checkpoint.pt", "missing.pt"):
        assert name in refusal(linear_eval.load_backbone, tmp_path / name)


# ------------------------------------------------------------ README

README = (ROOT / "README.md").read_text()


def block(word):
    """The one block of Python in the README that has this word in it."""
    found, = [text for text in re.findall(r"```python\n(.*?)```", README, re.S) if word in text]
    return found


def test_the_method_on_a_page(monkeypatch, capsys):
    """It runs as it stands, here with fewer letters. Its loss and its network are the script's: change both or none."""
    text, glyphs, page = block("for epoch in range(epochs)"), augment.glyphs, {}
    assert len(text.splitlines()) <= 60 and not re.search(r"import \w+_dssl|argparse|torch.distributed", text)
    monkeypatch.setattr(augment, "glyphs", lambda n, size, seed: glyphs(n // 32, size, seed))
    exec(text, page)
    line = r"epoch \d: loss -?\d\.\d\d, nearest neighbour \d+\.\d %\n"
    assert re.fullmatch(f"({line}){{5}}", capsys.readouterr().out)
    p, z, p_hat, z_hat = arguments(simsiam)
    ours, pasted = (loss(p, z, p_hat, z_hat) for loss in (simsiam.dssl_loss, page["dssl_loss"]))
    assert ours.item() == pytest.approx(pasted.item(), abs=1e-6)
    gradients = [torch.autograd.grad(loss, [*p, *p_hat]) for loss in (ours, pasted)]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients))
    small, _ = simsiam.make_backbone("small", "cifar")
    assert [x.shape for x in page["backbone"].parameters()] == [x.shape for x in small.parameters()]


def test_every_command():
    shell = "".join(re.findall(r"```bash\n(.*?)```", README, re.S))
    lines = re.findall(r"^(?:python|torchrun \S+) (\w+_dssl|linear_eval)\.py *([^#\n]*)", shell, re.M)
    rows = re.findall(r"^\| `(\d [\d.]+ [\d.]+ [\d.]+.*?)` \|", README, re.M)
    assert len(lines) >= 8 and len(rows) >= 7
    for script, flags in [*lines, *(("simsiam_dssl", f"--weights {row}") for row in rows)]:
        sys.modules[script].parse_args(shlex.split(flags))


def test_features_of_own_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(simsiam.make_backbone("small", "cifar")[0].state_dict(), "backbone.pt")
    for name in ("photo1.jpg", "photo2.jpg"):
        Image.new("RGB", (30, 20)).save(name)
    used = {}
    exec(block("read_centre").replace("runs/.../", ""), used)
    assert used["features"].shape == (2, used["d"]) and not used["features"].requires_grad and not used["net"].training


def test_mask_rcnn(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save(simsiam.make_backbone("resnet50", "imagenet")[0].state_dict(), "backbone.pt")
    exec(block("maskrcnn"), {})
    assert "All keys matched" in capsys.readouterr().out

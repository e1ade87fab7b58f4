"""Tests: CPU, no network, a few minutes. Those that need CUDA skip without it."""
import contextlib
import errno
import functools
import inspect
import itertools
import json
import math
import os
import signal
import socket
import subprocess
import sys
from collections import defaultdict

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from einops import rearrange
from PIL import Image, ImageEnhance, ImageOps
from torch import nn
from torchvision import models
from torchvision.transforms import RandomResizedCrop

import augment
import byol_dssl
import linear_eval
import simclr_dssl
import simsiam_dssl
from augment import OPS, SPACES, Jigsaw, RandAugment, UniformAugment, column, parse_policy, standard

METHODS = [simsiam_dssl, byol_dssl, simclr_dssl]
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
TERMS = [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]


def vectors(n, b=5, d=8):
    """n pairs of (b, d), all different, with gradient."""
    g = torch.Generator().manual_seed(n)
    return [[torch.randn(b, d, generator=g, dtype=torch.float64).requires_grad_() for _ in range(2)] for _ in range(n)]


# ------------------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("m", METHODS)
def test_D(m):
    p = torch.tensor([[3.0, 4.0], [1.0, 0.0]], requires_grad=True)
    z = torch.tensor([[4.0, 3.0], [0.0, 2.0]], requires_grad=True)
    loss = m.D(p, z)
    assert loss.item() == pytest.approx(-(24 / 25 + 0) / 2)
    assert m.D(p, p).item() == pytest.approx(-1) and m.D(7 * p, z / 3).item() == pytest.approx(loss.item())
    loss.backward()
    assert z.grad is None and p.grad.abs().sum() > 0
    assert torch.allclose((p * p.grad).sum(1), torch.zeros(2), atol=1e-6)  # only the direction counts


def cosine(a, b):
    return sum(-(x @ y / x.norm() / y.norm()) for x, y in zip(a, b)).item() / len(a)


@pytest.mark.parametrize("m", [simsiam_dssl, byol_dssl])
def test_terms_by_hand(m):
    p, z, p_hat, z_hat = vectors(4)
    expected = [
        (cosine(p[0], z[1]) + cosine(p[1], z[0])) / 2,
        (cosine(p_hat[0], z_hat[1]) + cosine(p_hat[1], z_hat[0])) / 2,
        (cosine(p_hat[0], z[0]) + cosine(p_hat[1], z[1])) / 2,  # each HV with its own SV
        (cosine(p[0], z_hat[0]) + cosine(p[1], z_hat[1])) / 2,
    ]
    for weights in [*TERMS, (1, 0, 1, 0), (1, 1, 1, 1), (1, 0, 0.7, 0.3)]:
        value = m.dssl_loss(p, z, p_hat, z_hat, weights)
        assert value.item() == pytest.approx(sum(w * e for w, e in zip(weights, expected)), abs=1e-6)
    assert m.dssl_loss(p, z, p_hat, z_hat).item() == pytest.approx(expected[0] + expected[2], abs=1e-6)
    assert m.dssl_loss(p, z, weights=(1, 0, 0, 0)).item() == pytest.approx(expected[0], abs=1e-6)
    same = [z[0], z[0]]
    assert m.dssl_loss(same, same, same, same).item() == pytest.approx(-2)


GETS_GRADIENT = {  # which of p, z, p_hat, z_hat each term may move: never a target
    (1, 0, 0, 0): [True, False, False, False], (0, 1, 0, 0): [False, False, True, False],
    (0, 0, 1, 0): [False, False, True, False], (0, 0, 0, 1): [True, False, False, False]}


@pytest.mark.parametrize("m", [simsiam_dssl, byol_dssl])
@pytest.mark.parametrize("weights", TERMS)
def test_gradients_flow_one_way(m, weights):
    pairs = vectors(4)
    m.dssl_loss(*pairs, weights=weights).backward()
    assert [all(x.grad is not None and x.grad.abs().sum() > 0 for x in pair) for pair in pairs] == GETS_GRADIENT[weights]
    assert [any(x.grad is not None for x in pair) for pair in pairs] == GETS_GRADIENT[weights]


@pytest.mark.parametrize("weights, sv, hv", [(w, w[0] or w[3], w[1] or w[2]) for w in TERMS])
def test_gradients_flow_one_way_in_simclr(weights, sv, hv):
    pairs = vectors(2)
    simclr_dssl.dssl_loss(*pairs, weights=weights).backward()
    assert [all(x.grad is not None for x in pair) for pair in pairs] == [bool(sv), bool(hv)]
    assert [any(x.grad is not None for x in pair) for pair in pairs] == [bool(sv), bool(hv)]


def naive_nt_xent(z1, z2, t):
    z, n = [(x / x.norm()).detach() for x in [*z1, *z2]], len(z1)
    e = [[math.exp(a @ b / t) for b in z] for a in z]
    return -sum(math.log(e[i][(i + n) % (2 * n)] / (sum(e[i]) - e[i][i])) for i in range(2 * n)) / (2 * n)


@pytest.mark.parametrize("t", [0.1, 0.5])
def test_nt_xent(t):
    (z1, z2), = vectors(1)
    value = simclr_dssl.nt_xent(z1, z2, t).item()
    assert value == pytest.approx(naive_nt_xent(z1, z2, t), abs=1e-5)
    assert simclr_dssl.nt_xent(z2, 3 * z1, t).item() == pytest.approx(value, abs=1e-5)
    n, equal, apart = 6, torch.ones(6, 4), torch.eye(6)
    assert simclr_dssl.nt_xent(equal, equal, t).item() == pytest.approx(math.log(2 * n - 1), abs=1e-5)
    assert simclr_dssl.nt_xent(apart, apart, t).item() == pytest.approx(math.log(math.exp(1 / t) + 2 * n - 2) - 1 / t, abs=1e-5)


def test_simclr_terms_by_hand():
    z, z_hat = vectors(2)
    directed = (cosine(z_hat[0], z[0]) + cosine(z_hat[1], z[1])) / 2
    expected = [naive_nt_xent(*z, 0.2), naive_nt_xent(*z_hat, 0.2), directed, directed]
    for weights in [*TERMS, (1, 0, 1, 0), (1, 1, 1, 1)]:
        value = simclr_dssl.dssl_loss(z, z_hat, 0.2, weights)
        assert value.item() == pytest.approx(sum(w * e for w, e in zip(weights, expected)), abs=1e-5)


@pytest.mark.parametrize("m", METHODS)
def test_loss_alone_in_an_empty_file(m):
    names = [name for name in ("D", "nt_xent", "dssl_loss") if hasattr(m, name)]
    text = "import torch\nimport torch.nn.functional as F\n" + "\n".join(inspect.getsource(getattr(m, name)) for name in names)
    pasted = {}
    exec(text, pasted)
    pairs = vectors(2 if m is simclr_dssl else 4)
    assert torch.equal(pasted["dssl_loss"](*pairs), m.dssl_loss(*pairs))


@pytest.mark.parametrize("m", METHODS)
def test_loss_in_half_precision_is_taken_in_float(m):
    pairs = [[x.detach().bfloat16() for x in pair] for pair in vectors(2 if m is simclr_dssl else 4, b=64)]
    full = [[x.double() for x in pair] for pair in pairs]
    assert m.dssl_loss(*pairs).item() == pytest.approx(m.dssl_loss(*full).item(), abs=1e-5)


# ------------------------------------------------------------------------------------------------- models


def settings(m, *flags):
    return m.parse_args(["--arch", "small", "--dim", "16", *flags])


def test_ema_moves_parameters_alone():
    model = byol_dssl.BYOL(settings(byol_dssl, "--hidden", "16"))
    online = [*model.backbone.parameters(), *model.projector.parameters()]
    target = list(model.target.parameters())
    assert len(online) == len(target) and all(torch.equal(a, b) and not b.requires_grad for a, b in zip(online, target))
    with torch.no_grad():
        for x in online:
            x.add_(torch.randn_like(x))
    expected = [0.9 * t + 0.1 * o for t, o in zip(target, online)]
    buffers = [b.clone() for b in model.target.buffers()]
    model.update_target(0.9)
    assert all(torch.allclose(t, e, atol=1e-6) for t, e in zip(target, expected))
    assert all(torch.equal(a, b) for a, b in zip(model.target.buffers(), buffers))


@pytest.mark.parametrize("weights, targets", [((1, 0, 0, 0), (2, 0)), ((1, 0, 1, 0), (2, 0)), ((0, 1, 0, 0), (0, 2)), ((1, 1, 1, 1), (2, 2))])
def test_byol_targets(weights, targets):
    model = byol_dssl.BYOL(settings(byol_dssl, "--hidden", "16", "--weights", *map(str, weights)))
    x = torch.rand(4, 2, 3, 16, 16).unbind(1)
    (p, z, p_hat, z_hat), y = model(x, x)
    assert (len(z), len(z_hat)) == targets and y.shape == (4, 4, 16)
    assert all(not t.requires_grad for t in [*z, *z_hat]) and all(t.requires_grad for t in [*p, *p_hat])


@pytest.mark.parametrize("m, model", [(simsiam_dssl, "SimSiam"), (byol_dssl, "BYOL"), (simclr_dssl, "SimCLR")])
def test_each_view_has_its_own_batch_statistics(m, model):
    torch.manual_seed(0)
    net = getattr(m, model)(settings(m, "--weights", "1", "1", "1", "1"))
    a, b = torch.rand(2, 8, 3, 16, 16)
    alone, together = net((a,), ())[1][0], net((a,), (5 * b,))[1][0]
    assert torch.allclose(alone, together, atol=1e-5)


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_backbone_loads_into_torchvision(arch, stem, tmp_path):
    ours, d = simsiam_dssl.make_backbone(arch, stem)
    assert list(ours.state_dict()) == [key for key in getattr(models, arch)().state_dict() if not key.startswith("fc.")]
    theirs = getattr(models, arch)()
    assert d == theirs.fc.in_features
    theirs.fc = nn.Identity()
    if stem == "cifar":
        theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(ours.eval()(x), theirs.eval()(x))
    torch.save(getattr(models, arch)().state_dict() if stem == "imagenet" else ours.state_dict(), tmp_path / "net.pt")
    found, width = linear_eval.load_backbone(tmp_path / "net.pt")  # with fc or without
    assert width == d and found.conv1.stride == theirs.conv1.stride and type(found.maxpool) is type(theirs.maxpool)


def test_lars_leaves_vectors_alone():
    w, v = nn.Parameter(torch.full((2, 2), 2.0)), nn.Parameter(torch.ones(2))
    w.grad, v.grad = torch.full((2, 2), 3.0), torch.full((2,), 3.0)
    simclr_dssl.LARS([w, v], 0.5, momentum=0.9, weight_decay=0.1).step()
    assert torch.allclose(w, torch.full((2, 2), 2 - 0.5 * 0.001 * 2.0))  # lr · 0.001 · ‖w‖ · g/‖g‖, the direction of g + wd w
    assert torch.allclose(v, torch.full((2,), 1 - 0.5 * 3.0))  # plain SGD without decay


# ------------------------------------------------------------------------------------------------- kNN monitor


@pytest.mark.parametrize("m", METHODS)
@pytest.mark.parametrize("k", [1, 5, 1000])
def test_knn_against_a_loop(m, k):
    g = torch.Generator().manual_seed(k)
    query, bank, labels = torch.randn(300, 6, generator=g), torch.randn(40, 6, generator=g), torch.randint(4, (40,), generator=g)
    expected = []
    for q in query:
        similarity = [(q @ x / q.norm() / x.norm()).item() for x in bank]
        votes = [0.0] * 4
        for i in sorted(range(40), key=lambda i: -similarity[i])[:k]:
            votes[labels[i]] += math.exp(similarity[i] / 0.1)
        expected.append(votes.index(max(votes)))
    assert m.knn_predict(query, bank, labels, 4, k=k).tolist() == expected


# ------------------------------------------------------------------------------------------------- views


def images(h=32, w=32):
    """Six uint8 images: smooth, smooth and pale, smooth with noise, noise, one colour, two levels."""
    g = torch.Generator().manual_seed(0)
    noise, tint = torch.rand(6, 3, h, w, generator=g), torch.rand(6, 3, 1, 1, generator=g)
    wave = 0.5 + 0.5 * (9 * (tint * torch.linspace(0, 1, w) + (1 - tint) * torch.linspace(0, 1, h)[:, None])).sin()
    x = [wave[0], 0.3 + 0.3 * wave[1], 0.7 * wave[2] + 0.3 * noise[2], noise[3], tint[4].expand(3, h, w),
         0.3 + 0.4 * (noise[5] > 0.5)]
    return (torch.stack(x) * 255).round().byte()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def seeded(function, *args):
    torch.manual_seed(0)
    return function(*args)


def is_share(count, n, p):
    """Whether count of n draws agrees with a probability of p, within five standard deviations."""
    return abs(count - n * p) <= 5 * math.sqrt(n * p * (1 - p))


def record(monkeypatch):
    """Have every operation only note its images' magnitudes: {name: [v, …]}."""
    drawn = defaultdict(list)
    for name in OPS:
        monkeypatch.setitem(OPS, name, lambda x, v, name=name: drawn[name].extend(v.tolist()) or x)
    return drawn


def is_spread(values, low, high):
    """Whether the values look uniform in [low, high]."""
    u = (torch.tensor(values) - low) / (high - low)
    return -1e-6 <= u.min() < 0.02 and 0.98 < u.max() <= 1 + 1e-6 and all(
        is_share((u < q).sum(), len(u), q) for q in (0.25, 0.5, 0.75))


def affine(a=1, b=0, c=0, d=0, e=1, f=0):
    return lambda image: image.transform(image.size, Image.Transform.AFFINE, (a, b, c, d, e, f))


PILLOW = {  # name: (Pillow's own, magnitudes, by how many levels we may differ)
    "AutoContrast": (lambda i, v: ImageOps.autocontrast(i), [0], 1),
    "Equalize": (lambda i, v: ImageOps.equalize(i), [0], 0),
    "Invert": (lambda i, v: ImageOps.invert(i), [0], 0),
    "Posterize": (lambda i, v: ImageOps.posterize(i, max(1, int(v))), [0, 1, 2.7, 4, 8], 0),
    "Solarize": (lambda i, v: ImageOps.solarize(i, v), [0, 77, 128, 200.5, 256], 0),
    "SolarizeAdd": (lambda i, v: ImageOps.solarize(i.point(lambda p: min(255, p + int(v))), 128), [0, 36.6, 110], 0),
    "Color": (lambda i, v: ImageEnhance.Color(i).enhance(v), [0.1, 0.7, 1, 1.9], 1),
    "Contrast": (lambda i, v: ImageEnhance.Contrast(i).enhance(v), [0.1, 0.7, 1, 1.9], 1),
    "Brightness": (lambda i, v: ImageEnhance.Brightness(i).enhance(v), [0.1, 0.7, 1, 1.9], 1),
    "Sharpness": (lambda i, v: ImageEnhance.Sharpness(i).enhance(v), [0.1, 0.7, 1, 1.9], 1),
    "Rotate": (lambda i, v: i.rotate(v), [-30, -7.3, 0, 12, 25], 0),
    "ShearX": (lambda i, v: affine(b=v)(i), [-0.3, -0.11, 0, 0.21], 0),
    "ShearY": (lambda i, v: affine(d=v)(i), [-0.3, -0.11, 0, 0.21], 0),
    "TranslateX": (lambda i, v: affine(c=v)(i), [-50, -9.2, 0, 3.7, 10], 0),
    "TranslateY": (lambda i, v: affine(f=v)(i), [-50, -9.2, 0, 3.7, 10], 0),
}
MOVES = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")


@pytest.mark.parametrize("name", PILLOW)
def test_operation_is_pillows(name):
    pillow, magnitudes, levels = PILLOW[name]
    x = images(24, 40)
    v = torch.tensor(magnitudes).repeat_interleave(len(x)).float()
    ours = OPS[name](x.repeat(len(magnitudes), 1, 1, 1) / 255, v)
    theirs = torch.stack([TF.pil_to_tensor(pillow(TF.to_pil_image(i), v)) for v in magnitudes for i in x])
    close = (ours * 255 - theirs).abs() <= levels + 1e-3
    assert close.float().mean((1, 2, 3)).min() >= (0.98 if name in MOVES else 1)  # Pillow's steps are fixed-point there


def test_cutout():
    x, v = torch.zeros(4000, 3, 32, 32), torch.tensor([0.0, 3.5, 8, 20]).repeat(1000)
    y = OPS["Cutout"](x, v)
    hole = y[:, 0] > 0
    grey = torch.tensor([125, 123, 114])[:, None] / 255
    assert torch.allclose(rearrange(y, "b c h w -> c b h w")[:, hole], grey)
    count = hole.sum((1, 2)).float()
    assert (count[v == 0] == 0).all() and (count <= (v.floor() + 1) ** 2).all()
    assert count[v == 8].mean() == pytest.approx(((28 * 9 + 8 + 7 + 6 + 5) / 32) ** 2, rel=0.03)  # 28 of 32 columns fit
    assert len(hole[v == 8].unique(dim=0)) > 400


# ------------------------------------------------------------------------------------------------- crops, standard views


@pytest.mark.parametrize("size", [12, 80])
def test_crop_is_pillows(size):
    x = images(40, 56).repeat(4, 1, 1, 1)
    boxes = augment.crop_boxes(len(x), 40, 56, (0.2, 1.0), generator=torch.Generator().manual_seed(1))
    crops = [TF.to_pil_image(i).crop((x0, y0, x0 + w, y0 + h)) for i, (x0, y0, w, h) in zip(x, boxes.tolist())]
    theirs = torch.stack([TF.pil_to_tensor(c.resize((size, size), Image.Resampling.BILINEAR)) for c in crops])
    crop = functools.partial(augment.random_resized_crop, size=size, scale=(0.2, 1.0))
    ours = crop(x, generator=torch.Generator().manual_seed(1))
    floats = crop(x / 255, generator=torch.Generator().manual_seed(1))
    assert ours.dtype == torch.uint8 and (ours.int() - theirs.int()).abs().max() <= 1
    assert floats.dtype == torch.float32 and (floats * 255 - ours).abs().max() <= 0.501


def test_crop_boxes_are_torchvisions():
    h, w, scale, ratio = 96, 120, (0.2, 1.0), (3 / 4, 4 / 3)
    ours = augment.crop_boxes(4000, h, w, scale)
    theirs = torch.tensor([RandomResizedCrop.get_params(torch.empty(3, h, w), scale, ratio) for _ in range(4000)])
    left, top, width, height = ours.T
    assert (ours[:, :2] >= 0).all() and (left + width).max() == w and (top + height).max() == h
    area, aspect = width * height / (h * w), width / height
    assert 0.19 < area.min() < 0.22 and area.max() <= 1 and 0.72 < aspect.min() < 0.77 and 1.3 < aspect.max() < 1.37
    for mine, other in zip((top, left, height, width, area), (*theirs.T, theirs[:, 2] * theirs[:, 3] / (h * w))):
        error = (mine.float().var() + other.float().var()).sqrt() / 4000 ** 0.5
        assert abs(mine.float().mean() - other.float().mean()) < 5 * error


def test_crop_boxes_go_everywhere():
    left, top, width, height = augment.crop_boxes(5000, 8, 8, scale=(0.25, 0.25), ratio=(1, 1)).T
    assert (width == 4).all() and (height == 4).all()
    assert all(is_share(count, 5000, 1 / 25) for count in (5 * left + top).bincount(minlength=25))


def test_crop_boxes_where_none_fits():
    assert augment.crop_boxes(2, 10, 101, scale=(1, 1)).tolist() == [[44, 0, 13, 10]] * 2
    assert augment.crop_boxes(2, 101, 10, scale=(1, 1)).tolist() == [[0, 44, 10, 13]] * 2


def test_hue_is_torchvisions():
    x, v = images().repeat(4, 1, 1, 1) / 255, torch.linspace(-0.5, 0.5, 24)
    theirs = torch.stack([TF.adjust_hue(i, float(turn)) for i, turn in zip(x, v)])
    assert torch.allclose(augment.hue(x, v), theirs, atol=1e-4)


def test_blur_is_torchvisions():
    x, sigma = images(48, 40) / 255, torch.tensor([0.1, 0.4, 0.9, 1.3, 1.7, 2.0])
    ours = augment.gaussian_blur(x, sigma)
    theirs = torch.stack([TF.gaussian_blur(i, 29, float(s)) for i, s in zip(x, sigma)])
    assert torch.allclose(ours[..., 14:-14, 14:-14], theirs[..., 14:-14, 14:-14], atol=1e-5)
    assert torch.allclose(ours[4], x[4], atol=1e-5)  # one colour stays, up to the borders


def test_flip_and_normalize():
    x = images() / 255
    assert torch.equal(augment.flip(x, p=1), x.flip(3)) and torch.equal(augment.flip(x, p=0), x)
    theirs = TF.normalize(x, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert torch.allclose(augment.normalize(x), theirs, atol=1e-6)


def test_standard_takes_bytes_or_fractions():
    x = images().byte()
    assert torch.equal(seeded(standard, x), seeded(standard, x / 255))


@pytest.mark.parametrize("on", [True, False])
def test_standard_draws(monkeypatch, on):
    drawn, n = defaultdict(list), 4000
    monkeypatch.setattr(augment, "color_jitter", torch.clone)
    monkeypatch.setattr(augment, "gaussian_blur", lambda x, v: drawn["blur"].extend(v.tolist()) or x)
    x = torch.tensor([[0.2, 0.8], [0.5, 0.1], [0.3, 0.6]])[:, None].expand(n, 3, 1, 2)
    y = standard(x, flips=on, blur=on)
    assert is_share(len(drawn["blur"]), n, 0.5 * on) and (not on or is_spread(drawn["blur"], 0.1, 2))
    grey = (y[:, 0] == y[:, 1]).all((1, 2))
    assert is_share(grey.sum(), n, 0.2)
    assert is_share((y[~grey] == x[0].flip(2)).all(3).all((1, 2)).sum(), (~grey).sum().item(), 0.5 * on)


def test_jitter_draws(monkeypatch):
    x, n = torch.tensor([0.2, 0.5, 0.3]).view(1, 3, 1, 1).expand(4000, -1, 1, 2).clone(), 4000
    x[..., 1] = 0.7 - x[..., 1]
    for k in range(3):  # each by itself, and how far the first pixel has gone from the operation's own fixed point
        y = augment.color_jitter(x, [0.4 * (k == j) for j in range(4)])
        fixed = [torch.zeros_like(x), augment.level(augment.gray(x).mean((2, 3), keepdim=True)) / 255, augment.gray(x)][k]
        factor = ((y - fixed) / (x - fixed))[:, 0, 0, 0]
        assert is_share((factor - 1).abs().gt(1e-5).sum().item(), n, 0.8)
        assert is_spread(factor[(factor - 1).abs() > 1e-5].tolist(), 0.6, 1.4)
    turns = []
    monkeypatch.setattr(augment, "hue", lambda x, v: turns.extend(v.tolist()) or x)
    augment.color_jitter(x)
    assert is_share(len(turns), n, 0.8) and is_spread(turns, -0.1, 0.1)


def test_jitter_is_its_operations_one_after_the_other():
    x = images().repeat(400, 1, 1, 1)[..., ::8, ::8] / 255
    ours = seeded(augment.color_jitter, x)
    torch.manual_seed(0)  # the same draws again
    factor = (torch.rand(2400, 4) * 2 - 1) * torch.tensor([0.4, 0.4, 0.4, 0.1]) + torch.tensor([1, 1, 1, 0])
    order, apply = torch.rand(2400, 4).argsort(1), torch.rand(2400) < 0.8
    functions = [OPS["Brightness"], OPS["Contrast"], OPS["Color"], augment.hue]
    for i in range(0, 2400, 5):
        one = x[i : i + 1]
        for k in order[i].tolist() if apply[i] else ():
            one = functions[k](one, factor[i : i + 1, k])
        assert torch.allclose(ours[i : i + 1], one, atol=2 / 255), i  # a grey may round to another level
    assert len(order.unique(dim=0)) == 24


@pytest.mark.parametrize("text", ["ra(2,5)", "jigsaw(4)"])
def test_large_batches_go_through_in_slices(text):
    x = images(64, 64)[2:3].expand(400, -1, -1, -1) / 255
    y = parse_policy(text)(standard(x))
    assert y.shape == x.shape and len(y.unique(dim=0)) > 200


# ------------------------------------------------------------------------------------------------- draws of each image


def everything(x):
    crops = augment.random_resized_crop(augment.level(x).byte(), 24)
    return augment.normalize(parse_policy("0.9*ra(2,5)|0.1*jigsaw(4)")(standard(crops, blur=True)))


POLICIES = ("ra(2,5)", "ra(2,5,paper)", "ra(8,16)", "ua", "jigsaw(4)", "jigsaw(3)", "ra(2,5)+jigsaw(4)",
            "0.9*ra(2,5)|0.1*jigsaw(4)", "ua|jigsaw(2)")
VIEWS = {text: parse_policy(text) for text in POLICIES} | {
    "crop": functools.partial(augment.random_resized_crop, size=24), "jitter": augment.color_jitter,
    "standard": functools.partial(standard, blur=True), "everything": everything}
each_view = pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)


@each_view
def test_image_does_not_depend_on_its_neighbours(view):
    x, mine = images().repeat(4, 1, 1, 1) / 255, torch.arange(24) % 5 == 0
    among_others = torch.where(column(mine), x, torch.rand(x.shape))
    assert torch.equal(seeded(view, x)[mine], seeded(view, among_others)[mine])


@each_view
def test_memory_layout_changes_nothing(view):
    x, wide = images() / 255, torch.zeros(len(images()), 3, 32, 64)
    wide[..., ::2] = x
    for other in (x.to(memory_format=torch.channels_last), wide[..., ::2]):
        assert torch.allclose(seeded(view, other), seeded(view, x), atol=1e-6)


@each_view
def test_every_image_draws_for_itself(view):
    assert len(view(images()[2].expand(64, 3, 32, 32) / 255).unique(dim=0)) > 32


def test_by_choice_is_a_loop_over_images():
    def function(k):
        def f(x, v, pair):
            assert len(x) == len(v) == len(pair) > 0
            return x * (k + 1) + column(v) - column(pair[:, 1]) + x.mean((1, 2, 3), keepdim=True)
        return f

    functions = [function(k) for k in range(5)]
    choice, x, v, pair = torch.randint(4, (37,)), torch.rand(37, 3, 2, 5), torch.rand(37), torch.rand(37, 2)
    loop = [functions[k](x[i:i + 1], v[i:i + 1], pair[i:i + 1]) for i, k in enumerate(choice.tolist())]
    assert torch.allclose(augment.by_choice(x, choice, functions, v, pair), torch.cat(loop))


# ------------------------------------------------------------------------------------------------- frequencies, signs, magnitudes


@pytest.mark.parametrize("space, count", [("released", 16), ("paper", 14)])
def test_randaugment_draws_evenly(monkeypatch, space, count):
    drawn, n = record(monkeypatch), 16000
    RandAugment(1, 5, space)(torch.zeros(n, 3, 2, 2))
    assert set(drawn) == set(SPACES[space]) and len(drawn) == count
    for name, v in drawn.items():
        assert is_share(len(v), n, 1 / count)
        if name in MOVES:
            assert is_share(sum(value < 0 for value in v), len(v), 0.5)


@pytest.mark.parametrize("space, m, magnitudes", [
    ("released", 15, {"Rotate": {-15, 15}, "Posterize": {2}, "Solarize": {128}, "SolarizeAdd": {55}, "Color": {1},
                      "Sharpness": {1}, "ShearX": {-0.15, 0.15}, "Cutout": {20}, "TranslateY": {-50, 50}}),
    ("released", 0, {"Rotate": {0}, "Posterize": {0}, "Solarize": {0}, "Contrast": {0.1}, "TranslateX": {0}}),
    ("paper", 30, {"Rotate": {-30, 30}, "Posterize": {4.5}, "Solarize": {0}, "Color": {0.1, 1.9}, "ShearY": {-0.3, 0.3},
                   "TranslateX": {round(-150 / 331 * 20, 4), round(150 / 331 * 20, 4)}}),
])
def test_randaugment_magnitudes(monkeypatch, space, m, magnitudes):
    drawn = record(monkeypatch)
    RandAugment(2, m, space)(torch.zeros(500, 3, 20, 20))
    assert {name: {round(v, 4) for v in drawn[name]} for name in magnitudes} == magnitudes
    assert sum(map(len, drawn.values())) == 2 * 500


def test_uniformaugment_draws(monkeypatch):
    drawn, n = record(monkeypatch), 16000
    UniformAugment()(torch.zeros(n, 3, 10, 10))
    assert is_share(len(drawn.pop("Identity")), 2 * n, 0.5)
    assert set(drawn) == set(SPACES["uniform"]) and len(drawn) == 15
    for name, v in drawn.items():
        side = 10 if name in ("TranslateX", "TranslateY", "Cutout") else 1
        low, high = (end * side for end in SPACES["uniform"][name])
        assert is_share(len(v), 2 * n, 0.5 / 15)
        assert is_spread(v, low, high) if low < high else set(v) == {0}


@pytest.mark.parametrize("n", [1, 2, 4, 3, 5])
def test_jigsaw_loses_no_pixel(n):
    x = torch.arange(3.0 * 32 * 32).view(1, 3, 32, 32).expand(20, 3, 32, 32)
    y = Jigsaw(n)(x)
    assert torch.equal(y.flatten(2).sort(2).values, x.flatten(2))
    assert torch.equal(y - y[:, :1], x - x[:, :1])  # the channels go together
    assert torch.equal(x, y) if n == 1 else len(y.unique(dim=0)) > 10


@pytest.mark.parametrize("n", [4, 3])
def test_jigsaw_moves_whole_tiles_evenly(n):
    cut = torch.linspace(0, 8, n + 1).long()
    rows = torch.arange(n).repeat_interleave(cut.diff())
    pixel, tile = 8 * torch.arange(8)[:, None] + torch.arange(8), n * rows[:, None] + rows
    corner = pixel[cut[:-1]][:, cut[:-1]].flatten()  # the first pixel of every tile
    source = Jigsaw(n)(pixel.expand(4000, 3, 8, 8))[:, 0]
    shown = tile.flatten()[source]
    assert torch.equal(source - corner[shown], (pixel - corner[tile]).expand_as(source))
    size = (100 * cut.diff()[:, None] + cut.diff()).flatten()
    alike = (size == size[:, None]).double()
    chance = alike / alike.sum(0)
    share = F.one_hot(shown.flatten(1)[:, corner]).double().mean(0)
    assert ((share - chance).abs() <= 5 * (chance * (1 - chance) / 4000).sqrt()).all()


def test_jigsaw_too_fine():
    Jigsaw(16)(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match=r"jigsaw\(17\) needs images of 34 px"):
        Jigsaw(17)(torch.zeros(1, 3, 40, 32))
    with pytest.raises(ValueError, match=r"jigsaw\(17\)"):
        parse_policy("ua+jigsaw(17)", size=32)


# ------------------------------------------------------------------------------------------------- policies


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("text", POLICIES)
def test_policy_keeps_shape_type_and_range(text, dtype):
    x = images(32, 36).repeat(8, 1, 1, 1).to(dtype) / 255
    y = parse_policy(text)(x)
    assert y.shape == x.shape and y.dtype == dtype and y.min() >= 0 and y.max() <= 1 and not torch.equal(x, y)


@pytest.mark.parametrize("text, part", [
    ("", "''"), ("ra(2)", "'ra(2)'"), ("ra(2,50)", "ra(2,50"), ("ra(0,5)", "ra(0,5"), ("foo", "'foo'"),
    ("ra(2,5)+", "read ''"), ("0.9*ra(2,5)|0.2*ua", "add up to 1"), ("0.9*ra(2,5)|ua", "every branch"),
    ("1*ra(2,5)|ua", "every branch"), ("ra(2,5,blue)", "'blue'"), ("jigsaw(0)", "jigsaw(0)"), ("x*ua", "'x'")])
def test_bad_policy(text, part):
    with pytest.raises(ValueError) as error:
        parse_policy(text)
    assert part in str(error.value)


def test_policy_order():
    x = images() / 255
    by_hand = seeded(lambda x: Jigsaw(4)(RandAugment(2, 5)(x)), x)
    assert torch.equal(seeded(parse_policy("ra(2, 5) + jigsaw(4)"), x), by_hand)


@pytest.mark.parametrize("text, p", [("0.9*jigsaw(1)|0.1*jigsaw(4)", 0.1), ("jigsaw(1)|jigsaw(4)|jigsaw(1)", 1 / 3)])
def test_policy_chances(text, p):
    x = torch.arange(64.0).expand(4000, 3, 64).view(4000, 3, 8, 8)
    assert is_share((parse_policy(text)(x) != x).any(3).any((1, 2)).sum(), len(x), p)


# ------------------------------------------------------------------------------------------------- data


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """36 training and 10 test images of 3 classes, 20 × 16 px: noise, for class c a little brighter in channel c."""
    root = tmp_path_factory.mktemp("images")
    g = torch.Generator().manual_seed(0)
    for split, n in (("train", 36), ("val", 10)):
        for i in range(n):
            x = torch.randint(0, 200, (16, 20, 3), generator=g, dtype=torch.uint8)
            x[..., i % 3] += 40
            path = root / split / f"class{i % 3}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(x.numpy()).save(path)
    return root


@pytest.mark.parametrize("size", [16, 72])  # in memory, streamed
def test_loaders(folder, size):
    train, test = augment.load_data(str(folder), "", size)
    assert torch.is_tensor(train.images) == (size == 16)
    for world in (1, 2, 3):  # evaluation: every image once, whatever the number of ranks
        seen = []
        for rank in range(world):
            loader = augment.EvalLoader(test, 4, size, rank=rank, world=world)
            batches = list(loader)
            assert all(x.dtype == torch.uint8 and x.shape[1:] == (3, size, size) for x, _ in batches)
            seen += torch.cat([y for _, y in batches]).tolist()
        assert sorted(seen) == sorted(test.labels.tolist())

    def epoch(number, first=0, **place):
        loader = augment.TrainLoader(train, 12, 2, size, seed=3, **place)
        loader.set_epoch(number, first)
        return loader.order, list(loader)

    order, batches = epoch(1)
    assert len(batches) == 3 and all(x.shape == (12, 2, 3, size, size) and x.dtype == torch.uint8 for x, _ in batches)
    assert sorted(i for row in order for i in row) == list(range(36)) and order != epoch(2)[0]
    assert not torch.equal(batches[0][0][:, 0], batches[0][0][:, 1])  # two crops of an image differ
    for (x, y), (again, _) in zip(batches, epoch(1)[1]):
        assert torch.equal(x, again)
        assert (x.float().mean((1, 3, 4)).argmax(1) == y).all()  # the label is that image's
    resumed = epoch(1, first=2)[1]
    assert len(resumed) == 1 and torch.equal(resumed[0][0], batches[2][0])
    shares = [epoch(1, rank=rank, world=2)[0] for rank in range(2)]
    assert [a + b for a, b in zip(*shares)] == order  # the ranks share each global batch


def test_odd_images_are_read(tmp_path):
    x = Image.fromarray(torch.randint(0, 256, (40, 60, 3), dtype=torch.uint8).numpy())
    deep, long = Image.new("I;16", (60, 40), 128 * 256), Image.new("I", (60, 40), 128 * 256)
    for i, (image, suffix) in enumerate([(x.convert("L"), "png"), (x.convert("CMYK"), "jpg"), (x.convert("P"), "gif"),
                                         (x.convert("1"), "png"), (x.convert("RGBA"), "png"), (deep, "png"),
                                         (deep, "tif"), (Image.new("I;16B", (60, 40), 128 * 256), "tif"), (long, "tif"),
                                         (Image.new("I", (60, 40), 128), "tif"), (x.resize((1, 1)), "png"), (x.resize((2000, 2)), "jpg")]):
        path = tmp_path / f"{i}.{suffix}"
        image.save(path)
        assert augment.read_image(path).mode == "RGB" and augment.read_centre(path, 72, 82).shape == (3, 72, 72)
        if image.mode[0] == "I":  # not cut off at 255, not darkened
            assert augment.read_centre(path, 72, 82).unique().tolist() == [128]
        loader = augment.TrainLoader(augment.Data([str(path)] * 2, None, []), 2, 2, 72)
        assert next(iter(loader))[0].shape == (2, 2, 3, 72, 72)


@pytest.fixture
def broken(folder, tmp_path):
    """Five files that are no images, and the 36 that are."""
    good = sorted(map(str, (folder / "train").rglob("*.png")))
    cut = open(good[0], "rb").read()
    for name, content in {"zero.png": b"", "text.jpg": b"text", "cut.png": cut[: len(cut) // 2], "wrong.png": cut[:60] + b"x" * 300}.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "link.png").symlink_to(tmp_path / "nowhere")
    return sorted(str(tmp_path / name) for name in ("zero.png", "text.jpg", "cut.png", "wrong.png", "link.png")), good


def test_broken_images_end_no_run(broken, capfd):
    bad, good = broken
    for path in bad:
        with pytest.raises(OSError, match=path) as error:
            augment.read_image(path)
        assert "\n" not in str(error.value)
    paths = good * 17 + bad  # 5 of 617
    train = augment.TrainLoader(augment.Data(paths, torch.arange(617), []), 20, 1, 72)
    train.order = [list(range(620 - 3 - 20 * i, 600 - 3 - 20 * i, -1)) for i in range(30)]  # the broken ones first
    train.order[0][0] = 0
    for number, (crops, labels) in enumerate(train):  # replaced
        assert len(crops) == 20 and labels.max() < 612 and crops.float().std((1, 2, 3, 4)).min() > 5
    assert number == 29 and train.unreadable == 5
    test = augment.EvalLoader(augment.Data(paths, torch.arange(617), []), 50, 72)
    for _ in range(2):
        assert torch.cat([y for _, y in test]).tolist() == list(range(612))  # left out
    images, readable = augment.read_all(paths, 16)
    assert len(images) == 612 and readable.tolist() == [True] * 612 + [False] * 5
    warnings = capfd.readouterr().err.splitlines()
    assert all(sum(path in line for line in warnings) == 1 for path in bad)  # each is named once

    few = augment.Data(good * 12 + bad, torch.arange(437), [])  # 5 of 437: more than 1 %
    with pytest.raises(OSError, match="more than 1 %"):
        list(augment.EvalLoader(few, 50, 72))
    with pytest.raises(OSError, match="more than 1 %"):
        augment.read_all(few.images, 16)
    train = augment.TrainLoader(few, 437, 1, 72)
    with pytest.raises(OSError, match="more than 1 %"):
        list(train)
    with pytest.raises(OSError, match="10 images in a row"):  # a disk that is gone
        list(augment.TrainLoader(augment.Data(bad, None, []), 5, 1, 72))


def test_streamed_crops_are_pillows(tmp_path):
    levels = torch.randint(0, 256, (30, 40, 3), dtype=torch.uint8)
    image = Image.fromarray(levels.numpy()).resize((400, 300), Image.Resampling.BICUBIC)
    image.save(tmp_path / "image.png")
    loader = augment.TrainLoader(augment.Data([str(tmp_path / "image.png")], None, []), 1, 50, 72, seed=5)
    (ours, _), = loader
    boxes = augment.crop_boxes(50, 300, 400, (0.2, 1), generator=augment.generator(5, 0, 0)).tolist()
    for crop, (x, y, w, h) in zip(ours[0], boxes):
        theirs = TF.pil_to_tensor(image.crop((x, y, x + w, y + h)).resize((72, 72), Image.Resampling.BILINEAR))
        assert (crop.int() - theirs.int()).abs().max() <= 1


def test_workers_change_nothing(folder):
    train, _ = augment.load_data(str(folder), "", 72)
    alone, many = (list(augment.TrainLoader(train, 12, 2, 72, workers=n)) for n in (0, 2))
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(alone, many))


def test_folder_without_labels(folder):
    train, test = augment.load_data(str(folder / "train" / "class0"), "", 16)
    assert train.images.shape == (12, 3, 16, 16) and train.labels is None and test is None


def test_wrong_folders(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "flat" / "train").mkdir(parents=True)
    (tmp_path / "flat" / "val").mkdir()
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "train").symlink_to(folder / "train")
    (tmp_path / "other" / "val" / "class0").mkdir(parents=True)
    (tmp_path / "other" / "train").symlink_to(folder / "train")
    Image.new("RGB", (16, 16)).save(tmp_path / "other" / "val" / "class0" / "0.png")
    for name in ("missing", "empty", "flat", "half", "other"):
        with pytest.raises((ValueError, OSError), match="expected .*train/<class>/<image>") as error:
            augment.load_data(str(tmp_path / name), "", 16)
        assert "\n" not in str(error.value)
    with pytest.raises(OSError, match="expected .*imagenet/train/<class>"):
        augment.load_data("imagenet", str(tmp_path), 224)
    with pytest.raises(OSError, match="no CIFAR-10"):
        augment.load_data("cifar10", str(tmp_path), 32, download=False)


def test_glyphs_are_the_same_everywhere():
    (a, labels, classes), (b, *_) = augment.glyphs(50, 24, 0), augment.glyphs(50, 24, 0)
    assert torch.equal(a, b) and a.shape == (50, 3, 24, 24) and a.dtype == torch.uint8 and len(classes) == 36
    assert not torch.equal(a, augment.glyphs(50, 24, 1).images) and a.float().std() > 20 and labels.max() < 36


# ------------------------------------------------------------------------------------------------- scripts

SHARED = ["make_backbone", "nearest", "vote", "knn_predict", "all_rows", "features", "knn_accuracy", "sync_buffers",
          "Parser", "number", "fail", "in_words", "write", "on_signal", "join", "claim"]


def test_common_blocks_are_identical():
    for name in SHARED:
        assert len({inspect.getsource(getattr(m, name)) for m in METHODS}) == 1, name
    for name in ("make_backbone", "Parser", "number", "fail", "join"):
        assert inspect.getsource(getattr(linear_eval, name)) == inspect.getsource(getattr(simsiam_dssl, name)), name
    assert inspect.getsource(linear_eval.LARS) == inspect.getsource(simclr_dssl.LARS)
    lines = [inspect.getsource(m.train).splitlines() for m in METHODS]
    for other in lines[1:]:  # the model's name, its optimizer, its loss, its target: a handful of lines
        assert len(set(lines[0]) ^ set(other)) <= 9, set(lines[0]) ^ set(other)
    assert not any(word in "\n".join(map(inspect.getsource, [getattr(simsiam_dssl, n) for n in SHARED])) for word in ("BYOL", "SimCLR", "byol"))


WRONG = """--weights 0 0 0 0|--weights 1 0 -1 0|--weights 1 0 1|--weights 1 0 1 0 1|--weights 1 0 x 0|--weights nan 0 0 0
--batch 1|--batch 0|--batch x|--batch 2.5|--epochs 0|--epochs -3|--lr -1|--lr nan|--lr inf|--wd -1|--warmup 8|--size 4
--pairs 0|--hv-from nowhere|--data nowhere|--recipe nowhere|--arch resnet19|--stem big|--k 0|--knn-every 0|--workers -1
--heavy nothing|--heavy ra(2)|--heavy ra(2,99)|--heavy jigsaw(13)|--heavy 0.9*ra(2,5)|--seed -1|--dim 0|--nonsense 1
nonsense|--flip yes|--batch""".replace("\n", "|").split("|")


@pytest.mark.parametrize("m", METHODS)
def test_wrong_command_lines(m, capsys):
    for line in WRONG:
        with pytest.raises(SystemExit) as end:
            m.parse_args(line.split())
        message = capsys.readouterr().err
        assert end.value.code == 2 and message.count("\n") == 1 and len(message) > 25, (line, message)


@pytest.mark.parametrize("line", """|net.pt --protocol adam|net.pt --batch 0|net.pt --epochs 0|net.pt --lr -1|net.pt --size x
net.pt --data nowhere|net.pt --recipe nowhere|net.pt --seed -1|net.pt --workers x|net.pt net.pt|--data glyphs""".replace("\n", "|").split("|"))
def test_wrong_command_lines_of_linear_eval(line, capsys):
    with pytest.raises(SystemExit) as end:
        linear_eval.parse_args(line.split())
    assert end.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("line, code", [("--size 4", 2), ("--size x", 2), ("--nonsense", 2), ("--heavy", 2), ("--seed x", 2),
    ("--heavy nothing", 1), ("--heavy jigsaw(20)", 1), ("--heavy ra(0,5)", 1), ("missing.jpg", 1), ("--out nowhere/views.png", 1)])
def test_wrong_command_lines_of_augment(line, code, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["augment.py", *line.split()])
    with pytest.raises(SystemExit) as end:
        augment.main()
    message = capsys.readouterr().err.splitlines() if code == 2 else end.value.code.splitlines()
    assert (end.value.code if code == 2 else 1) == code and len(message) == 1 and message[0].startswith("augment.py: ")


@pytest.mark.parametrize("m", METHODS)
def test_recipes_and_flags(m):
    for name, recipe in m.RECIPES.items():
        args = vars(m.parse_args(["--data", name]))
        assert None not in args.values() and recipe.items() <= args.items()
        flags = [f"--{k.replace('_', '-')}" for k in recipe]
        assert all(flag in m.parse_args.__code__.co_consts or flag in inspect.getsource(m.parse_args) for flag in flags)
    runs = [m.parse_args(line.split()).out for line in (
        "", "--weights 1 0 0 0", "--pairs 2", "--data cifar10", "--heavy ua", "--hv-from image", "--seed 1", "--lr 0.5")]
    assert len(set(runs)) == len(runs)


@contextlib.contextmanager
def undisturbed():
    """train() sets signal handlers and a process group; put both back, however it ends."""
    handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for s, handler in handlers.items():
            signal.signal(s, handler)
        if dist.is_initialized():
            dist.destroy_process_group()


def run(m, folder, out, *flags):
    with undisturbed():
        m.train(m.parse_args(["--data", str(folder), "--recipe", "glyphs", "--size", "16", "--batch", "12", "--epochs", "2",
                              "--k", "5", "--dim", "16", "--out", str(out), *flags]))


@pytest.mark.parametrize("m", METHODS)
def test_short_run(m, folder, tmp_path, capsys, monkeypatch):
    run(m, folder, tmp_path / "a")
    text = capsys.readouterr().out
    assert "DSSL: SV ↔ SV, SV ← HV" in text and "linear_eval.py" in text
    assert {p.name for p in (tmp_path / "a").iterdir()} == {"checkpoint.pt", "backbone.pt", "log.jsonl", "views.png", ".lock"}
    log = [json.loads(line) for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    assert [entry["epoch"] for entry in log] == [0, 1, 2] and all(0 <= entry["knn"] <= 100 for entry in log)
    for entry in log[1:]:
        assert set(entry) >= {"loss", "terms", "lr", "std", "images_per_s", "seconds"} and list(entry["terms"]) == ["SV ↔ SV", "SV ← HV"]
        assert entry["loss"] == pytest.approx(sum(entry["terms"].values()), abs=1e-5)
    backbone = torch.load(tmp_path / "a" / "backbone.pt", weights_only=True)

    run(m, folder, tmp_path / "a")  # a finished run stays as it is
    assert all(torch.equal(v, backbone[k]) for k, v in torch.load(tmp_path / "a" / "backbone.pt", weights_only=True).items())

    real = m.dssl_loss
    for call, step in ((7, 3), (13, 5)):  # stop at an epoch's end and in its middle, go on: nothing is lost
        calls, out = itertools.count(), tmp_path / f"stopped after {step}"

        def interrupted(*args, **kwargs):
            if next(calls) == call:
                signal.raise_signal(signal.SIGTERM)
            return real(*args, **kwargs)

        monkeypatch.setattr(m, "dssl_loss", interrupted)
        with pytest.raises(SystemExit) as end:
            run(m, folder, out)
        assert end.value.code == 143 and torch.load(out / "checkpoint.pt", weights_only=True)["step"] == step
        monkeypatch.undo()
        run(m, folder, out)
        resumed = torch.load(out / "backbone.pt", weights_only=True)
        assert all(torch.equal(value, backbone[key]) for key, value in resumed.items())
        again = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        assert [(e.get("loss"), e.get("lr"), e["knn"]) for e in again] == [(e.get("loss"), e.get("lr"), e["knn"]) for e in log]

    with pytest.raises(SystemExit, match=f"lr {m.RECIPES['glyphs']['lr']}, not 0.5"):
        run(m, folder, tmp_path / "a", "--lr", "0.5")
    other = METHODS[METHODS.index(m) - 1]
    with pytest.raises(SystemExit, match=f"script {m.__name__}, not {other.__name__}"):
        run(other, folder, tmp_path / "a")
    with pytest.raises(SystemExit, match="larger than the 36 training images"):
        run(m, folder, tmp_path / "c", "--batch", "48")
    (tmp_path / "c" / "checkpoint.pt").write_bytes(b"half a checkpoint")
    with pytest.raises(SystemExit, match="checkpoint.pt cannot be read"):
        run(m, folder, tmp_path / "c")
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="cannot write into"):
        run(m, folder, tmp_path / "file" / "run")


@pytest.mark.parametrize("m", METHODS)
@pytest.mark.parametrize("flags", ["--weights 1 0 0 0 --pairs 2", "--weights 0 1 0 0 --pairs 2", "--weights 1 1 1 1 --hv-from image", "--weights 0 0 1 0"])
def test_every_kind_of_run(m, flags, folder, tmp_path):
    run(m, folder / "train" / "class1", tmp_path, *flags.split(), "--epochs", "1", "--batch", "6")  # and without labels
    entry, = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()][1:]
    assert math.isfinite(entry["loss"]) and "knn" not in entry


def test_views_that_are_forwarded(folder, tmp_path, monkeypatch):
    seen, real = [], simsiam_dssl.SimSiam.forward
    monkeypatch.setattr(simsiam_dssl.SimSiam, "forward", lambda self, v, v_hat: seen.append((len(v), len(v_hat))) or real(self, v, v_hat))
    for i, flags in enumerate(["", "--weights 1 0 0 0", "--weights 1 0 0 0 --pairs 2", "--weights 0 1 0 0 --pairs 2", "--hv-from image"]):
        run(simsiam_dssl, folder, tmp_path / str(i), *flags.split(), "--epochs", "1", "--batch", "36")
    assert seen == [(2, 2), (2, 0), (4, 0), (0, 4), (2, 2)]


@pytest.mark.parametrize("source", ["sv", "image"])
def test_heavy_views_come_from_their_own_sv(source, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(augment, "parse_policy", lambda *_: lambda x: 1 - x)
    monkeypatch.setattr(augment, "normalize", lambda x: x)
    views, real = [], simsiam_dssl.SimSiam.forward
    monkeypatch.setattr(simsiam_dssl.SimSiam, "forward", lambda self, v, v_hat: views.append((v, v_hat)) or real(self, v, v_hat))
    run(simsiam_dssl, folder, tmp_path, "--hv-from", source, "--epochs", "1", "--batch", "36")
    v, v_hat = views[-1]
    assert [torch.equal(v_hat[i], 1 - v[i]) for i in range(2)] == [source == "sv"] * 2


def test_ema_follows_the_step(folder, tmp_path):
    flags = ["--ema", "0.5", "--hidden", "16", "--epochs", "1", "--batch", "36"]
    run(byol_dssl, folder, tmp_path, *flags)
    torch.manual_seed(0)
    start = byol_dssl.BYOL(settings(byol_dssl, *flags)).backbone.conv1.weight
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["model"]
    assert not torch.equal(start, state["backbone.conv1.weight"])
    assert torch.allclose(state["target.0.conv1.weight"], (start + state["backbone.conv1.weight"]) / 2, atol=1e-7)


def test_collapse_is_called_by_name(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(augment, "standard", lambda x, *_: 0.0 * x)
    run(simsiam_dssl, folder, tmp_path, "--weights", "1", "0", "0", "0")
    assert "WARNING: the std is low" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_stops_the_run(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(simsiam_dssl, "dssl_loss", lambda p, z, p_hat, z_hat, weights: p[0].sum() * math.nan if p else 0)
    with pytest.raises(SystemExit, match="not finite"):
        run(simsiam_dssl, folder, tmp_path, "--weights", "1", "0", "0", "0")
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)  # the last good one is still there
    assert state["step"] == 0 and all(x.isfinite().all() for x in state["model"].values())


def weights(folder):
    return torch.load(folder / "backbone.pt", weights_only=True)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_a_weight_that_is_not_finite_is_never_saved(folder, tmp_path, monkeypatch):
    real, calls = torch.optim.SGD.step, itertools.count(1)

    def broken(self, *args):
        real(self, *args)
        if next(calls) == 6:  # after the last loss
            self.param_groups[0]["params"][0].data.fill_(math.nan)

    monkeypatch.setattr(torch.optim.SGD, "step", broken)
    with pytest.raises(SystemExit, match="a weight is not finite by step 6"):
        run(simsiam_dssl, folder, tmp_path)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 3
    assert all(x.isfinite().all() for x in weights(tmp_path).values())


class Crash(Exception):
    pass


def test_a_crash_costs_ten_minutes_at_most(folder, tmp_path, monkeypatch):
    run(simsiam_dssl, folder, tmp_path / "whole")
    real, calls, clock = simsiam_dssl.dssl_loss, itertools.count(), itertools.count(0, 1000)

    def crash(*args, **kwargs):
        if next(calls) == 13:  # in the fifth step: each takes the loss once for learning and twice for the log
            raise Crash
        return real(*args, **kwargs)

    monkeypatch.setattr(simsiam_dssl, "dssl_loss", crash)
    monkeypatch.setattr(simsiam_dssl.time, "time", lambda: next(clock))
    with pytest.raises(Crash):
        run(simsiam_dssl, folder, tmp_path / "run")
    monkeypatch.undo()
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] == 4
    run(simsiam_dssl, folder, tmp_path / "run")
    assert equal(weights(tmp_path / "run"), weights(tmp_path / "whole"))


def test_a_signal_need_not_wait_for_the_monitor(folder, tmp_path, monkeypatch):
    run(simsiam_dssl, folder, tmp_path / "whole")
    real, steps = simsiam_dssl.knn_accuracy, []

    def killed(*args, **kwargs):
        assert signal.getsignal(signal.SIGTERM) == signal.getsignal(signal.SIGINT) == signal.SIG_DFL
        steps.append(torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"])
        if steps in ([0], [0, 0, 3]):  # the first and the second monitor, each at its first try
            raise Crash
        return real(*args, **kwargs)

    monkeypatch.setattr(simsiam_dssl, "knn_accuracy", killed)
    for _ in range(2):
        with pytest.raises(Crash):
            run(simsiam_dssl, folder, tmp_path / "run")
    run(simsiam_dssl, folder, tmp_path / "run")
    assert steps == [0, 0, 3, 3, 6] and equal(weights(tmp_path / "run"), weights(tmp_path / "whole"))
    logs = [[json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()] for name in ("run", "whole")]
    assert [(e.get("loss"), e["knn"]) for e in logs[0]] == [(e.get("loss"), e["knn"]) for e in logs[1]]


def test_a_full_disk_leaves_the_last_good_file(folder, tmp_path, monkeypatch):
    simsiam_dssl.write(tmp_path / "file", "good")
    calls = itertools.count(1)

    def full(_):
        if next(calls) > 4:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(simsiam_dssl.os, "fsync", full)
    with pytest.raises(OSError, match="cannot write .*No space left") as error:
        run(simsiam_dssl, folder, tmp_path / "run")  # two files before the first monitor, the log, and one of two after
    assert "\n" not in str(error.value)
    with pytest.raises(OSError, match="No space left"):
        simsiam_dssl.write(tmp_path / "file", {"x": torch.ones(3)})
    monkeypatch.undo()
    assert (tmp_path / "file").read_text() == "good" and not list(tmp_path.rglob("*.part"))
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] == 0
    run(simsiam_dssl, folder, tmp_path / "run")  # and goes on


def test_a_signal_to_the_whole_group_leaves_a_checkpoint(folder, tmp_path):
    line = ["--data", str(folder), "--recipe", "glyphs", "--size", "72", "--batch", "12", "--epochs", "500", "--knn-every", "500",
            "--workers", "1", "--out", str(tmp_path / "run")]
    with subprocess.Popen([sys.executable, simsiam_dssl.__file__, *line], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True, start_new_session=True) as process:
        try:
            for text in process.stdout:
                if text.startswith("epoch   2"):
                    break
            os.killpg(process.pid, signal.SIGTERM)  # as torchrun and clusters do
            rest = process.stdout.read()
            assert process.wait(60) == 143 and "stopped after step" in rest and "Traceback" not in rest
        finally:
            process.kill()
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] >= 6


def test_two_runs_do_not_share_a_folder(folder, tmp_path):
    code = f"import fcntl; f = open('{tmp_path}/.lock', 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(SystemExit, match="another run is writing into"):
            run(simsiam_dssl, folder, tmp_path)
        assert {p.name for p in tmp_path.iterdir()} == {".lock"}
        other.kill()
    run(simsiam_dssl, folder, tmp_path, "--epochs", "1")  # the lock ended with its process


@pytest.mark.parametrize("flags", ["--batch 2 --heavy jigsaw(3)", "--size 19 --heavy ra(1,9)+jigsaw(5)|ua", "--size 72 --workers 0 --k 999 --batch 36"])
def test_odd_but_legal_runs(flags, folder, tmp_path):
    for i, path in enumerate((folder / "train").rglob("*.png")):  # one image a class
        for split in ("train", "val"):
            (tmp_path / "images" / split / f"class{i}").mkdir(parents=True)
            (tmp_path / "images" / split / f"class{i}" / "0.png").symlink_to(path)
    run(simsiam_dssl, tmp_path / "images", tmp_path / "run", "--epochs", "1", *flags.split())
    entry = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    assert math.isfinite(entry["loss"]) and 0 <= entry["knn"] <= 100


def test_linear_eval_settings():
    def settings(line):
        args = linear_eval.parse_args(["backbone.pt", *line.split()])
        return args.size, args.scale, args.flip, args.protocol, args.batch, args.epochs, args.lr * args.batch / 256

    assert settings("--data cifar10") == (32, 0.8, True, "sgd", 256, 100, 30)
    assert settings("--data imagenet") == (224, 0.08, True, "lars", 4096, 90, pytest.approx(1.6))
    assert settings("--data imagenet --protocol sgd-linear --batch 256") == (224, 0.08, True, "sgd-linear", 256, 90, 0.1)
    assert settings("") == (24, 0.8, False, "sgd", 256, 30, 0.3) and settings("--protocol sgd")[-1] == 30


def test_linear_eval(folder, tmp_path, capsys):
    run(simsiam_dssl, folder, tmp_path, "--epochs", "1", "--warmup", "0")
    before = torch.load(tmp_path / "backbone.pt", weights_only=True)
    base = [str(tmp_path / "backbone.pt"), "--data", str(folder), "--recipe", "glyphs", "--size", "16"]
    for flags in (["--epochs", "20"], ["--protocol", "lars", "--batch", "12", "--epochs", "2"], ["--protocol", "sgd-linear", "--batch", "12", "--epochs", "2"]):
        capsys.readouterr()
        with undisturbed():
            linear_eval.train(linear_eval.parse_args([*base, "--batch", "12", *flags]))
        result = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert result["images"] == 10 and result["top5"] == 100 and 0 <= result["top1"] <= result["best_top1"]
        if "lars" not in flags and "sgd-linear" not in flags:
            assert result["top1"] >= 60  # of three classes that differ in colour
    assert all(torch.equal(v, before[k]) for k, v in torch.load(tmp_path / "backbone.pt", weights_only=True).items())


def test_linear_eval_refuses(folder, tmp_path, monkeypatch):
    (tmp_path / "text.pt").write_text("no weights")
    torch.save({"conv1.weight": torch.zeros(8, 3, 3, 3)}, tmp_path / "other.pt")
    torch.save({"model": {}, "step": 1}, tmp_path / "checkpoint.pt")
    for name in ("text.pt", "other.pt", "checkpoint.pt"):
        with pytest.raises(ValueError, match=name):
            linear_eval.load_backbone(tmp_path / name)
    torch.save(simsiam_dssl.make_backbone("small", "cifar")[0].state_dict(), tmp_path / "net.pt")
    line = [str(tmp_path / "net.pt"), "--data", str(folder), "--recipe", "glyphs", "--size", "16", "--batch", "12", "--epochs", "1"]
    monkeypatch.setattr(linear_eval, "load_backbone", lambda path: (torch.nn.Sequential(nn.Flatten(), nn.BatchNorm1d(768)), 768))
    with undisturbed(), pytest.raises(SystemExit, match="backbone has changed"):  # a BN left in train mode
        linear_eval.train(linear_eval.parse_args(line))


# ------------------------------------------------------------------------------------------------- two ranks


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def rank_main(rank, world, folder, out, port):
    """What every rank does; results go to out/rank<i>.pt."""
    torch.set_num_threads(1)
    os.environ |= dict(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    result, m = {}, simsiam_dssl
    real = m.knn_accuracy

    def watched(backbone, *rest, **kwargs):  # what the monitor sees on this rank
        result["buffers"] = [b.clone() for b in backbone.buffers()]
        result["knn"] = real(backbone, *rest, **kwargs)
        return result["knn"]

    m.knn_accuracy = watched
    m.train(m.parse_args(["--data", folder, "--recipe", "glyphs", "--size", "16", "--batch", "12", "--epochs", "1", "--k", "5", "--out", f"{out}/run"]))

    dist.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=world)
    result["all_rows"] = m.all_rows(torch.full((3 - rank, 2), float(rank)))
    for method, name in zip(METHODS, MODELS):
        result[name] = loss_and_gradient(method, name, rank, world)
    torch.save(result, f"{out}/rank{rank}.pt")
    dist.destroy_process_group()


MODELS = ["SimSiam", "BYOL", "SimCLR"]


def loss_and_gradient(m, name, rank, world):
    """Of a global batch of 12 and all four terms, over all ranks; BN in eval mode, since on CPU its batch is a rank's."""
    torch.manual_seed(0)
    args = settings(m, "--dim", "16", "--weights", "1", "0.7", "0.5", "0.3")
    model = getattr(m, name)(args).eval()
    views = torch.rand(4, 12, 3, 16, 16).chunk(world, 1)[rank]
    ddp = nn.parallel.DistributedDataParallel(model)
    outputs, _ = ddp(tuple(views[:2]), tuple(views[2:]))
    if name == "SimCLR":
        outputs = [[m.Gather.apply(x) for x in pair] for pair in outputs]
    loss = m.dssl_loss(*outputs, weights=args.weights)
    loss.backward()
    dist.all_reduce(total := loss.detach().clone())
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad and p.grad is not None])
    return total / world, gradient


@pytest.mark.parametrize("world", [2, 4])
def test_ranks(world, folder, tmp_path):
    real, calls = simsiam_dssl.dssl_loss, itertools.count()

    def interrupted(*args, **kwargs):
        if next(calls) == 3:
            signal.raise_signal(signal.SIGTERM)
        return real(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):  # one rank begins, and more go on
        patch.setattr(simsiam_dssl, "dssl_loss", interrupted)
        run(simsiam_dssl, folder, tmp_path / "run", "--epochs", "1", "--dim", "512")
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] == 2

    ranks = torch.multiprocessing.spawn(rank_main, (world, str(folder), str(tmp_path), free_port()), nprocs=world, join=False)
    for _ in range(30):
        if ranks.join(timeout=5):
            break
    else:
        for process in ranks.processes:
            process.kill()
        pytest.fail("the ranks hang")
    results = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(world)]
    one = results[0]
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(one["buffers"], other["buffers"])) and one["knn"] == other["knn"]
    assert all(r["all_rows"].tolist() == [[0, 0]] * 3 + [[1, 1]] * 2 + [[2, 2]] * (world > 2) for r in results)
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [entry["epoch"] for entry in log] == [0, 1] and 0.7 < log[1]["std"] < 1.3  # of one rank's steps and the others'
    with undisturbed():  # the same in one process
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        for m, name in zip(METHODS, MODELS):
            loss, gradient = loss_and_gradient(m, name, 0, 1)
            for result in results:
                assert abs(result[name][0] - loss) < 1e-5 and (result[name][1] - gradient).abs().max() < 1e-5
            assert gradient.abs().max() > 1e-3

    with undisturbed():  # a sharded monitor counts what a single process counts
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        train, test = augment.load_data(str(folder), "", 16)
        net = simsiam_dssl.make_backbone("small", "cifar")[0]
        net.load_state_dict(torch.load(tmp_path / "run" / "backbone.pt", weights_only=True))
        loaders = [augment.EvalLoader(s, 256, 16) for s in (train, test)]
        assert simsiam_dssl.knn_accuracy(net, *loaders, 3, 5) == one["knn"]
        (bank, labels), (query, truth) = (simsiam_dssl.features(net, loader) for loader in loaders)
        right = simsiam_dssl.knn_predict(query, bank, labels, 3, k=5) == truth
        assert one["knn"] == pytest.approx(100 * right.float().mean().item()) and len(truth) == 10


# ------------------------------------------------------------------------------------------------- CUDA


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


@needs_cuda
@pytest.mark.parametrize("m", METHODS)
def test_short_run_on_cuda(m, folder, tmp_path):
    run(m, folder, tmp_path)
    net, _ = linear_eval.load_backbone(tmp_path / "backbone.pt")
    assert all(x.dtype in (torch.float32, torch.int64) and x.isfinite().all() for x in net.state_dict().values())


@needs_cuda
@pytest.mark.parametrize("m, model", [(simsiam_dssl, "SimSiam"), (byol_dssl, "BYOL"), (simclr_dssl, "SimCLR")])
def test_bf16_and_syncbn(m, model):
    with undisturbed():
        dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
        torch.manual_seed(0)
        net = getattr(m, model)(settings(m)).cuda()
        x = torch.rand(32, 3, 24, 24, device="cuda")
        full = net((x,), ())[1]
        with torch.autocast("cuda", torch.bfloat16):
            half = nn.SyncBatchNorm.convert_sync_batchnorm(net)((x,), ())[1]  # in a world of one it must change nothing
        assert F.cosine_similarity(full, half.float(), dim=-1).mean() > 0.98

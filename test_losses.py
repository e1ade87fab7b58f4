"""Tests: CPU, no network, a few minutes. Those that need CUDA skip without it."""
import contextlib
import errno
import functools
import inspect
import io
import itertools
import json
import math
import os
import pickle
import re
import shlex
import socket
import subprocess
import sys
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


DEVICES = ["cpu", pytest.param("cuda", marks=needs_cuda)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m", METHODS)
def test_losses_are_taken_in_float_wherever_they_are_pasted(m, dtype, device):
    """Nearly equal images are where half precision hurts: as input, and in the caller's autocast."""
    g = torch.Generator().manual_seed(0)
    centre = torch.randn(1, 64, generator=g)
    pairs = [[centre + 0.05 * torch.randn(256, 64, generator=g) for _ in range(2)] for _ in range(2 if m is simclr_dssl else 4)]
    pairs = [[x.to(device, dtype) for x in pair] for pair in pairs]
    full = [[x.float().requires_grad_() for x in pair] for pair in pairs]
    loss = m.dssl_loss(*full, weights=(1, 1, 1, 1))
    gradients = torch.autograd.grad(loss, full[0])
    with torch.autocast(device, dtype):
        again = m.dssl_loss(*full, weights=(1, 1, 1, 1))
    assert again.dtype == torch.float32 and again.item() == loss.item()
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(again, full[0]), gradients))
    assert m.dssl_loss(*pairs, weights=(1, 1, 1, 1)).item() == pytest.approx(loss.item(), abs=1e-6)


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
    p, z, p_hat, z_hat, online = model(x, x)
    assert (len(z), len(z_hat)) == targets and len(online) == 4
    assert all(not t.requires_grad for t in [*z, *z_hat]) and all(t.requires_grad for t in [*p, *p_hat])


def projections(out):
    """Of what a model gives those that are trained, a list of (b, d): what the std of the log watches."""
    if len(out) == 5:  # BYOL
        return out[4]
    return out[1] + out[3] if len(out) == 4 else out[0] + out[1]  # SimSiam, SimCLR


@pytest.mark.parametrize("m, model", [(simsiam_dssl, "SimSiam"), (byol_dssl, "BYOL"), (simclr_dssl, "SimCLR")])
def test_each_view_has_its_own_batch_statistics(m, model):
    torch.manual_seed(0)
    net = getattr(m, model)(settings(m, "--weights", "1", "1", "1", "1"))
    a, b = torch.rand(2, 8, 3, 16, 16)
    alone, together = projections(net([a], []))[0], projections(net([a], [5 * b]))[0]
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


@pytest.mark.parametrize("m", METHODS)
def test_rows_without_an_image_vote_for_nobody(m):
    g = torch.Generator().manual_seed(0)
    bank, labels = torch.randn(40, 6, generator=g), torch.randint(4, (40,), generator=g)
    query, labels[::3] = torch.cat([bank[::3], torch.randn(50, 6, generator=g)]), -1
    for k in (3, 1000):
        assert torch.equal(m.knn_predict(query, bank, labels, 4, k=k), m.knn_predict(query, bank[labels >= 0], labels[labels >= 0], 4, k=k))


class Batches(list):
    """A loader in small: batches of 8 and, as augment's loaders, which images each is of."""

    def __init__(self, images, labels):
        super().__init__(zip(images.split(8), labels.split(8)))
        self.order = [list(range(len(part))) for part, _ in self]


@pytest.mark.parametrize("m", METHODS)
def test_the_monitor_is_knn_predict_on_normalised_images(m, monkeypatch):
    """In eval mode, over all images that there are: a label of -1 says that there is none."""
    bank, query = (torch.randint(0, 256, (n, 3, 4, 4), dtype=torch.uint8) for n in (30, 20))
    labels, truth = torch.randint(3, (30,)), torch.randint(3, (20,))
    labels[7], truth[3] = -1, -1
    seen, net = [], nn.Sequential(nn.Flatten(), nn.BatchNorm1d(48))
    net.register_forward_pre_hook(lambda net, x: seen.append((x[0], net.training)))
    with undisturbed():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        monkeypatch.setattr(dist, "broadcast", None)  # in a world of one no large tensor goes through a collective
        banks, real, search = [], m.features, m.knn_predict
        monkeypatch.setattr(m, "features", lambda *args: banks.append(real(*args)) or banks[-1])
        monkeypatch.setattr(m, "knn_predict", lambda query, bank, *rest: banks.append(bank) or search(query, bank, *rest))
        accuracy = m.knn_accuracy(net, Batches(bank, labels), Batches(query, truth), 3, k=5)
    assert banks[-1].data_ptr() == banks[0][0].data_ptr()  # the bank is never copied
    monkeypatch.undo()
    x = [TF.normalize(part / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)).flatten(1) for part in (bank, query)]
    predicted = m.knn_predict(x[1], x[0][labels >= 0], labels[labels >= 0], 3, k=5)
    assert accuracy == pytest.approx(100 * (predicted == truth)[truth >= 0].float().mean().item())
    assert torch.allclose(torch.cat([part for part, _ in seen]).flatten(1), torch.cat(x), atol=1e-6)
    assert not any(training for _, training in seen) and net.training


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
def seeded_and_on_cpu(request):
    """Tests without "cuda" in their names see none, also where there is one: they compare bits, and start several ranks."""
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        if "cuda" not in request.node.name:
            patch.setattr(torch.cuda, "is_available", lambda: False)
            patch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
            patch.setenv("CUDA_VISIBLE_DEVICES", "")  # for processes that a test starts
        yield


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


# ------------------------------------------------------------------------------------------------- draws of each image


def everything(x):
    crops = augment.random_resized_crop(augment.level(x).byte(), 24)
    return augment.normalize(parse_policy("0.9*ra(2,5)|0.1*jigsaw(4)")(standard(crops, blur=True)))


POLICIES = ("ra(2,5)", "ra(2,5,paper)", "ra(8,16)", "ua", "jigsaw(4)", "ra(2,5)+jigsaw(4)",
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


@each_view
def test_views_are_the_same_inside_autocast(view):
    x = images() / 255
    with torch.autocast("cpu", torch.bfloat16):
        inside = seeded(view, x)
    assert torch.equal(inside, seeded(view, x))


@pytest.mark.parametrize("text", POLICIES)
def test_policies_travel_to_other_processes_and_take_no_images(text):
    policy, x = parse_policy(text), images() / 255
    assert torch.equal(seeded(pickle.loads(pickle.dumps(policy)), x), seeded(policy, x))
    assert policy(x[:0]).shape == (0, 3, 32, 32)


def test_nothing_keeps_the_mode_of_its_first_caller():
    """Views and normalize give tensors fit for a gradient, and for the next caller, whoever came first."""
    def views(x):
        return augment.normalize(RandAugment(2, 5, "paper")(standard(x, blur=True)))

    x = images() / 255
    with torch.inference_mode():
        first = seeded(views, x)
    torch.export.export(Normalized(), (x,))
    y = seeded(views, x.clone().requires_grad_())
    y.square().sum().backward()
    assert torch.equal(first, y.detach()) and type(augment.normalize(x)) is torch.Tensor


class Normalized(nn.Module):
    def forward(self, x):
        return augment.normalize(OPS["Color"](x, torch.ones(len(x))))


def test_by_choice_is_a_loop_over_images():
    def function(k):
        def f(x, v, pair):
            assert len(x) == len(v) == len(pair) > 0
            return x * (k + 1) + column(v) - column(pair[:, 1]) + x.mean((1, 2, 3), keepdim=True)
        return f

    functions = [function(k) for k in range(4)] + [None]  # the last stays
    choice, x, v, pair = torch.randint(4, (37,)), torch.rand(37, 3, 2, 5), torch.rand(37), torch.rand(37, 2)
    loop = [functions[k](x[i:i + 1], v[i:i + 1], pair[i:i + 1]) if k < 4 else x[i:i + 1] for i, k in enumerate(choice.tolist())]
    before = x.clone()
    assert torch.allclose(augment.by_choice(x, choice, functions, v, pair), torch.cat(loop)) and torch.equal(x, before)


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
    assert set(drawn) == set(SPACES["uniform"]) and len(drawn) == 15
    assert is_share(sum(map(len, drawn.values())), 2 * n, 0.5)
    for name, v in drawn.items():
        side = 10 if name in ("TranslateX", "TranslateY", "Cutout") else 1
        low, high = (end * side for end in SPACES["uniform"][name])
        assert is_share(len(v), 2 * n, 0.5 / 15)
        assert is_spread(v, low, high) if low < high else set(v) == {0}


@pytest.mark.parametrize("space", ["paper", "uniform"])
def test_ranges_are_shares_of_their_own_side(monkeypatch, space):
    drawn = record(monkeypatch)
    x = torch.zeros(4000, 3, 10, 40)
    RandAugment(2, 30, "paper")(x) if space == "paper" else UniformAugment()(x)
    share = 150 / 331 if space == "paper" else 0.45
    for name, side in (("TranslateX", 40), ("TranslateY", 10)):
        assert 0.9 * share * side < max(drawn[name]) <= share * side + 1e-4
    assert max(drawn["ShearY"]) <= 0.3 + 1e-6


@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_jigsaw_loses_no_pixel(n):
    x = torch.arange(3.0 * 32 * 32).view(1, 3, 32, 32).expand(20, 3, 32, 32)
    y = Jigsaw(n)(x)
    assert torch.equal(y.flatten(2).sort(2).values, x.flatten(2))
    assert torch.equal(y - y[:, :1], x - x[:, :1])  # the channels go together
    assert torch.equal(x, y) if n == 1 else len(y.unique(dim=0)) > 10


def test_jigsaw_moves_whole_tiles_evenly():
    n, side = 4, 2
    pixel = 8 * torch.arange(8)[:, None] + torch.arange(8)
    source = Jigsaw(n)(pixel.expand(4000, 3, 8, 8))[:, 0]
    tiles = rearrange(source, "b (i y) (j x) -> b (i j) (y x)", i=n, j=n)
    whole = rearrange(pixel, "(i y) (j x) -> (i j) (y x)", i=n, j=n)
    shown = tiles[:, :, 0] // 8 // side * n + tiles[:, :, 0] % 8 // side  # which tile each place shows
    assert torch.equal(tiles, whole[shown])
    assert torch.equal(shown.sort(1).values, torch.arange(16).expand(4000, -1))
    share = F.one_hot(shown, 16).double().mean(0)  # of each tile at each place
    assert ((share - 1 / 16).abs() <= 5 * (1 / 16 * 15 / 16 / 4000) ** 0.5).all()


def test_jigsaw_refuses_what_it_cannot_divide():
    for h, w in ((32, 40), (40, 32)):
        with pytest.raises(ValueError, match=r"jigsaw\(16\) needs sides that 16 divides, not"):
            Jigsaw(16)(torch.zeros(1, 3, h, w))
    for text in ("jigsaw(17)", "ua+jigsaw(3)", "0.5*ua|0.5*jigsaw(64)"):
        with pytest.raises(ValueError, match="jigsaw"):
            parse_policy(text, size=32)


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
    assert torch.equal(seeded(parse_policy("RA(2, 5) + Jigsaw(4)"), x), by_hand)  # also as the paper writes it


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
    for world in (1, 2, 3):  # evaluation: every image once, and on all ranks equally many; -1 for those that fill up
        seen = []
        for rank in range(world):
            batches = list(augment.EvalLoader(test, 4, size, rank=rank, world=world))
            assert all(x.dtype == torch.uint8 and x.shape[1:] == (3, size, size) for x, _ in batches)
            seen.append(torch.cat([y for _, y in batches]).tolist())
        assert {len(labels) for labels in seen} == {-(-10 // world)}
        assert sorted(y for labels in seen for y in labels if y >= 0) == sorted(test.labels.tolist())

    def epoch(number, **place):
        loader = augment.TrainLoader(train, 12, 2, size, seed=3, **place)
        loader.set_epoch(number)
        return loader.order, list(loader)

    order, batches = epoch(1)
    assert len(batches) == 3 and all(x.shape == (12, 2, 3, size, size) and x.dtype == torch.uint8 for x, _ in batches)
    assert sorted(i for row in order for i in row) == list(range(36)) and order != epoch(2)[0]
    assert not torch.equal(batches[0][0][:, 0], batches[0][0][:, 1])  # two crops of an image differ
    for (x, y), (again, _) in zip(batches, epoch(1)[1]):
        assert torch.equal(x, again)
        assert (x.float().mean((1, 3, 4)).argmax(1) == y).all()  # the label is that image's
    shares = [epoch(1, rank=rank, world=2)[0] for rank in range(2)]
    assert [a + b for a, b in zip(*shares)] == order  # the ranks share each global batch


def test_many_small_images_are_streamed_and_evaluated_alike(folder, tmp_path, monkeypatch):
    """Memory is decided by the training set, for both; what evaluation shows of an image follows from the size alone."""
    def evaluated(data, size):
        return torch.cat([x for x, _ in augment.EvalLoader(data, 4, size)])

    kept = augment.load_data(str(folder), "", 16)
    monkeypatch.setattr(augment, "MEMORY", 36 * 3 * 16 * 16 - 1)  # a byte less than the training set; more than the test set
    streamed = augment.load_data(str(folder), "", 16)
    for resident, paths in zip(kept, streamed):
        assert torch.is_tensor(resident.images) and isinstance(paths.images, list)
        assert torch.equal(evaluated(resident, 16), evaluated(paths, 16)) and torch.equal(resident.labels, paths.labels)
    crops, _ = next(iter(augment.TrainLoader(streamed[0], 12, 2, 16)))
    assert crops.shape == (12, 2, 3, 16, 16)
    assert isinstance(augment.load_data(str(folder / "train"), "", 16)[0].images, list)  # without labels
    for name, other in (("train", "val"), ("val", "train")):  # a test set that alone would be too much
        (tmp_path / name).symlink_to(folder / other)
    assert all(torch.is_tensor(data.images) for data in augment.load_data(str(tmp_path), "", 16))
    assert all(torch.is_tensor(data.images) for data in augment.load_data("glyphs", "", 24))
    for size, shorter in ((64, 64), (72, 82)):
        by_hand = [augment.read_centre(path, size, shorter) for path in streamed[1].images]
        assert torch.equal(evaluated(streamed[1], size), torch.stack(by_hand))


def test_batches_of_evaluation_are_no_larger_than_at_224():
    data = augment.Data(["image.png"] * 300, torch.zeros(300), [])
    for size, batches in ((32, [256, 44]), (224, [256, 44]), (448, [64] * 4 + [44]), (10**5, [1] * 300)):
        assert [len(row) for row in augment.EvalLoader(data, 256, size).order] == batches


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


def test_photographs_stand_upright(tmp_path):
    """Six pixels, red at the top left as it is to be seen, whichever way the camera was held (EXIF)."""
    upright = Image.new("RGB", (3, 2), "white")
    upright.putpixel((0, 0), (255, 0, 0))
    turns = {1: None, 3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    for orientation, turn in turns.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = tmp_path / f"{orientation}.png"
        (upright.transpose(turn) if turn is not None else upright).save(path, exif=exif)
        assert augment.read_image(path).tobytes() == upright.tobytes(), orientation
    upright.save(tmp_path / "broken.jpg", exif=b"Exif\x00\x00no TIFF", quality=100)
    assert augment.read_image(tmp_path / "broken.jpg").size == (3, 2)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "L", "I;16"])
def test_what_is_transparent_is_white(mode, tmp_path):
    """Black ink on a ground that is seen through: in the file, the ground is black as well, or of any colour."""
    alpha = Image.new("L", (4, 4))
    alpha.putpixel((1, 2), 255)
    if mode in ("RGBA", "LA"):
        image, options = Image.new(mode, (4, 4)), {}
        image.putalpha(alpha)
    else:  # one level, or one entry of the palette, is transparent
        image, ground = Image.new(mode, (4, 4), 1), {"P": 1, "RGB": (1, 0, 0), "L": 1, "I;16": 1}[mode]
        image.putpixel((1, 2), 0)
        options = dict(transparency=ground)
        if mode == "P":
            image.putpalette([0, 0, 0, 9, 9, 9])
    image.save(tmp_path / "ink.png", **options)
    found = TF.pil_to_tensor(augment.read_image(tmp_path / "ink.png"))
    expected = torch.full((3, 4, 4), 255, dtype=torch.uint8)
    expected[:, 2, 1] = 0
    assert torch.equal(found, expected)


def test_deep_images_keep_their_levels_or_are_refused_by_name(tmp_path):
    ramp = torch.arange(4096).view(64, 64)  # 12 bits in a file of 16
    Image.fromarray(ramp.to(torch.uint16).numpy()).save(tmp_path / "twelve.png")
    levels = TF.pil_to_tensor(augment.read_image(tmp_path / "twelve.png"))[0]
    assert torch.equal(levels.long(), ramp // 16)
    Image.fromarray((ramp / 4095).numpy()).save(tmp_path / "float.tif")
    with pytest.raises(OSError, match="float.tif: its pixels are floats.*8 or 16 bits"):
        augment.read_image(tmp_path / "float.tif")


@pytest.fixture
def broken(folder, tmp_path):
    """Five files that are no images, and the 36 that are."""
    good = sorted(map(str, (folder / "train").rglob("*.png")))
    cut = open(good[0], "rb").read()
    for name, content in {"zero.png": b"", "text.jpg": b"text", "cut.png": cut[: len(cut) // 2], "wrong.png": cut[:60] + b"x" * 300}.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "link.png").symlink_to(tmp_path / "nowhere")
    return sorted(str(tmp_path / name) for name in ("zero.png", "text.jpg", "cut.png", "wrong.png", "link.png")), good


def test_broken_images_are_named(broken):
    for path in broken[0]:
        with pytest.raises(OSError, match=path) as error:
            augment.read_image(path)
        assert "\n" not in str(error.value)


def test_a_few_broken_images_end_no_run(broken, capfd):
    bad, good = broken
    for paths, k in ((good + bad[:3], 36), (good * 17 + bad, 612)):  # the last are broken: 3 of 39, 5 of 617
        n = len(paths)
        data = augment.Data(paths, torch.arange(n), [])
        train = augment.TrainLoader(data, 10, 1, 72)
        train.order = [list(range(n - 1, n - 11, -1))]  # the broken ones
        (crops, labels), = train  # each replaced by another
        assert len(crops) == 10 and labels.max() < k and crops.float().std((1, 2, 3, 4)).min() > 5
        labels = torch.cat([y for _, y in augment.EvalLoader(data, 50, 72)])
        assert labels.tolist() == list(range(k)) + [-1] * (n - k)  # not counted
        images, readable = augment.read_all(paths, 16)
        assert len(images) == k and readable.tolist() == [True] * k + [False] * (n - k)
    warnings = capfd.readouterr().err
    assert all(f"WARNING: cannot read {path}" in warnings for path in bad)


def test_many_broken_images_stop_the_run(broken):
    bad, good = broken
    for paths in (good * 10 + bad, good[:5] + bad, bad[:2]):  # 5 of 365, 5 of 10, 2 of 2
        with pytest.raises(OSError, match=f"of {len(paths)} images cannot be read"):
            augment.read_all(paths, 16)
        with pytest.raises(OSError, match=f"of {len(paths)} images cannot be read"):
            list(augment.EvalLoader(augment.Data(paths, torch.arange(len(paths)), []), 50, 72))
    with pytest.raises(OSError, match="five images in a row"):  # a disk that is gone
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


def test_batches_from_workers_hold_no_open_files(folder):
    """What people keep of each batch, such as labels, must not use up the files that a process may open."""
    train, test = augment.load_data(str(folder), "", 72)
    for loader in (augment.TrainLoader(train, 12, 2, 72, workers=1), augment.EvalLoader(test, 4, 72, workers=1)):
        batches = list(loader)
        assert len(batches) == 3 and not any(t.is_shared() for batch in batches for t in batch)


@pytest.mark.parametrize("cores, ranks, workers", [(2, None, 2), (6, "2", 3), (1, "8", 1), (16, "", 8), (16, "0", 8)])
def test_workers_are_as_many_as_the_cores_that_we_may_use(folder, monkeypatch, cores, ranks, workers):
    asked = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks) if ranks is not None else monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(torch.utils.data, "DataLoader", lambda *_, num_workers, **__: asked.append(num_workers) or ())
    list(augment.TrainLoader(augment.load_data(str(folder), "", 72)[0], 12, 2, 72, workers=8))
    assert asked == [workers]


def test_folder_without_labels(folder):
    train, test = augment.load_data(str(folder / "train" / "class0"), "", 16)
    assert train.images.shape == (12, 3, 16, 16) and train.labels is None and test is None


def test_folders_as_people_have_them(folder, tmp_path, monkeypatch):
    """Hidden files and folders are nobody's data, links are, and no link leads round in circles."""
    for name in ("train", "val"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for c in range(3):
            (tmp_path / "photos" / name / f"class{c}").symlink_to(folder / name / f"class{c}")
        (tmp_path / "photos" / name / ".ipynb_checkpoints").mkdir()
        (tmp_path / "photos" / name / "empty").mkdir()
        (tmp_path / "photos" / name / ".DS_Store").touch()
    train, test = augment.load_data(str(tmp_path / "photos"), "", 72)
    assert train.classes == test.classes == ["class0", "class1", "class2"] and len(train.images) == 36
    assert train.labels.tolist() == sorted(train.labels.tolist()) and train.labels.bincount().tolist() == [12] * 3

    flat = tmp_path / "flat"
    (flat / "deep" / ".cache").mkdir(parents=True)
    Image.new("RGB", (16, 16)).save(flat / "1.jpg")
    Image.new("RGB", (16, 16)).save(flat / "deep" / "2.JPG")
    for hidden in ("._1.jpg", "deep/._2.jpg", "deep/.cache/3.jpg"):
        (flat / hidden).write_bytes(b"no image")
    for link, to in (("circle", flat), ("deep/up", flat), ("deep/above", tmp_path), ("twice", flat / "deep")):
        (flat / link).symlink_to(to)
    (flat / ".store").mkdir()
    Image.new("RGB", (16, 16)).save(flat / ".store" / "3.png")
    (flat / "stored").symlink_to(flat / ".store")
    (tmp_path / "link").symlink_to(flat)
    monkeypatch.setenv("HOME", str(tmp_path))
    for spelling in (flat, f"{flat}/", tmp_path / "link", "~/flat"):
        assert len(augment.load_data(str(spelling), "", 72)[0].images) == 3
    (tmp_path / "imagenet").symlink_to(tmp_path / "photos")
    assert len(augment.load_data("imagenet", "~", 224)[0].images) == 36


def test_images_are_found_by_ending_and_other_files_are_counted(tmp_path, capsys, monkeypatch):
    endings = ["jpg", "JPEG", "jfif", "gif", "png", "webp"] + ["avif"] * features.check("avif")
    for part in ("train", "val"):
        (tmp_path / part / "class" / "deep").mkdir(parents=True)
        for i, ending in enumerate(endings):
            kind = {"jpg": "jpeg", "jfif": "jpeg"}.get(ending, ending)
            Image.new("RGB", (16, 16), (200, 0, 0)).save(tmp_path / part / "class" / f"{i}.{ending}", format=kind)
        (tmp_path / part / "other").mkdir()
        (tmp_path / part / "other" / "0.png").symlink_to(tmp_path / part / "class" / "4.png")
        for name in ("a.heic", "b.HEIC", "deep/c.heic", "deep/README", "deep/.hidden.txt", "x.\u00fc", "../loose.jpg"):
            (tmp_path / part / "class" / name).touch()
    counts = "{'.heic': 6, 'outside the class folders': 2, '': 2, '.\\xfc': 2}"
    said = f"WARNING: 12 files are left out: {counts}\n"
    for rank, expected in ((None, said), ("", said), ("0", said), ("1", "")):  # one of several processes says it
        monkeypatch.setenv("RANK", rank) if rank is not None else monkeypatch.delenv("RANK", raising=False)
        for data in augment.load_data(str(tmp_path), "", 16):
            assert len(data.images) == len(endings) + 1 and ((data.images[:, 0] > 150) & (data.images[:, 1] < 50)).all()
        assert capsys.readouterr().err == expected


def test_a_folder_that_cannot_be_listed_is_named(folder, tmp_path, monkeypatch):
    """Rather than to be a class less. (For root every folder can be listed, hence the fault by hand.)"""
    scandir = os.scandir

    def fail(path):
        if os.fspath(path) == str(lost):
            raise PermissionError(errno.EACCES, "Permission denied", str(lost))
        return scandir(path)

    (tmp_path / "train").symlink_to(folder / "train")
    (tmp_path / "val" / "class0" / "deep").mkdir(parents=True)
    monkeypatch.setattr(os, "scandir", fail)
    for lost in (folder / "train", folder / "val", folder / "train" / "class1", folder / "val" / "class2"):
        with pytest.raises(OSError, match=f"Permission denied.*{lost}"):
            augment.load_data(str(folder), "", 16)
    lost = folder / "train" / "class1"
    with pytest.raises(OSError, match=f"Permission denied.*{lost}"):  # without labels
        augment.load_data(str(folder / "train"), "", 16)
    lost = tmp_path / "val" / "class0" / "deep"
    with pytest.raises(OSError, match=f"Permission denied.*{lost}"):
        augment.load_data(str(tmp_path), "", 16)


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
        with pytest.raises(OSError, match="expected .*train/<class>/<image>") as error:
            augment.load_data(str(tmp_path / name), "", 16)
        assert "\n" not in str(error.value)
    Image.new("RGB", (16, 16)).save(tmp_path / "flat" / "train" / "0.png")
    for name in ("flat", "half"):  # no class folders; nothing to test on
        with pytest.raises(OSError, match=f"without labels --data {tmp_path}/{name}/train"):
            augment.load_data(str(tmp_path / name), "", 16)
        assert augment.load_data(str(tmp_path / name / "train"), "", 16)[0].labels is None  # and that does it
    with pytest.raises(OSError, match="expected .*imagenet/train/<class>"):
        augment.load_data("imagenet", str(tmp_path), 224)
    with pytest.raises(OSError, match="no CIFAR-10"):
        augment.load_data("cifar10", str(tmp_path), 32, download=False)


def test_one_class_is_none(folder, tmp_path):
    for split in ("train", "val"):  # as other tools lay images out
        (tmp_path / split).mkdir()
        (tmp_path / split / "images").symlink_to(folder / split / "class0")
    with pytest.raises(OSError, match=f"one class tells nothing apart: .*without labels --data {tmp_path}/train$"):
        augment.load_data(str(tmp_path), "", 16)
    assert len(augment.load_data(str(tmp_path / "train"), "", 16)[0].images) == 12


def test_folders_that_are_taken_together_are_named(folder, tmp_path, capsys):
    for part, name in (("train", "Training"), ("val", "Testing")):
        (tmp_path / name).symlink_to(folder / part)
    for spelling in (str(tmp_path), f"{tmp_path}/"):
        train, test = augment.load_data(spelling, "", 16)
        line = f"WARNING: no {tmp_path}/train: taken together, without labels: {{'Training': 36, 'Testing': 10}}\n"
        assert len(train.images) == 46 and test is None and capsys.readouterr().err == line
    augment.load_data(str(folder / "train" / "class0"), "", 16)  # images alone: nothing to say
    augment.load_data(str(folder), "", 16)
    assert not capsys.readouterr().err


def test_our_own_pictures_are_nobodys_data(folder, tmp_path, monkeypatch, capsys):
    for path in (folder / "train" / "class0").iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    interrupted(".", Path("runs/a"), "--batch", "3")
    monkeypatch.setattr("sys.argv", ["augment.py", "--out", "my-views.png"])
    augment.main()
    assert Path("runs/a/views.png").exists() and Path("my-views.png").exists()
    run(simsiam_dssl, ".", "runs/a", "--batch", "3")
    assert json.loads(Path("runs/a/settings.json").read_text())["images"] == [12, 0]
    assert "'views.png': 2" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["augment.py", "--out", "figure.png"])
    assert "--out must end in views.png" in refusal(augment.main)


def test_a_warning_is_one_write(monkeypatch):
    """Else, between its text and its end, there may be another process's line."""
    written = []
    monkeypatch.setattr(sys, "stderr", type("Stream", (), dict(write=written.append, flush=lambda: None)))
    assert augment.attempt(augment.read_image, "nowhere.png") is None
    assert len(written) == 1 and written[0].startswith("WARNING: cannot read nowhere.png") and written[0].endswith("\n")


def test_glyphs_are_the_same_everywhere():
    (a, labels, classes), (b, *_) = augment.glyphs(50, 24, 0), augment.glyphs(50, 24, 0)
    assert torch.equal(a, b) and a.shape == (50, 3, 24, 24) and a.dtype == torch.uint8 and len(classes) == 36
    assert not torch.equal(a, augment.glyphs(50, 24, 1).images) and a.float().std() > 20 and labels.max() < 36


# ------------------------------------------------------------------------------------------------- the scripts' common code and their flags

SHARED = ["make_backbone", "positive", "nonnegative", "spread", "knn_predict", "features", "gather", "knn_accuracy",
          "learning_rate", "make_views", "say", "report", "join", "save", "load", "main"]


def test_common_blocks_are_identical():
    for name in SHARED:
        assert len({inspect.getsource(getattr(m, name)) for m in METHODS}) == 1, name
    for name in ("make_backbone", "positive", "nonnegative", "say", "join", "main"):
        assert inspect.getsource(getattr(linear_eval, name)) == inspect.getsource(getattr(simsiam_dssl, name)), name
    assert inspect.getsource(linear_eval.LARS) == inspect.getsource(simclr_dssl.LARS)
    for name, most in (("train", 5), ("train_epoch", 10), ("parse_args", 12)):  # changed lines: model, optimizer, loss, target
        lines = [set(inspect.getsource(getattr(m, name)).splitlines()) for m in METHODS]
        for other in lines[1:]:
            assert len(lines[0] ^ other) <= most, lines[0] ^ other
    assert not any(word in "".join(inspect.getsource(getattr(simsiam_dssl, name)) for name in SHARED) for word in ("BYOL", "SimCLR", "byol"))


def refusal(function, *args):
    """The one line with which it ends: sys.exit's or, after one line of usage, argparse's."""
    with contextlib.redirect_stderr(io.StringIO()) as text, pytest.raises(SystemExit) as end:
        function(*args)
    if end.value.code == 2:
        usage, message = text.getvalue().splitlines()
        return message
    assert isinstance(end.value.code, str) and "\n" not in end.value.code, end.value.code
    return end.value.code


WRONG = """--weights 0 0 0 0|--weights 1 0 -1 0|--weights 1 0 1|--weights 1 0 1 0 1|--weights 1 0 x 0|--weights nan 0 0 0|--weights 1 0 inf 0
--batch 0|--batch x|--batch 2.5|--epochs 0|--epochs -3|--lr -1|--lr nan|--lr inf|--wd -1|--warmup 5|--size 4|--crop 1.1|--crop nan
--workers -1|--seed -1|--seed 18446744073709551616|--pairs 0|--hv-from nowhere|--data nowhere|--recipe nowhere|--arch resnet19|--stem big|--k 0|--knn-every 0|--workers x
--heavy nothing|--heavy ra(2)|--heavy ra(2,99)|--heavy jigsaw(13)|--heavy 0.9*ra(2,5)|--seed x|--dim 0|--nonsense 1
nonsense|--flip yes|--batch|--dat cifar10""".replace("\n", "|").split("|")


@pytest.mark.parametrize("m", METHODS)
def test_wrong_command_lines(m):
    for line in WRONG + dict(simsiam_dssl=["--layers 0"], byol_dssl=["--ema 1.1", "--ema -1", "--hidden 0"],
                             simclr_dssl=["--temperature 0", "--temperature nan", "--lars 1"])[m.__name__]:
        message = refusal(m.parse_args, line.split())
        said = any(word in message for word in line.split() if word[:2] == "--") or "unrecognized" in message
        assert "error: " in message and said and message.isascii(), (line, message)


@pytest.mark.parametrize("line", """|net.pt --protocol adam|net.pt --batch 0|net.pt --epochs 0|net.pt --lr x|net.pt --size x|net.pt --size 7|net.pt --prot sgd
net.pt --data nowhere|net.pt --recipe nowhere|net.pt --seed x|net.pt --seed -1|net.pt --workers -1|net.pt --workers x|net.pt net.pt|--data glyphs""".replace("\n", "|").split("|"))
def test_wrong_command_lines_of_linear_eval(line, capsys):
    with pytest.raises(SystemExit) as end:
        linear_eval.parse_args(line.split())
    usage, error = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and usage.startswith("usage: ") and " error: " in error


@pytest.mark.parametrize("line", """--size 4|--size x|--nonsense|--heavy|--seed x|--heavy nothing|--heavy jigsaw(20)|--heavy ra(0,5)|missing.jpg
--out nowhere/views.png|--seed -1|--seed 18446744073709551616""".replace("\n", "|").split("|"))
def test_wrong_command_lines_of_augment(line, monkeypatch):
    monkeypatch.setattr("sys.argv", ["augment.py", *line.split()])
    assert refusal(augment.main).startswith("augment.py: ")


@pytest.mark.parametrize("m", METHODS)
@pytest.mark.parametrize("name", simsiam_dssl.RECIPES)
def test_a_recipe_is_complete_shown_by_help_and_overridden_by_flags(m, name, capsys):
    args, recipe = vars(m.parse_args(["--data", name])), m.RECIPES[name]
    assert None not in [args[key] for key in args if key != "out"] and all(args[key] == recipe[key] for key in recipe)
    assert vars(m.parse_args(["--data", "photos", "--recipe", name])) == args | dict(data="photos")
    for key, value in recipe.items():
        if not isinstance(value, (bool, str)):
            other = type(value)(value + 1) if key not in ("crop", "ema") else 0.5
            assert vars(m.parse_args(["--data", name, "--epochs", "30", "--heavy", "ua", "--" + key.replace("_", "-"), str(other)]))[key] == other
    with pytest.raises(SystemExit):
        m.parse_args(["--data", name, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert text.isascii() and all(f"(default: {recipe[key]})" in text for key in ("arch", "batch", "epochs", "lr", "heavy"))


def test_scripts_run_without_their_docstrings(tmp_path):
    for script in ("simsiam_dssl", "byol_dssl", "simclr_dssl", "linear_eval", "augment"):
        command = [sys.executable, "-OO", str(Path(augment.__file__).with_name(f"{script}.py")), "--help"]
        ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
        assert ended.returncode == 0 and "usage: " in ended.stdout, ended.stderr


@pytest.mark.parametrize("environment", ["", "RANK= WORLD_SIZE=", "MASTER_ADDR=host MASTER_PORT=1 LOCAL_WORLD_SIZE=0"])
def test_a_world_of_one_needs_no_torchrun(environment, monkeypatch):
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(key, raising=False)
    for setting in environment.split():
        monkeypatch.setenv(*setting.split("="))
    with undisturbed():
        for _ in range(2):  # and what has joined does not join again
            assert simsiam_dssl.join() == torch.device("cpu")
            assert (dist.get_rank(), dist.get_world_size()) == (0, 1)


# ------------------------------------------------------------------------------------------------- what each recipe builds: heads, optimizer, schedule, target

# script and data: lr for the batch, momentum, weight decay, warm-up epochs, epochs, batch, optimizer
OPTIMIZERS = {
    ("simsiam_dssl", "cifar10"): (0.06, 0.9, 5e-4, 0, 800, 512, "SGD"),
    ("simsiam_dssl", "imagenet"): (0.1, 0.9, 1e-4, 0, 100, 512, "SGD"),
    ("byol_dssl", "cifar10"): (0.06, 0.9, 5e-4, 0, 800, 512, "SGD"),
    ("byol_dssl", "imagenet"): (0.1, 0.9, 1e-4, 0, 100, 512, "SGD"),
    ("simclr_dssl", "cifar10"): (0.06, 0.9, 5e-4, 0, 800, 512, "SGD"),
    ("simclr_dssl", "imagenet"): (0.6, 0.9, 1e-6, 10, 100, 512, "LARS"),
}
# Of the heads all there is, by name: a shape, or for BN its width, where 0 stands for one of 2048 without weight and bias.
HEADS = {
    ("simsiam_dssl", "cifar10"): {
        "projector.0.weight": (2048, 512), "projector.1": 2048, "projector.3.weight": (2048, 2048), "projector.4": 0,
        "predictor.0.weight": (512, 2048), "predictor.1": 512, "predictor.3.weight": (2048, 512), "predictor.3.bias": (2048,)},
    ("simsiam_dssl", "imagenet"): {
        "projector.0.weight": (2048, 2048), "projector.1": 2048, "projector.3.weight": (2048, 2048), "projector.4": 2048,
        "projector.6.weight": (2048, 2048), "projector.7": 0,
        "predictor.0.weight": (512, 2048), "predictor.1": 512, "predictor.3.weight": (2048, 512), "predictor.3.bias": (2048,)},
    ("byol_dssl", "cifar10"): {
        "projector.0.weight": (4096, 512), "projector.0.bias": (4096,), "projector.1": 4096, "projector.3.weight": (256, 4096), "projector.3.bias": (256,),
        "predictor.0.weight": (4096, 256), "predictor.0.bias": (4096,), "predictor.1": 4096, "predictor.3.weight": (256, 4096), "predictor.3.bias": (256,)},
    ("byol_dssl", "imagenet"): {
        "projector.0.weight": (4096, 2048), "projector.0.bias": (4096,), "projector.1": 4096, "projector.3.weight": (256, 4096), "projector.3.bias": (256,),
        "predictor.0.weight": (4096, 256), "predictor.0.bias": (4096,), "predictor.1": 4096, "predictor.3.weight": (256, 4096), "predictor.3.bias": (256,)},
    ("simclr_dssl", "cifar10"): {
        "projector.0.weight": (512, 512), "projector.1": 512, "projector.3.weight": (128, 512), "projector.4": 128},
    ("simclr_dssl", "imagenet"): {
        "projector.0.weight": (2048, 2048), "projector.1": 2048, "projector.3.weight": (128, 2048), "projector.4": 128},
}


@pytest.mark.parametrize("script, data", HEADS)
def test_heads_by_name_and_shape(script, data):
    m = {m.__name__: m for m in METHODS}[script]
    with torch.device("meta"):
        model = getattr(m, MODELS[METHODS.index(m)])(m.parse_args(["--data", data]))
    expected = {}
    for name, shape in HEADS[script, data].items():
        if isinstance(shape, int):
            parts = ("weight", "bias") * bool(shape) + ("running_mean", "running_var")
            expected |= {f"{name}.{part}": (shape or 2048,) for part in parts}
        else:
            expected[name] = shape
    found = {name: tuple(x.shape) for name, x in model.state_dict().items()
             if name.split(".")[0] in ("projector", "predictor") and not name.endswith("num_batches_tracked")}
    assert found == expected
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad and not name.startswith("target.")]
    assert frozen == ["projector.4.bias"] * (script == "simclr_dssl")
    for head in (model.projector, getattr(model, "predictor", model.projector)):  # ReLU after each hidden BN, none at the end
        kinds = [type(layer).__name__ for layer in head]
        assert all(kinds[i + 1] == "ReLU" for i in range(1, len(kinds) - 1) if kinds[i] == "BatchNorm1d") and kinds[-1] != "ReLU"
    if script == "byol_dssl":
        assert {k[len("target.0."):]: v.shape for k, v in model.state_dict().items() if k.startswith("target.0.")} == \
            {k[len("backbone."):]: v.shape for k, v in model.state_dict().items() if k.startswith("backbone.")}


@contextlib.contextmanager
def undisturbed():
    """train() makes a process group; end it, however train() ends."""
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def run(m, folder, out, *flags, recipe="glyphs"):
    with undisturbed():
        m.train(m.parse_args([
            "--data", str(folder), "--recipe", recipe, "--arch", "small", "--stem", "cifar", "--size", "16", "--batch", "12",
            "--epochs", "2", "--k", "5", "--dim", "16", "--workers", "0", "--out", str(out), *flags]))


def log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def weights(folder):
    return torch.load(folder / "backbone.pt", weights_only=True)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


class Stop(Exception):
    pass


@pytest.mark.parametrize("script, data", OPTIMIZERS)
def test_optimizer_and_schedule(script, data, folder, tmp_path, monkeypatch):
    """What the optimizer holds when it steps, over a run that has the recipe's settings but for length, size and warm-up."""
    m, seen = {m.__name__: m for m in METHODS}[script], []
    base, momentum, wd, warmup, epochs, batch, kind = OPTIMIZERS[script, data]
    args = m.parse_args(["--data", data])
    assert (args.epochs, args.batch, args.warmup) == (epochs, batch, warmup)
    real = torch.optim.SGD.step

    def step(self, *rest):
        group, = self.param_groups  # all parameters in one
        seen.append((group["lr"], group["momentum"], getattr(self, "decay", group["weight_decay"]), type(self).__name__,
                     sum(p.numel() for p in group["params"])))
        return real(self, *rest)

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    models = []
    monkeypatch.setattr(nn.parallel, "DistributedDataParallel", lambda model, real=nn.parallel.DistributedDataParallel: models.append(model) or real(model))
    lr, warm = base * 256 / batch, 2
    run(m, folder, tmp_path, "--epochs", "5", "--warmup", str(warm), "--lr", str(lr), recipe=data)  # 15 steps of 12 images
    assert lr == pytest.approx(args.lr)
    rates, steps, peak = [entry[0] for entry in seen], 15, base * 12 / batch
    for i, rate in enumerate(rates):
        w = 3 * warm
        expected = peak * (i + 1) / w if i < w else peak * 0.5 * (1 + math.cos(math.pi * (i - w) / (steps - w)))
        assert rate == pytest.approx(expected)
    assert len(rates) == steps
    assert {entry[1:] for entry in seen} == {(momentum, wd, kind, sum(p.numel() for p in models[0].parameters()))}
    assert [entry["lr"] for entry in log(tmp_path)[1:]] == rates[2::3]


def test_learning_rate():
    rate = functools.partial(simsiam_dssl.learning_rate, steps=110, base=2)
    assert [rate(step, warmup=10) for step in (0, 4, 9, 10, 60)] == pytest.approx([0.2, 1, 2, 2, 1])
    assert rate(109, warmup=10) == pytest.approx(1 + math.cos(math.pi * 0.99)) and rate(0, warmup=0) == 2
    assert max(rate(step, warmup=2.5) for step in range(110)) <= 2
    rate = linear_eval.learning_rate
    assert [rate("sgd", done, 30) for done in (0, 0.59, 0.6, 0.79, 0.8, 0.99)] == pytest.approx([30, 30, 3, 3, 0.3, 0.3])
    assert [rate("lars", done, 1.6) for done in (0, 0.5, 1)] == pytest.approx([1.6, 0.8, 0])
    assert [rate("sgd-linear", done, 1.6) for done in (0, 0.25, 1)] == pytest.approx([1.6, 1.2, 0])


@pytest.mark.parametrize("flags, momenta", [
    ([], [0.99] * 6), (["--ema", "0.5"], [0.5] * 6),
    (["--ema-cosine"], [1 - 0.01 * (1 + math.cos(math.pi * step / 6)) / 2 for step in range(6)])])
def test_momentum_of_the_target(flags, momenta, folder, tmp_path, monkeypatch):
    seen, real = [], byol_dssl.BYOL.update_target
    monkeypatch.setattr(byol_dssl.BYOL, "update_target", lambda self, ema: seen.append(ema) or real(self, ema))
    run(byol_dssl, folder, tmp_path, "--hidden", "16", *flags)
    assert seen == pytest.approx(momenta)


def test_target_follows_the_step(folder, tmp_path):
    flags = ["--ema", "0.5", "--hidden", "16", "--epochs", "1", "--batch", "36"]
    run(byol_dssl, folder, tmp_path, *flags)
    torch.manual_seed(0)
    start = byol_dssl.BYOL(settings(byol_dssl, *flags)).backbone.conv1.weight
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["model"]
    assert not torch.equal(start, state["backbone.conv1.weight"])
    assert torch.allclose(state["target.0.conv1.weight"], (start + state["backbone.conv1.weight"]) / 2, atol=1e-7)


# ------------------------------------------------------------------------------------------------- a run: its views, loss, log, warnings and files


@pytest.mark.parametrize("m", METHODS)
def test_short_run(m, folder, tmp_path, capsys, monkeypatch):
    run(m, folder, tmp_path / "a")
    text = capsys.readouterr().out
    assert text.isascii() and "[1.0, 0.0, 1.0, 0.0] x (SV <-> SV, HV <-> HV, SV <- HV, HV <- SV), pairs 1, heavy ra(2,9,paper)" in text
    assert f"{m.RECIPES['glyphs']['lr'] * 12 / 256:g}, 2 epochs of 3 steps" in text and f"--out {str(tmp_path / 'a')!a} goes on" in text
    lines = [line for line in text.splitlines() if line.startswith("epoch ")]
    for epoch, (line, entry) in enumerate(zip(lines, log(tmp_path / "a"))):
        loss = rf"  loss {entry['loss']:.4f}  std {entry['std']:.2f}  [\d,]+ images/s  \d+ s" if epoch else ""
        assert re.fullmatch(rf"epoch   {epoch}/2{loss}  kNN {entry['knn']:.2f} %", line)
    assert {p.name for p in (tmp_path / "a").iterdir()} == {"checkpoint.pt", "backbone.pt", "log.jsonl", "settings.json", "views.png"}
    entries = log(tmp_path / "a")
    assert [entry["epoch"] for entry in entries] == [0, 1, 2] and all(0 <= entry["knn"] <= 100 for entry in entries)
    assert all(entry.keys() == {"epoch", "loss", "std", "lr", "images_per_s", "seconds", "knn"} for entry in entries[1:])
    assert json.loads((tmp_path / "a" / "settings.json").read_text()).items() >= dict(script=m.__name__, images=[36, 10], lr=0.48, seed=0).items()
    backbone = weights(tmp_path / "a")

    run(m, folder, tmp_path / "a")  # of a complete run nothing is left to do
    text = capsys.readouterr().out
    assert f"complete: {str(tmp_path / 'a' / 'backbone.pt')!a}" in text and "\nepoch" not in text
    assert equal(weights(tmp_path / "a"), backbone) and log(tmp_path / "a") == entries

    calls, real = itertools.count(), m.dssl_loss  # a crash in the second epoch's second step, and on from the first's end

    def crash(*args, **kwargs):
        if next(calls) == 4:
            raise Stop
        return real(*args, **kwargs)

    monkeypatch.setattr(m, "dssl_loss", crash)
    with pytest.raises(Stop):
        run(m, folder, tmp_path / "b")
    monkeypatch.undo()
    assert [entry["epoch"] for entry in log(tmp_path / "b")] == [0, 1]
    run(m, folder, tmp_path / "b")
    assert equal(weights(tmp_path / "b"), backbone)
    assert [(e.get("loss"), e.get("std"), e["knn"]) for e in log(tmp_path / "b")] == [(e.get("loss"), e.get("std"), e["knn"]) for e in entries]


@pytest.mark.parametrize("m", METHODS)
@pytest.mark.parametrize("flags", ["--weights 1 0 0 0 --pairs 2", "--weights 0 1 0 0 --pairs 2", "--weights 1 1 1 1 --hv-from image", "--weights 0 0 1 0.5"])
def test_every_kind_of_run(m, flags, folder, tmp_path, monkeypatch, capsys):
    """What is logged is the mean over steps of the pasted loss, with these weights, summed over the pairs."""
    values, real = [], m.dssl_loss
    monkeypatch.setattr(m, "dssl_loss", lambda *args: values.append((args, real(*args))) or values[-1][1])
    run(m, folder / "train" / "class1", tmp_path, *flags.split(), "--epochs", "1", "--batch", "6")  # and without labels
    entry, pairs = log(tmp_path)[1], 1 + ("--pairs" in flags)
    text = capsys.readouterr().out
    assert "knn" not in entry and "no labels, so no kNN" in text and len(values) == 2 * pairs
    assert text.splitlines()[-1] == f"complete: {str(tmp_path / 'backbone.pt')!a}"  # and no command: it would need labels
    assert entry["loss"] == pytest.approx(sum(value.item() for _, value in values) / 2, abs=1e-6)
    assert all(args[-1] == list(map(float, flags.split()[1:5])) for args, _ in values)
    if pairs == 2:  # each pair of views once
        first, second = (next(views for views in args if len(views)) for args, _ in values[:2])
        assert len(first) == len(second) == 2 and not any(torch.equal(a, b) for a in first for b in second)


@pytest.mark.parametrize("flags", ["--batch 2 --heavy jigsaw(4)", "--size 20 --heavy ra(1,9)+jigsaw(5)|ua", "--size 72 --k 999 --batch 36"])
def test_odd_but_legal_runs(flags, folder, tmp_path):
    for i, path in enumerate((folder / "train").rglob("*.png")):  # one image a class
        for split in ("train", "val"):
            (tmp_path / "images" / split / f"class{i}").mkdir(parents=True)
            (tmp_path / "images" / split / f"class{i}" / "0.png").symlink_to(path)
    run(simsiam_dssl, tmp_path / "images", tmp_path / "run", "--epochs", "1", *flags.split())
    entry = log(tmp_path / "run")[-1]
    assert math.isfinite(entry["loss"]) and 0 <= entry["knn"] <= 100


def test_views_that_are_forwarded(folder, tmp_path, monkeypatch):
    seen, real = [], simsiam_dssl.SimSiam.forward
    monkeypatch.setattr(simsiam_dssl.SimSiam, "forward", lambda self, sv, hv: seen.append((len(sv), len(hv))) or real(self, sv, hv))
    for i, flags in enumerate(["", "--weights 1 0 0 0", "--weights 1 0 0 0 --pairs 2", "--weights 0 1 0 0 --pairs 2", "--hv-from image"]):
        run(simsiam_dssl, folder, tmp_path / str(i), *flags.split(), "--epochs", "1", "--batch", "36")
    assert seen == [(2, 2), (2, 0), (4, 0), (0, 4), (2, 2)]


def test_each_step_and_rank_draws_views_of_its_own(folder, monkeypatch):
    train, _ = augment.load_data(str(folder), "", 16)
    args = settings(simsiam_dssl, "--size", "16", "--batch", "12")

    def views(epoch, rank, seed=0):
        """Each step's first SV and HV; all ranks get the same images and crops here."""
        monkeypatch.setattr(dist, "get_rank", lambda: rank)
        args.seed = seed
        loader = augment.TrainLoader(train, 12, 2, 16)
        loader.order = loader.order[:1] * 2
        monkeypatch.setattr(loader, "set_epoch", lambda epoch: None)
        return [torch.stack([sv[0], hv[0]]) for sv, hv in simsiam_dssl.make_views(loader, args, epoch)]

    first = views(1, 0)
    assert all(torch.equal(a, b) for a, b in zip(first, views(1, 0)))
    for other in (views(2, 0), views(1, 1), views(1, 0, seed=1)):
        assert all(not torch.equal(a[i], b[i]) for a, b in zip(first, other) for i in range(2))


@pytest.mark.parametrize("source", ["sv", "image"])
def test_heavy_views_come_from_their_own_sv(source, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(augment, "parse_policy", lambda *_: lambda x: 1 - x)
    monkeypatch.setattr(augment, "normalize", lambda x: x)
    views, real = [], simsiam_dssl.SimSiam.forward
    monkeypatch.setattr(simsiam_dssl.SimSiam, "forward", lambda self, sv, hv: views.append((sv, hv)) or real(self, sv, hv))
    run(simsiam_dssl, folder, tmp_path, "--hv-from", source, "--epochs", "1", "--batch", "36")
    sv, hv = views[-1]
    assert [torch.equal(hv[i], 1 - sv[i]) for i in range(2)] == [source == "sv"] * 2


@pytest.mark.parametrize("m, model", [(simsiam_dssl, "SimSiam"), (byol_dssl, "BYOL"), (simclr_dssl, "SimCLR")])
def test_std_watches_all_projections_that_are_trained(m, model, folder, tmp_path, monkeypatch):
    outputs, watched, forward, spread = [], [], getattr(m, model).forward, m.spread
    monkeypatch.setattr(getattr(m, model), "forward", lambda self, sv, hv: outputs.append(forward(self, sv, hv)) or outputs[-1])
    monkeypatch.setattr(m, "spread", lambda z: watched.append(z) or spread(z))
    run(m, folder, tmp_path, "--epochs", "1", "--batch", "36")
    assert torch.equal(watched[0], torch.stack(projections(outputs[0]))) and watched[0].shape == (4, 36, 16)
    z = watched[0].detach() / watched[0].detach().norm(dim=-1, keepdim=True)
    assert log(tmp_path)[1]["std"] == pytest.approx(4 * z.std(1).mean().item(), abs=1e-5)


def test_collapse_is_called_by_name(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(augment, "standard", lambda x, *_: 0.0 * x)
    run(simsiam_dssl, folder, tmp_path, "--weights", "1", "0", "0", "0")
    assert "WARNING: std is low" in capsys.readouterr().out


@pytest.mark.parametrize("knn, warned", [  # a twentieth of what is missing at first
    ([40, 42.9, 42.9], 2), ([40, 42.9, 43], 1), ([40, 43, 43], 0), ([98, 98.05, 98.11], 1), ([6.35, 9.28, 11.05], 1)])
def test_learning_nothing_is_called_by_name(knn, warned, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(simsiam_dssl, "knn_accuracy", lambda *_, left=iter(knn): next(left))
    run(simsiam_dssl, folder, tmp_path)
    assert capsys.readouterr().out.count("WARNING: kNN is hardly above the untrained network's") == warned


@pytest.mark.parametrize("k, used", [(1, 1), (3, 3), (4, 3), (200, 3)])  # 36 images of 3 classes: a quarter of 12
def test_k_is_at_most_a_quarter_of_a_class(k, used, folder, tmp_path, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(simsiam_dssl, "knn_predict", lambda query, bank, labels, classes, k: seen.append(k) or labels[: len(query)])
    run(simsiam_dssl, folder, tmp_path, "--epochs", "1", "--k", str(k))
    assert set(seen) == {used} and f"kNN with k {used}\n" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_stops_the_run(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(simsiam_dssl, "dssl_loss", lambda p, z, p_hat, z_hat, weights: p[0].sum() * math.nan)
    assert "not finite in epoch 1, which is not saved: lower --lr" in refusal(run, simsiam_dssl, folder, tmp_path)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)  # the last good one is still there
    assert len(state["history"]) == 1 and all(x.isfinite().all() for x in state["model"].values())


def test_a_weight_that_is_not_finite_is_never_saved(folder, tmp_path, monkeypatch):
    real, calls = torch.optim.SGD.step, itertools.count(1)

    def broken(self, *args):
        real(self, *args)
        if next(calls) == 6:  # after the last loss
            self.param_groups[0]["params"][0].data.fill_(math.nan)

    monkeypatch.setattr(torch.optim.SGD, "step", broken)
    assert "a weight is not finite in epoch 2" in refusal(run, simsiam_dssl, folder, tmp_path)
    assert len(torch.load(tmp_path / "checkpoint.pt", weights_only=True)["history"]) == 2
    assert all(x.isfinite().all() for x in weights(tmp_path).values())


def test_a_full_disk_leaves_the_last_good_file(folder, tmp_path, monkeypatch):
    simsiam_dssl.save("good", tmp_path / "file")
    calls, real = itertools.count(1), Path.write_bytes

    def full(path, data):
        if next(calls) > 3:
            real(path, bytes(data)[:100])
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        run(simsiam_dssl, folder, tmp_path / "run")  # backbone and checkpoint after epoch 0, and the backbone after epoch 1
    with pytest.raises(OSError, match="No space left"):
        simsiam_dssl.save({"x": torch.ones(3)}, tmp_path / "file")
    monkeypatch.undo()
    assert torch.load(tmp_path / "file", weights_only=True) == "good"
    assert len(torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["history"]) == 1
    run(simsiam_dssl, folder, tmp_path / "run")  # and goes on
    assert [entry["epoch"] for entry in log(tmp_path / "run")] == [0, 1, 2]


# ------------------------------------------------------------------------------------------------- going on, and ending


def interrupted(folder, out, *flags):
    """One of two epochs."""
    calls, real = itertools.count(), simsiam_dssl.dssl_loss
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simsiam_dssl, "dssl_loss", lambda *args: real(*args) if next(calls) < 4 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(simsiam_dssl, folder, out, *flags)
    assert [entry["epoch"] for entry in log(out)] == [0, 1]


def test_what_a_run_may_change_and_what_not(folder, tmp_path):
    photos, out, half = tmp_path / "photos", tmp_path / "run", tmp_path / "half"
    for split in ("train", "val"):
        (photos / split).mkdir(parents=True)
        for c in range(3):
            (photos / split / f"class{c}").symlink_to(folder / split / f"class{c}")
    run(simsiam_dssl, folder, out)
    for i, (same, flags) in enumerate([(photos, "--workers 1 --root elsewhere"), (f"{folder}/", "--k 3 --knn-every 2"), (folder, "--bf16")]):
        interrupted(folder, half / str(i))
        run(simsiam_dssl, same, half / str(i), *flags.split())  # what hardware, folders and the monitor decide is free
        assert equal(weights(half / str(i)), weights(out)) == ("--bf16" not in flags)
    lr = simsiam_dssl.RECIPES["glyphs"]["lr"]
    assert f"of a run with lr {lr}, not 0.5" in refusal(run, simsiam_dssl, folder, out, "--lr", "0.5")
    assert "epochs 2, not 3" in refusal(run, simsiam_dssl, folder, out, "--epochs", "3")
    assert "script simsiam_dssl, not byol_dssl" in refusal(run, byol_dssl, folder, out)
    (photos / "train" / "class0").unlink()
    (photos / "train" / "class0").mkdir()
    for path in sorted((folder / "train" / "class0").iterdir())[1:]:
        (photos / "train" / "class0" / path.name).symlink_to(path)
    interrupted(folder, half / "images")
    assert "of a run with images [36, 10], not [35, 10]" in refusal(run, simsiam_dssl, photos, half / "images")


@pytest.mark.parametrize("content", ["empty", "text", "cut", "weights", "list"])
def test_a_damaged_checkpoint_is_named_and_kept(content, folder, tmp_path):
    interrupted(folder, tmp_path)
    path = tmp_path / "checkpoint.pt"
    whole = path.read_bytes()
    if content in ("weights", "list"):  # of another program
        torch.save(weights(tmp_path) if content == "weights" else [1, 2], path)
    else:
        path.write_bytes({"empty": b"", "text": b"no checkpoint", "cut": whole[: len(whole) // 2]}[content])
    before = path.read_bytes()
    assert refusal(run, simsiam_dssl, folder, tmp_path).startswith(f"{path} is damaged, or not a checkpoint of ours (")
    assert path.read_bytes() == before


def test_ranks_with_other_images_are_refused(folder, tmp_path, monkeypatch):
    """As where a node has but a part of them: each rank would take its batches from another order."""
    real = dist.broadcast_object_list

    def from_rank_0(objects):
        real(objects)
        objects[0] = objects[0] | dict(settings=objects[0]["settings"] | dict(images=[40, 10]))

    monkeypatch.setattr(dist, "broadcast_object_list", from_rank_0)
    assert "with images [40, 10], not [36, 10]" in refusal(run, simsiam_dssl, folder, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_simclr_gathers_only_where_there_are_ranks(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(simclr_dssl, "Gather", None)  # gloo in a world of one would slow torch's threads down for good
    run(simclr_dssl, folder, tmp_path, "--epochs", "1", "--batch", "36")


def test_without_out_each_run_has_a_folder_of_its_own(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    line = f"--data {folder} --recipe glyphs --size 16 --batch 36 --epochs 1 --dim 16"
    processes = [subprocess.Popen([sys.executable, simsiam_dssl.__file__, *line.split()], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    folders = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.glob("runs/*"))
    assert len(folders) == 2 and all(re.fullmatch(r"runs/simsiam_dssl-\d{8}-\d{6}-\d+", name) for name in folders)
    for name in folders:
        assert sum(f"the same command with --out '{name}' goes on" in text for text in outputs) == 1
        run_again = subprocess.run([sys.executable, simsiam_dssl.__file__, *line.split(), "--out", name], capture_output=True, text=True, timeout=120)
        assert f"complete: '{name}/backbone.pt'" in run_again.stdout and run_again.returncode == 0
    command = outputs[0].splitlines()[-1].removeprefix("python ").split()  # as it stands, but for its length
    ended = subprocess.run(f"{sys.executable} {' '.join(command)} --epochs 1", shell=True, capture_output=True, text=True, timeout=120)
    assert json.loads(ended.stdout.splitlines()[-1])["images"] == 10, ended.stderr


def test_nothing_is_written_before_all_is_checked(folder, tmp_path):
    for batch in ("48", "1"):
        assert "at most the 36 images" in refusal(run, simsiam_dssl, folder, tmp_path / "run", "--batch", batch)
    with pytest.raises(OSError, match="no folder"):
        run(simsiam_dssl, tmp_path / "typo", tmp_path / "run")
    assert not (tmp_path / "run").exists() and not dist.is_initialized()
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        run(simsiam_dssl, folder, tmp_path / "file" / "run")


@pytest.mark.parametrize("script, line", [("simsiam_dssl.py", "--data typo --recipe glyphs"), ("linear_eval.py", "typo.pt")])
def test_an_error_is_one_line_and_its_own_exit_code(script, line, tmp_path):
    command = [sys.executable, str(Path(augment.__file__).with_name(script)), *line.split()]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert ended.returncode == 1 and len(ended.stderr.splitlines()) == 1 and ended.stderr.startswith(f"{script}: ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fault, said", [
    ("m.dssl_loss = lambda p, *_: p[0].sum() * float('nan')", "not finite"),
    ("m.train_epoch = lambda *_: 1 / 0", "ZeroDivisionError")])
def test_an_error_ends_the_process_at_once(fault, said, folder, tmp_path):
    """Whatever it is: the end of NCCL's group, which here stands for itself, would wait for the other ranks."""
    code = f"""import atexit, sys, time; atexit.register(time.sleep, 1000); import simsiam_dssl as m; {fault}
sys.argv = ["x", "--data", {str(folder)!r}, "--recipe", "glyphs", "--size", "16", "--batch", "36", "--out", {str(tmp_path)!r}]
m.main()"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(augment.__file__).parent, timeout=120)
    assert ended.returncode == 1 and said in ended.stderr.splitlines()[-1] and "epoch   0/5" in ended.stdout, ended.stderr


@pytest.mark.parametrize("ending", ["", ">&-"])
def test_ascii_is_enough_and_a_closed_output_too(ending, tmp_path, folder):
    (tmp_path / "\u00fcml\u00e4ut").symlink_to(folder)
    line = f"--data {tmp_path}/\u00fcml\u00e4ut --recipe glyphs --size 16 --batch 36 --epochs 1 --out {tmp_path}/r\u00fcn"
    for words in ("--help", line):
        ended = subprocess.run(
            f"PYTHONIOENCODING=ascii {sys.executable} {simsiam_dssl.__file__} {words} {ending}", shell=True, capture_output=True, text=True, timeout=120)
        assert ended.returncode == 0 and "Traceback" not in ended.stderr, ended.stderr
    assert len(log(tmp_path / "r\u00fcn")) == 2


def test_a_notebook_trains_twice_and_prints_where_it_wants(folder, tmp_path, monkeypatch):
    line = ["--data", str(folder), "--recipe", "glyphs", "--size", "16", "--batch", "36", "--epochs", "1", "--dim", "16", "--out"]
    with undisturbed(), contextlib.redirect_stdout(io.StringIO()) as text:  # which has no reconfigure, as in IDEs
        for name in ("a", "b"):
            simsiam_dssl.train(simsiam_dssl.parse_args([*line, str(tmp_path / name)]))
    assert equal(weights(tmp_path / "a"), weights(tmp_path / "b")) and text.getvalue().count("epoch   1/1") == 2


# ------------------------------------------------------------------------------------------------- the README's code

def block(word):
    """The one block of Python in the README that has this word in it."""
    found = [text for text in re.findall(r"```python\n(.*?)```", Path(augment.__file__).with_name("README.md").read_text(), re.S) if word in text]
    assert len(found) == 1
    return found[0]


def test_the_method_on_a_page(monkeypatch, capsys):
    """It runs as it stands, here with fewer letters, and its loss is the scripts'."""
    text, glyphs, page = block("for epoch in range(epochs)"), augment.glyphs, {}
    assert len(text.splitlines()) <= 60 and not re.search(r"import \w+_dssl|argparse|torch.distributed", text)
    monkeypatch.setattr(augment, "glyphs", lambda n, size, seed: glyphs(n // 32, size, seed))
    exec(text, page)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and all(re.fullmatch(r"epoch \d: loss -?\d\.\d\d, nearest neighbour \d+\.\d %", line) for line in lines)
    p, z, p_hat, z_hat = vectors(4)
    ours = simsiam_dssl.dssl_loss(p, z, p_hat, z_hat)
    pasted = page["dssl_loss"](p, z, p_hat, z_hat)
    assert pasted.item() == pytest.approx(ours.item(), abs=1e-6)
    gradients = [torch.autograd.grad(loss, [*p, *p_hat]) for loss in (ours, pasted)]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients))
    small, _ = simsiam_dssl.make_backbone("small", "cifar")  # and so is its network
    assert [x.shape for x in page["backbone"].parameters()] == [x.shape for x in small.parameters()]


def test_every_command_of_the_readme_is_accepted():
    text = Path(augment.__file__).with_name("README.md").read_text()
    shell = "".join(re.findall(r"```bash\n(.*?)```", text, re.S))
    lines = re.findall(r"^(?:python|torchrun \S+) (\w+_dssl|linear_eval)\.py *([^#\n]*)", shell, re.M)
    rows = re.findall(r"^\| `(\d [\d.]+ [\d.]+ [\d.]+.*?)` \|", text, re.M)
    assert len(lines) >= 8 and len(rows) >= 7
    for script, flags in [*lines, *(("byol_dssl", f"--weights {row}") for row in rows)]:
        sys.modules[script].parse_args(shlex.split(flags))


@pytest.mark.parametrize("arch", ["small", "resnet18"])
def test_features_of_images_of_ones_own(arch, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "x").mkdir(parents=True)
    torch.save(simsiam_dssl.make_backbone(arch, "cifar")[0].state_dict(), tmp_path / "runs" / "x" / "backbone.pt")
    for i, path in enumerate(sorted((folder / "train" / "class0").glob("*.png"))[:2], 1):
        Image.open(path).convert("RGB").save(f"photo{i}.jpg")
    used = {}
    exec(block("read_centre").replace("runs/...", "runs/x"), used)
    assert used["features"].shape == (2, used["d"]) and not used["features"].requires_grad and not used["net"].training


def test_the_backbone_fits_mask_rcnn(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save(simsiam_dssl.make_backbone("resnet50", "imagenet")[0].state_dict(), "backbone.pt")
    exec(block("maskrcnn"), {})
    assert "All keys matched" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------- linear evaluation


def test_linear_eval_settings():
    def settings(line, images=50000, world=1):
        args = linear_eval.parse_args(["backbone.pt", *line.split()])
        linear_eval.choose(args, images, world)
        return args.size, args.crop, args.flip, args.protocol, args.batch, args.epochs, args.lr * args.batch / 256, args.norm

    assert settings("--data cifar10") == (32, 0.8, True, "sgd", 256, 100, 30, 1)
    assert settings("--data imagenet", 1281167) == (224, 0.08, True, "lars", 4096, 90, pytest.approx(1.6), 1)
    assert settings("--data imagenet --protocol sgd-linear --batch 256") == (224, 0.08, True, "sgd-linear", 256, 90, 0.1, 1)
    assert settings("") == (24, 0.8, False, "sgd", 256, 30, 0.3, 1) and settings("--protocol sgd")[-2] == 30
    folder = "--data folder --recipe imagenet --size 24"  # what follows from its number of images
    assert settings(folder, 409600) == (24, 0.08, True, "lars", 4096, 90, pytest.approx(1.6), 1)
    assert settings(folder, 409599) == settings("--data imagenet --size 24") == (24, 0.08, True, "sgd", 256, 100, 30, None)
    assert settings("--data folder --recipe glyphs", 300) == (24, 0.8, False, "sgd", 30, 100, 30, None)
    assert [settings(folder, images, world)[4] for images, world in ((1, 1), (40, 1), (40, 8), (2999, 8))] == [1, 4, 8, 256]
    assert settings(f"{folder} --batch 64 --epochs 3 --lr 4", 300)[3:] == ("sgd", 64, 3, 1, None)
    assert settings(f"{folder} --protocol sgd", 300)[3:] == ("sgd", 256, 100, 30, 1)  # what is asked for means what it says
    assert settings(f"{folder} --protocol lars", 300)[3:6] == ("lars", 300, 90)
    assert "fewer than the 8 ranks" in refusal(settings, folder, 7, 8)


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """100 training and 100 test images of 5 classes, 16 px: a colour each, under noise."""
    root, g = tmp_path_factory.mktemp("colours"), torch.Generator().manual_seed(0)
    colour = torch.rand(5, 3, generator=g)
    for split in ("train", "val"):
        for i in range(100):
            x = (colour[i % 5] + 4 * torch.rand(16, 16, 3, generator=g)) / 5
            path = root / split / f"class{i % 5}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((255 * x).to(torch.uint8).numpy()).save(path)
    return root


@pytest.mark.parametrize("scale", [10, 0.1])  # of the features: nearest neighbours do not depend on it
def test_linear_eval_keeps_up_with_neighbours(scale, colours, capsys, monkeypatch):
    """By default, on a folder of few images. With 90 steps of LARS it was far behind."""
    net = nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(12, 12, bias=False))
    nn.init.eye_(net[2].weight).data.mul_(scale)
    monkeypatch.setattr(linear_eval, "load_backbone", lambda path: (net, 12))
    with undisturbed():
        linear_eval.train(linear_eval.parse_args(["net.pt", "--data", str(colours), "--recipe", "imagenet", "--size", "16"]))
        loaders = [augment.EvalLoader(data, 256, 16) for data in augment.load_data(str(colours), "", 16)]
        knn = simsiam_dssl.knn_accuracy(net, *loaders, 5, 5)
    lines = capsys.readouterr().out.splitlines()
    first = "protocol sgd: batch 10, lr 30, features / "
    assert any(line.startswith(first) for line in lines[:3])
    assert knn > 60 and json.loads(lines[-1])["top1"] >= knn - 3, (knn, lines[-1])


def test_linear_eval_says_how_to_repeat_it(folder, tmp_path, capsys):
    """The settings in the result, given as flags, give the same again, here in a process that has joined already."""
    torch.save(simsiam_dssl.make_backbone("small", "cifar")[0].state_dict(), tmp_path / "net.pt")
    line = [str(tmp_path / "net.pt"), "--data", str(folder), "--recipe", "glyphs", "--size", "16"]
    with undisturbed():
        linear_eval.train(linear_eval.parse_args([*line, "--epochs", "2"]))
        first = capsys.readouterr().out.splitlines()
        settings = json.loads(first[-1])
        flags = [f"--{key}={settings[key]}" for key in ("batch", "epochs", "lr")]
        linear_eval.train(linear_eval.parse_args([*line, *flags]))
    second = capsys.readouterr().out.splitlines()
    assert len(first) == 5 and settings["norm"] > 0
    assert [re.sub(r"\d+ s$", "", x) for x in second] == [re.sub(r"\d+ s$", "", x) for x in first]


@pytest.mark.parametrize("protocol, kind, batch, size", [("sgd", "SGD", 12, 16), ("lars", "LARS", 36, 16), ("sgd-linear", "SGD", 36, 72)])
def test_linear_eval(protocol, kind, batch, size, folder, tmp_path, capsys, monkeypatch):
    run(simsiam_dssl, folder, tmp_path, "--epochs", "1", "--warmup", "0")
    capsys.readouterr()
    before, seen, real = weights(tmp_path), [], torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: seen.append((type(self).__name__, self.param_groups[0]["lr"], self.param_groups[0]["momentum"])) or real(self))
    flags = ["--batch", "12", "--epochs", "20", "--lr", "0.3"] if protocol == "sgd" else ["--epochs", "2"]  # else a batch of 4096
    with undisturbed():
        linear_eval.train(linear_eval.parse_args([
            str(tmp_path / "backbone.pt"), "--data", str(folder), "--recipe", "glyphs", "--size", str(size), "--protocol", protocol, "--workers", "0", *flags]))
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["images"] == 10 and result["top5"] == 100 and 0 <= result["top1"] <= result["best_top1"] and result["batch"] == batch
    if protocol == "sgd":
        assert result["top1"] >= 60  # of three classes that differ in colour
    steps, base = len(seen), result["lr"] * batch / 256
    assert seen == [(kind, linear_eval.learning_rate(protocol, i / steps, base), 0.9) for i in range(steps)]
    assert equal(weights(tmp_path), before)


def test_linear_eval_refuses(tmp_path):
    (tmp_path / "text.pt").write_text("no weights")
    torch.save({"conv1.weight": torch.zeros(8, 3, 3, 3)}, tmp_path / "other.pt")
    torch.save({"model": {}, "step": 1}, tmp_path / "checkpoint.pt")
    for name in ("text.pt", "other.pt", "checkpoint.pt", "missing.pt"):
        with pytest.raises(OSError, match=name):
            linear_eval.load_backbone(tmp_path / name)


def test_the_backbone_stays_what_it_is(folder, tmp_path, monkeypatch):
    """In memory, too: were its BN in training mode, the evaluation would not be a linear one."""
    torch.save(simsiam_dssl.make_backbone("small", "cifar")[0].state_dict(), tmp_path / "net.pt")
    kept, real = [], linear_eval.load_backbone
    monkeypatch.setattr(linear_eval, "load_backbone", lambda path: kept.append(real(path)) or kept[-1])
    line = [str(tmp_path / "net.pt"), "--data", str(folder), "--recipe", "glyphs", "--size", "16", "--batch", "12"]
    with undisturbed():
        linear_eval.train(linear_eval.parse_args([*line, "--epochs", "1"]))
    assert equal(kept[0][0].state_dict(), torch.load(tmp_path / "net.pt", weights_only=True))


# ------------------------------------------------------------------------------------------------- several ranks

MODELS = ["SimSiam", "BYOL", "SimCLR"]
TRAINING = ["--size", "72", "--epochs", "1", "--batch", "12", "--lr", "20", "--warmup", "0", "--weights", "1", "0.7", "0.5", "0.3"]


def without_chance(patch):
    """Views without a draw and BN with fixed statistics: then a step depends on its images alone, not on who has them."""
    patch.setattr(augment, "standard", lambda x, *_: x / 255)
    patch.setattr(augment, "parse_policy", lambda *_: lambda x: 1 - x)
    patch.setattr(nn.modules.batchnorm._BatchNorm, "forward", lambda self, x: F.batch_norm(
        x, self.running_mean, self.running_var, self.weight, self.bias, training=False))


def rank_main(rank, world, folder, out, ports):
    """What every rank does; results go to out/rank<i>.pt. A port for each group: the last one's may still be taken."""
    torch.set_num_threads(1)
    os.environ |= dict(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=ports[-1])
    result, m = {}, simsiam_dssl
    real = m.knn_accuracy

    def watched(backbone, *rest, **kwargs):  # what the monitor sees on this rank
        result["buffers"] = [b.clone() for b in backbone.buffers()]
        result["knn"] = real(backbone, *rest, **kwargs)
        return result["knn"]

    m.knn_accuracy = watched
    run(m, folder, f"{out}/run")  # one rank began it
    m.knn_accuracy = real
    for m, port in zip(METHODS, ports):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MASTER_PORT", port)
            without_chance(patch)
            run(m, folder, f"{out}/{m.__name__}", *TRAINING)
    torch.save(result, f"{out}/rank{rank}.pt")


def free_ports(n):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(n)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [str(s.getsockname()[1]) for s in sockets]


@pytest.mark.parametrize("world", [2, 4])
def test_ranks(world, folder, tmp_path, monkeypatch):
    interrupted(folder, tmp_path / "run")  # one rank begins, does one of the two epochs, and more go on

    ranks = torch.multiprocessing.spawn(rank_main, (world, str(folder), str(tmp_path), free_ports(4)), nprocs=world, join=False)
    for _ in range(30):
        if ranks.join(timeout=5):
            break
    else:
        for process in ranks.processes:
            process.kill()
        pytest.fail("the ranks hang")
    results = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(world)]
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0]["buffers"], other["buffers"])) and results[0]["knn"] == other["knn"]
    assert [entry["epoch"] for entry in log(tmp_path / "run")] == [0, 1, 2]
    assert 0.7 < log(tmp_path / "run")[2]["std"] < 1.3  # a mean over the ranks

    for m in METHODS:  # the training loop in one process gives what it gave on several ranks: for SimCLR, with all negatives
        with monkeypatch.context() as patch:
            without_chance(patch)
            run(m, folder, tmp_path / "alone" / m.__name__, *TRAINING)
        alone, together = weights(tmp_path / "alone" / m.__name__), weights(tmp_path / m.__name__)
        torch.manual_seed(0)
        start = m.make_backbone("small", "cifar")[0].state_dict()
        for key in alone:
            assert torch.allclose(alone[key].float(), together[key].float(), atol=1e-4), (m.__name__, key)
        assert max((alone[key].float() - start[key].float()).abs().max() for key in alone) > 5e-3  # it has learnt
        for one, other in zip(log(tmp_path / "alone" / m.__name__)[1:], log(tmp_path / m.__name__)[1:]):
            assert one["loss"] == pytest.approx(other["loss"], abs=1e-4)

    with undisturbed():  # a monitor of several ranks counts what a single process counts
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        net = simsiam_dssl.make_backbone("small", "cifar")[0]
        net.load_state_dict(weights(tmp_path / "run"))
        loaders = [augment.EvalLoader(s, 256, 16) for s in augment.load_data(str(folder), "", 16)]
        assert simsiam_dssl.knn_accuracy(net, *loaders, 3, 3) == results[0]["knn"]


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
def test_bf16_and_syncbn_on_cuda(m, model):
    with undisturbed():
        dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
        torch.manual_seed(0)
        net = getattr(m, model)(settings(m)).cuda()
        x = torch.rand(32, 3, 24, 24, device="cuda")
        full = projections(net([x], []))[0]
        with torch.autocast("cuda", torch.bfloat16):
            half = projections(nn.SyncBatchNorm.convert_sync_batchnorm(net)([x], []))[0]  # in a world of one it must change nothing
        assert F.cosine_similarity(full, half.float(), dim=-1).mean() > 0.98

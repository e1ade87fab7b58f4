"""Everything between the disk and the model: views (standard and heavy) and data.

    python augment.py [IMAGE ...] --out views.png      draw the paper's Figure 7

The way of a batch; after the crop, everything is batched on the device and never waits for it:

    uint8 crops → standard(x) = SV → heavy(SV) = HV → normalize → model

An SV (standard view) is a crop, flipped, jittered in colour, grey or blurred at random. An HV (heavy view, marked
`hat`) is what a heavy policy makes of an SV, not of the image (Eq. 3 of the paper). So normalisation comes last.

Every operation takes and gives floating-point (b, 3, h, w) in [0, 1], and draws for each image of the batch by
itself. The draws are made on the host, where the numbers are known without asking the device. So a batch can be
sorted by what each image drew, and every operation runs once, on its own images only (`by_choice`).

DSSL: "Directional Self-supervised Learning for Heavy Image Augmentations", CVPR 2022.   RandAugment: arXiv 1909.13719
UniformAugment: arXiv 2003.14348.   "released" below is the code that the authors of DSSL published.
"""
import argparse
import contextlib
import math
import os
import re
import sys
from collections import Counter
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torchvision import datasets, utils
from torchvision.transforms import Compose
from torchvision.transforms.functional import pil_to_tensor, resize

# =====================================================================================================================
# views: pixels in, pixels out
# =====================================================================================================================

# ------------------------------------------------------------------------------------------------- tools

def send(t, x):
    """A host tensor t to x's device, floats in x's precision. Pinned, since a pageable copy would wait for the GPU."""
    t = t.to(x.dtype) if t.is_floating_point() else t
    return t.pin_memory().to(x.device, non_blocking=True) if x.is_cuda else t.to(x.device)


def constant(values, x):
    """Three values, one a channel, as a (3, 1, 1) tensor beside x."""
    return send(torch.tensor(values, dtype=x.dtype), x).view(3, 1, 1)


def column(v):
    """(b,) → (b, 1, 1, 1), to meet (b, 3, h, w)."""
    return v.view(-1, 1, 1, 1)


def product(a, b):
    """a @ b in their own precision, also where a caller's autocast would take it in another."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b


def by_choice(x, choice, functions, *args):
    """Give image i to functions[choice[i]], with row i of each of args. A function may be None: the image stays.

    x (b, 3, h, w); choice (b,) int64 and args (b, ...) on the host.
    """
    order = choice.argsort(stable=True)  # the images that drew functions[0] come first, then those of functions[1], …
    sizes = choice.bincount(minlength=len(functions)).tolist()  # … and so many did
    args = [send(a[order], x).split(sizes) for a in args]
    out = x.clone()
    for function, images, *rows in zip(functions, send(order, x).split(sizes), *args):  # rows: these images' of args
        if function and len(images):  # index_select is several times as fast as x[images] on a CPU
            out.index_copy_(0, images, function(x.index_select(0, images), *rows))
    return out


def level(x):
    """[0, 1] → the 256 levels that an image file would have, as floats 0, 1, …, 255."""
    return (x * 255).round_()


def gray(x):
    """Luma as Pillow's mode "L" has it (ITU-R 601-2, rounded to a level): (b, 3, h, w) → (b, 1, h, w)."""
    luma = product(constant((0.299, 0.587, 0.114), x).view(1, 3), x.flatten(2))
    return level(luma).div_(255).view(len(x), 1, *x.shape[2:])


def blend(other, x, v):
    """From other (v = 0) over x (v = 1) and beyond: what Pillow's ImageEnhance does."""
    return torch.lerp(other.expand_as(x), x, column(v)).clamp_(0, 1)


def pick(x, source_x, source_y):
    """out[:, :, i, j] = x at (source_x, source_y)[i, j], black where that is outside; these broadcast to (b, h, w)."""
    b, c, h, w = x.shape
    near_x, near_y = source_x.clamp(0, w - 1), source_y.clamp(0, h - 1)
    inside = (near_x == source_x).to(x.dtype) * (near_y == source_y)
    index = (near_y * w + near_x).long().expand(b, h, w).reshape(b, 1, h * w)
    return x.flatten(2).gather(2, index.expand(-1, c, -1)).view(x.shape).mul_(inside.expand(b, h, w)[:, None])


def affine(x, a=1, b=0, c=0, d=0, e=1, f=0):
    """Output pixel (x, y) shows input pixel (ax + by + c, dx + ey + f): Pillow's AFFINE, nearest, filled with black.

    Each coefficient is a number or (b,), in pixels, for pixel centres at half-integers.
    """
    a, b, c, d, e, f = (v.float().view(-1, 1, 1) if torch.is_tensor(v) else v for v in (a, b, c, d, e, f))
    ys = torch.arange(x.shape[2], device=x.device)[:, None] + 0.5
    xs = torch.arange(x.shape[3], device=x.device)[None, :] + 0.5
    return pick(x, (a * xs + c + b * ys).floor(), (e * ys + f + d * xs).floor())


# ------------------------------------------------------------------------------------------------- operations
# function(x, v): x (b, 3, h, w) in [0, 1], v (b,) the magnitude of each image, in the unit named in OPS below.

def auto_contrast(x, v=None):
    """Stretch each channel to the full range; a constant channel stays."""
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    return torch.where(high > low, (x - low) / (high - low).clamp(min=1e-5), x)


def equalize(x, v=None):
    """Flatten each channel's histogram, with Pillow's integer arithmetic."""
    pixels = level(x).long().flatten(2)  # b 3 (h w)
    one = torch.ones((), device=x.device).expand_as(pixels)
    count = torch.zeros(*pixels.shape[:2], 256, device=x.device).scatter_add_(2, pixels, one)
    last = count.gather(2, pixels.amax(2, keepdim=True))  # how many pixels have the brightest level
    step = (count.sum(2, keepdim=True) - last).div(255, rounding_mode="floor")
    before = count.cumsum(2) - count  # pixels darker than this level
    table = ((step / 2).floor() + before).div(step.clamp(min=1), rounding_mode="floor").clamp(max=255)
    out = (table.gather(2, pixels) / 255).view_as(x).to(x.dtype)
    return torch.where(step[..., None] > 0, out, x)  # too few pixels or levels to spread: unchanged


def rotate(x, v):
    """Turn by v degrees around the centre, counter-clockwise."""
    v = v.float() * (math.pi / 180)
    cos, sin, cx, cy = v.cos(), v.sin(), x.shape[3] / 2, x.shape[2] / 2
    return affine(x, cos, -sin, cx - cos * cx + sin * cy, sin, cos, cy - sin * cx - cos * cy)


def posterize(x, v):
    """Keep the v highest bits of 8; at least one, as the released code does."""
    width = column(1 << (8 - v.floor().clamp(min=1)).int())
    return (level(x) / width).floor() * width / 255


def solarize_add(x, v):
    """Brighten all levels by v, then invert the upper half of the range."""
    x = (level(x) + column(v)).floor().clamp(max=255)
    return torch.where(x >= 128, 255 - x, x) / 255


def sharpness(x, v):
    """Away from (v > 1) or towards (v < 1) a smoothed image; the outermost pixels stay."""
    rows = x[..., :-2, :] + x[..., 1:-1, :] + x[..., 2:, :]
    around = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    smooth = x.clone()
    smooth[..., 1:-1, 1:-1] = level((around + 4 * x[..., 1:-1, 1:-1]) / 13) / 255
    return blend(smooth, x, v)


def cutout(x, v):
    """A grey square of v pixels a side around a random point, cut off at the borders; none for v = 0."""
    h, w = x.shape[2:]
    v, u = v.view(-1, 1, 1), send(torch.rand(len(x), 2, 1, 1), x)
    left = (u[:, 0] * w - v / 2).clamp(min=0).floor()
    top = (u[:, 1] * h - v / 2).clamp(min=0).floor()
    xs, ys = torch.arange(w, device=x.device)[None, :], torch.arange(h, device=x.device)[:, None]
    hole = (v > 0) & (xs >= left) & (xs <= left + v) & (ys >= top) & (ys <= top + v)  # both ends, as ImageDraw
    return torch.where(hole[:, None], constant((125 / 255, 123 / 255, 114 / 255), x), x)


OPS = {
    "AutoContrast": auto_contrast,
    "Equalize": equalize,
    "Invert": lambda x, v=None: 1 - x,
    "Rotate": rotate,  # degrees
    "Posterize": posterize,  # bits kept
    "Solarize": lambda x, v: torch.where(level(x) >= column(v), 1 - x, x),  # threshold, 0–256: inverted from it on
    "SolarizeAdd": solarize_add,  # levels, 0–110
    "Color": lambda x, v: blend(gray(x), x, v),  # this and the next three: factor, 1 is the identity
    "Contrast": lambda x, v: blend(level(gray(x).mean((2, 3), keepdim=True)) / 255, x, v),
    "Brightness": lambda x, v: (x * column(v)).clamp(0, 1),
    "Sharpness": sharpness,
    "ShearX": lambda x, v: affine(x, b=v),  # slope
    "ShearY": lambda x, v: affine(x, d=v),
    "TranslateX": lambda x, v: affine(x, c=v),  # pixels
    "TranslateY": lambda x, v: affine(x, f=v),
    "Cutout": cutout,  # pixels
    "Identity": lambda x, v=None: x,
}

# Which operations a policy draws from, each with its (low, high) range. The three differ much more than their names
# say. "released" moves by up to 100 pixels whatever the image's size (at 32 px a magnitude of 10 of 30 already leaves
# nothing of it), and at its low end it posterizes to one bit and solarizes everything: it is never weak. The paper's
# numbers were obtained with it. The other two give pixels as a fraction of the image's side.
SPACES = {
    "released": {
        "AutoContrast": (0, 0), "Equalize": (0, 0), "Invert": (0, 0), "Rotate": (0, 30), "Posterize": (0, 4),
        "Solarize": (0, 256), "SolarizeAdd": (0, 110), "Color": (0.1, 1.9), "Contrast": (0.1, 1.9),
        "Brightness": (0.1, 1.9), "Sharpness": (0.1, 1.9), "ShearX": (0, 0.3), "ShearY": (0, 0.3), "Cutout": (0, 40),
        "TranslateX": (0, 100), "TranslateY": (0, 100),
    },
    "paper": {  # the RandAugment paper's 14, torchvision's ranges; posterize drops the halves, so bits are rounded
        "Identity": (0, 0), "AutoContrast": (0, 0), "Equalize": (0, 0), "Rotate": (0, 30), "Posterize": (8.5, 4.5),
        "Solarize": (255, 0), "Color": (1, 1.9), "Contrast": (1, 1.9), "Brightness": (1, 1.9), "Sharpness": (1, 1.9),
        "ShearX": (0, 0.3), "ShearY": (0, 0.3), "TranslateX": (0, 150 / 331), "TranslateY": (0, 150 / 331),
    },
    "uniform": {  # UniformAugment's 13, two of them as X and Y
        "ShearX": (-0.3, 0.3), "ShearY": (-0.3, 0.3), "TranslateX": (-0.45, 0.45), "TranslateY": (-0.45, 0.45),
        "Rotate": (-30, 30), "AutoContrast": (0, 0), "Invert": (0, 0), "Equalize": (0, 0), "Solarize": (0, 256),
        "Posterize": (4, 8), "Contrast": (0.1, 1.9), "Color": (0.1, 1.9), "Brightness": (0.1, 1.9),
        "Sharpness": (0.1, 1.9), "Cutout": (0, 0.2),
    },
}
# The magnitude at which an operation that has two directions does nothing.
NEUTRAL = {"Rotate": 0, "ShearX": 0, "ShearY": 0, "TranslateX": 0, "TranslateY": 0,
           "Color": 1, "Contrast": 1, "Brightness": 1, "Sharpness": 1}


def operate(x, space, choice, strength):
    """Take image i through operation choice[i] of the space; len(SPACES[space]), one past the last, is for none.

    x (b, 3, h, w); choice (b,) int64 and strength (b,) on the host. strength goes from the low (0) to the high (1) end
    of the operation's range; below 0 it mirrors the range at its low end.
    """
    low, high = ranges(space, *x.shape[2:])
    functions = [OPS[name] for name in SPACES[space]] + [None]  # which leaves its images as they are
    return by_choice(x, choice, functions, torch.lerp(low[choice], high[choice], strength))


def ranges(space, height, width):
    """The low ends and the high ends of the operations' ranges, for images of that size, and a 0 for no operation."""
    ends = torch.tensor([*SPACES[space].values(), (0, 0)])
    if space != "released":  # the others give pixels as a share of the side
        side = {"TranslateX": width, "TranslateY": height, "Cutout": width}
        ends *= torch.tensor([side.get(name, 1) for name in (*SPACES[space], None)])[:, None]
    return ends.unbind(1)


class RandAugment:
    """RA(n, m): n operations one after the other, each drawn anew for every image, with replacement, at magnitude m.

    m lies on the released code's scale of 0–30. Where a range starts at the neutral value of its operation, the sign
    is drawn too. (Fig. 1's caption of the DSSL paper has n and m the other way round.)
    """

    def __init__(self, n, m, space="released"):
        if space not in ("released", "paper"):
            raise ValueError(f"no RandAugment space '{space}': use released or paper")
        if not (n >= 1 and 0 <= m <= 30):
            raise ValueError(f"ra({n},{m}): the number of operations must be at least 1, the magnitude 0 to 30")
        self.n, self.m, self.space = n, m, space
        self.mirrors = torch.tensor([NEUTRAL.get(name) == low for name, (low, _) in SPACES[space].items()])

    def __call__(self, x):
        for _ in range(self.n):
            choice = torch.randint(len(self.mirrors), (len(x),))
            minus = self.mirrors[choice] & (torch.rand(len(x)) < 0.5)
            x = operate(x, self.space, choice, torch.where(minus, -1.0, 1.0) * (self.m / 30))
        return x


class UniformAugment:
    """Two operations, each drawn for every image, kept with a probability that is itself uniform, at any magnitude."""

    def __call__(self, x):
        for _ in range(2):
            choice = torch.randint(len(SPACES["uniform"]), (len(x),))
            keep = torch.rand(len(x)) < torch.rand(len(x))
            choice = torch.where(keep, choice, len(SPACES["uniform"]))  # or none
            x = operate(x, "uniform", choice, torch.rand(len(x)))
        return x


class Jigsaw:
    """Cut the image into n × n tiles, which change places, every image in its own way. No pixel is lost.

    Raises ValueError where n does not divide the sides. (The released code then shuffles equal tiles alone.)
    """

    def __init__(self, n):
        if n < 1:
            raise ValueError(f"jigsaw({n}): the number of tiles a side must be at least 1")
        self.n = n

    def __call__(self, x):
        n, (b, _, h, w) = self.n, x.shape
        if h % n or w % n:
            raise ValueError(f"jigsaw({n}) needs sides that {n} divides, not {h} x {w}")
        tiles = rearrange(x, "b c (i y) (j x) -> (b i j) c y x", i=n, j=n)
        source = torch.rand(b, n * n).argsort(1) + n * n * torch.arange(b)[:, None]  # which tile each place shows
        tiles = tiles.index_select(0, send(source.flatten(), x))
        return rearrange(tiles, "(b i j) c y x -> b c (i y) (j x)", i=n, j=n)


class OneOf:
    """One of several policies, drawn for every image with the given chances."""

    def __init__(self, policies, chances):
        self.policies, self.chances = policies, torch.tensor(chances)

    def __call__(self, x):
        choice = self.chances.multinomial(max(1, len(x)), replacement=True)  # it refuses to draw nothing
        return by_choice(x, choice[: len(x)], self.policies)


def parse_policy(text, size=None):
    """A heavy policy from text, as a callable x → x.

    ra(n,m), ra(n,m,paper), ua, jigsaw(n); a+b is a, then b; p*a|q*b is a or b, drawn for every image with the given
    probabilities (equal ones, where none are given). Raises ValueError naming the part that it cannot read, or, where
    the images' size is given, a Jigsaw that does not divide it.
    """
    branches, chances = [], []
    for branch in text.replace(" ", "").lower().split("|"):
        chance, star, steps = branch.rpartition("*")
        if star and not re.fullmatch(r"\d*\.?\d+", chance):
            raise ValueError(f"policy '{text}': cannot read the probability '{chance}'")
        chances.append(float(chance) if star else None)
        branches.append(Compose([parse_step(step, size) for step in steps.split("+")]))
    if set(chances) == {None}:
        chances = [1 / len(branches)] * len(branches)
    if None in chances or abs(sum(chances) - 1) > 1e-6:
        raise ValueError(f"policy '{text}': the probabilities before * must be given for every branch and add up to 1")
    return OneOf(branches, chances) if len(branches) > 1 else branches[0]


def parse_step(step, size):
    """What stands between the + and | of a policy."""
    if step == "ua":
        return UniformAugment()
    if match := re.fullmatch(r"ra\((\d+),(\d+\.?\d*)(?:,(\w+))?\)", step):
        return RandAugment(int(match[1]), float(match[2]), match[3] or "released")
    if match := re.fullmatch(r"jigsaw\((\d+)\)", step):
        jigsaw = Jigsaw(int(match[1]))
        if size and size % jigsaw.n:
            raise ValueError(f"{step} needs a size that {jigsaw.n} divides, not {size}")
        return jigsaw
    raise ValueError(f"cannot read '{step}' in a policy: use ra(n,m), ra(n,m,paper), ua, jigsaw(n)")


# ------------------------------------------------------------------------------------------------- standard views

def crop_boxes(b, h, w, scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3), generator=None):
    """b random boxes of an h × w image as (b, 4) int64: left, top, width, height (torchvision's RandomResizedCrop).

    Ten candidates an image; the first that fits is taken, and if none does, the largest centred box of a legal ratio.
    """
    u = torch.rand(3, b, 10, generator=generator)
    area = h * w * (scale[0] + (scale[1] - scale[0]) * u[0])
    aspect = (math.log(ratio[0]) + math.log(ratio[1] / ratio[0]) * u[1]).exp()
    width, height = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (width >= 1) & (width <= w) & (height >= 1) & (height <= h)
    any_fits, first = fits.any(1), fits.int().argmax(1, keepdim=True)
    width = torch.where(any_fits, width.gather(1, first)[:, 0], min(w, max(1, round(h * ratio[1]))))
    height = torch.where(any_fits, height.gather(1, first)[:, 0], min(h, max(1, round(w / ratio[0]))))
    where = torch.where(any_fits[:, None], torch.rand(b, 2, generator=generator), 0.5)
    left, top = (where[:, 0] * (w - width + 1)).floor(), (where[:, 1] * (h - height + 1)).floor()
    return torch.stack([left, top, width, height], 1).long()


def random_resized_crop(x, size, scale=(0.2, 1.0), generator=None):
    """A random box of every image, resized to size × size; (b, 3, h, w) uint8 or float → the same type.

    Each pixel of the crop is a mean over the image's, weighted by their rows and by their columns as in Pillow's
    antialiased bilinear. So cropping and resizing are two matrix products an image, rows @ image @ columns.mT of each
    channel. The three channels stand below each other in one matrix, since few large products are faster than many.
    """
    b, _, h, w = x.shape
    left, top, width, height = send(crop_boxes(b, h, w, scale, generator=generator), x).view(b, 4, 1, 1).unbind(1)
    rows, columns = shares(top, height, h, size), shares(left, width, w, size)
    out = product(columns, rearrange(x, "b c h w -> b w (c h)").float())
    out = product(rearrange(out, "b j (c h) -> b (j c) h", c=3), rows.mT)
    out = rearrange(out, "b (j c) i -> b c i j", c=3)
    return (out.round_() if x.dtype == torch.uint8 else out).to(x.dtype).contiguous()


def shares(start, length, side, size):
    """(b, size, side): the shares of the image's rows, or columns, in each of the crop's; start, length (b, 1, 1)."""
    step = length / size
    middle = start + (torch.arange(size, device=start.device)[:, None] + 0.5) * step
    reach = step.clamp(min=1)  # of a triangle of weights: a pixel of the crop or, if that is less, of the image
    pixel = torch.arange(side, device=start.device)
    share = (1 - ((pixel + 0.5) / reach - middle / reach).abs_()).clamp_(min=0)
    share *= ((pixel >= start) & (pixel < start + length)).float()  # none from outside the box
    return share.div_(share.sum(-1, keepdim=True))


def flip(x, p=0.5):
    """Mirror each image left to right with probability p."""
    return by_choice(x, (torch.rand(len(x)) < p).long(), [None, lambda x: x.flip(3)])


def hue(x, v):
    """Turn the hue by v (b,) turns, in [-0.5, 0.5], over HSV as Pillow and torchvision do."""
    r, g, b = x.unbind(1)
    high, low = torch.maximum(torch.maximum(r, g), b), torch.minimum(torch.minimum(r, g), b)
    chroma = high - low
    # Hues lie on a circle: red 0, green 1/3, blue 2/3 of a turn. From red to cyan, half a turn, first g rises by the
    # chroma, then r falls, then b rises, a sixth of a turn each. So all that they have moved, (g - low) + (high - r) +
    # (b - low), is the distance from red. The other way round g and b change places; those hues are negative.
    moved = g + b - r + high - 2 * low
    turns = (moved / (6 * chroma).clamp(min=1e-6)).copysign(g - b) + v.view(-1, 1, 1)  # b h w
    # Back again: a channel is lowest up to a sixth of a turn from its complement, highest from a third on.
    complements = constant((-1 / 2, -1 / 6, 1 / 6), x)
    away = turns[:, None] - complements  # b c h w
    away = (away - away.round()).abs_().clamp_(1 / 6, 1 / 3)  # without whole turns
    return away.mul_(6 * chroma[:, None]).add_((low - chroma)[:, None]).clamp_(0, 1)


def color_jitter(x, strength=(0.4, 0.4, 0.4, 0.1), p=0.8):
    """Brightness, contrast, saturation and hue, with probability p, in an order that each image draws."""
    functions = [OPS["Brightness"], OPS["Contrast"], OPS["Color"], hue, None]  # the last for images that stay
    factor = (torch.rand(len(x), 4) * 2 - 1) * torch.tensor(strength) + torch.tensor([1, 1, 1, 0])
    order = torch.rand(len(x), 4).argsort(1)
    jittered = torch.rand(len(x), 1) < p
    for k in order.split(1, dim=1):  # four rounds; in each, image i goes through function k[i] with its own factor
        x = by_choice(x, torch.where(jittered, k, functions.index(None))[:, 0], functions, factor.gather(1, k)[:, 0])
    return x


def gaussian_blur(x, sigma):
    """Blur each image by its own sigma (b,), in pixels; also two matrices an image, renormalised at the borders."""
    for _ in range(2):  # along the rows, then (transposed) along the columns
        at = torch.arange(x.shape[3], device=x.device)
        w = (-((at[:, None] - at) / sigma.view(-1, 1, 1)) ** 2 / 2).exp()
        x = product(x, (w / w.sum(2, keepdim=True)).mT[:, None].to(x.dtype)).mT
    return x


def standard(x, flips=True, blur=False):
    """Standard views of crops (b, 3, h, w), uint8 or in [0, 1]: flip, colour jitter, grayscale, blur (App. A.1).

    The paper's text has blur everywhere; its CIFAR-10 code and SimSiam's have none at 32 px, and neither have we.
    """
    x = x / 255 if x.dtype == torch.uint8 else x
    x = flip(x) if flips else x
    x = color_jitter(x)
    x = by_choice(x, (torch.rand(len(x)) < 0.2).long(), [None, lambda x: gray(x).expand_as(x)])
    if blur:
        blurred = (torch.rand(len(x)) < 0.5).long()
        x = by_choice(x, blurred, [None, gaussian_blur], 0.1 + 1.9 * torch.rand(len(x)))
    return x


def normalize(x):
    """[0, 1] → about zero mean and unit deviation. ImageNet's statistics for all data, so that backbones can travel."""
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return (x - constant(mean, x)).div_(constant(std, x))


# =====================================================================================================================
# data: files in, uint8 batches out
# =====================================================================================================================

ENDINGS = (*datasets.folder.IMG_EXTENSIONS, ".jfif", ".gif", ".avif")  # of the files that are read
PICTURE = "views.png"  # so the names of our own pictures end: they are nobody's data
SMALL = 64  # pixels a side: up to here images are kept in memory, and evaluated whole rather than by their middle
MEMORY = 4e9  # bytes: where a training set would need more, it is streamed all the same, and so is what tests it


class Data(NamedTuple):
    images: torch.Tensor | list  # (n, 3, size, size) uint8, or n paths to stream
    labels: torch.Tensor | None  # (n,) int64; None where there are none
    classes: list  # their names


def load_data(data, root, size, download=True):
    """(train, test) by name (glyphs, cifar10, imagenet) or from a folder; test is None where there are no labels.

    Small images are read here, of others only the paths kept. Raises OSError, one line on what is wrong with the data.
    """
    if data == "glyphs":
        return glyphs(8192, size, seed=0), glyphs(1024, size, seed=1)
    named = data in ("cifar10", "imagenet")
    folder = (Path(root, data) if named else Path(data)).expanduser()
    if data == "cifar10" and not folder.exists():
        return [torchvision_cifar10(Path(root).expanduser(), train, size, download) for train in (True, False)]
    layout = f"expected {folder}/train/<class>/<image> and {folder}/val/<class>/<image> (or test/ for val/)"
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}: {layout}")
    val = folder / ("test" if (folder / "test").is_dir() and not (folder / "val").is_dir() else "val")
    others, together = Counter(), {}
    if named or (folder / "train").exists() or val.exists():
        train, test = find_classes(folder / "train", others), find_classes(val, others)
    else:  # no labels
        train, test = {"": find_images(folder, others)}, None
        names = [path[len(str(folder)) + 1 :].split(os.sep) for path in train[""]]
        together = Counter(first for first, *rest in names if rest)  # images of each folder in it
    if os.environ.get("RANK") in (None, "", "0"):  # one line, not one a process
        if together:
            warn(f"no {folder}/train: taken together, without labels: {dict(together.most_common(9))!a}")
        if others:
            warn(f"{others.total()} files are left out: {dict(others.most_common(9))!a}")
    resident = size <= SMALL and sum(map(len, train.values())) * 3 * size**2 <= MEMORY
    if test is None:
        if not train[""]:
            raise FileNotFoundError(f"no images in {folder}: {layout}, or images without labels anywhere below it")
        return pack(train, size, resident)._replace(labels=None, classes=[]), None
    for part, classes in ((folder / "train", train), (val, test)):
        if not classes:
            raise FileNotFoundError(f"no images in {part}/<class>: {layout}; or without labels --data {folder}/train")
    if odd := train.keys() ^ test.keys():
        raise FileNotFoundError(f"{folder}/train and {val} have different classes, {min(odd)} is in one: {layout}")
    if len(train) == 1:
        raise FileNotFoundError(f"one class tells nothing apart: {layout}; or without labels --data {folder}/train")
    return pack(train, size, resident), pack(test, size, resident)


def warn(text):
    """A line on stderr. Of print() the end of a line may come by itself, after what another process has written."""
    sys.stderr.write(f"WARNING: {text}\n")


def visible(folder):
    """The folder's entries by name; hidden ones are nobody's data. An OSError names a folder that cannot be listed."""
    return sorted((entry for entry in os.scandir(folder) if entry.name[0] != "."), key=lambda entry: entry.name)


def find_images(folder, others, seen=()):
    """Paths of the images anywhere below the folder, sorted; the Counter others takes the endings of other files."""
    here, images = Path(folder).resolve(), []
    seen = seen or {here, *here.parents}  # links are followed, but none leads round in circles
    for entry in visible(folder):
        ending = os.path.splitext(entry.name)[1].lower()
        if entry.is_dir():
            target = Path(entry).resolve()
            if target not in seen:
                seen.add(target)
                images += find_images(entry.path, others, seen)
        elif entry.name.endswith(PICTURE):
            others[PICTURE] += 1
        elif ending in ENDINGS:
            images.append(entry.path)
        else:
            others[ending] += 1
    return sorted(images)


def find_classes(folder, others):
    """{class: paths of its images}, where each class has a folder; one without images is none."""
    entries = visible(folder) if folder.is_dir() else []
    others.update("outside the class folders" for entry in entries if not entry.is_dir())
    return {entry.name: paths for entry in entries if entry.is_dir() and (paths := find_images(entry, others))}


def pack(classes, size, resident):
    """{class: paths} → Data, with the images read if they are to be resident, in memory."""
    paths = [path for paths in classes.values() for path in paths]
    labels = torch.tensor([i for i, paths in enumerate(classes.values()) for _ in paths])
    images, good = read_all(paths, size) if resident else (paths, slice(None))
    return Data(images, labels[good], list(classes))


def torchvision_cifar10(root, train, size, download):
    try:
        found = datasets.CIFAR10(root, train=train, download=download)
    except (RuntimeError, OSError) as error:
        raise FileNotFoundError(
            f"no CIFAR-10 in {root} ({' '.join(str(error).split())[:70]}): put it there as "
            "cifar10/train/<class>/<image> and cifar10/test/<class>/<image>, or fetch it in one process: "
            f"python -c \"from torchvision.datasets import CIFAR10; CIFAR10('{root}', download=True)\"") from None
    images = rearrange(torch.from_numpy(found.data), "n h w c -> n c h w").contiguous()
    return Data(images if size == 32 else resize(images, size), torch.tensor(found.targets), found.classes)


def read_image(path):
    """The file as an RGB Pillow image. Raises OSError naming the file, whatever is wrong with it."""
    try:
        with Image.open(path) as image:
            image.load()
            with contextlib.suppress(Exception):  # broken EXIF data say nothing against the pixels
                ImageOps.exif_transpose(image, in_place=True)  # as the camera was held
            if image.mode[0] == "F":
                raise ValueError("its pixels are floats, and what is white is not known: save it with 8 or 16 bits")
            if image.mode[0] == "I":  # 16 or 32 bits, which Pillow would cut off at 255; of those in use, the 8 highest
                image = image.convert("I")
                scale = 0.5 ** max(0, image.getextrema()[1].bit_length() - 8)
                image = image.point(lambda pixel: pixel * scale).convert("L")
            if image.has_transparency_data:  # what is seen through is white, as paper is
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except Exception as error:  # broken files make Pillow raise nearly anything
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise OSError(f"cannot read {path}: {reason}") from None


def read_centre(path, size, shorter=None):
    """(3, size, size) uint8: the shorter side resized to `shorter`, then the centre, in one step."""
    if shorter is None:  # as in evaluation: all of an image if that is small, or else 224 of 256 pixels
        shorter = size if size <= SMALL else round(size * 8 / 7)
    image = read_image(path)
    side = min(image.size) * size / shorter
    left, top = ((length - side) / 2 for length in image.size)
    box = (left, top, left + side, top + side)
    return pil_to_tensor(image.resize((size, size), Image.Resampling.BILINEAR, box=box))


def attempt(read, *args):
    """read(*args), or None and a warning where that image cannot be read."""
    try:
        return read(*args)
    except OSError as error:
        warn(error)


def tolerate(broken, n):
    """A few broken images end no run. More than three and than 1 % of n do, or all of them, with an OSError."""
    if broken > max(3, n / 100) or broken == n:
        raise OSError(f"{broken} of {n} images cannot be read: the warnings above name each")


def read_all(paths, size):
    """n files → uint8 (k, 3, size, size) of the k that can be read, and which those are, (n,) bool."""
    images = torch.empty(len(paths), 3, size, size, dtype=torch.uint8)  # filled: torch.stack would take as much again
    good, k = torch.zeros(len(paths), dtype=torch.bool), 0
    with ThreadPool(16) as pool:
        for start in range(0, len(paths), 1024):  # few at a time, since what is read faster than filled in piles up
            block = pool.map(lambda path: attempt(read_centre, path, size), paths[start : start + 1024])
            for i, image in enumerate(block, start):
                if image is not None:
                    images[k], good[i] = image, True
                    k += 1
    tolerate(len(paths) - k, len(paths))
    return images[:k], good


def generator(*key):
    """A random stream of its own for each key of integers, such as (seed, epoch, index): nothing has to be saved."""
    return torch.Generator().manual_seed(hash((0xDA7A, *key)))  # apart from the training loop's own seeds


class TrainLoader:
    """One epoch of training batches: uint8 crops (b, crops, 3, size, size) and labels (b,), both on the device.

    batch is the global one: each rank gets its share of every global batch, and the last images that fill none are left
    to another epoch. The order comes from (seed, epoch) alone; a crop from these and, of streamed images, the image's
    number, of those on the device step and rank. Without set_epoch all are the first.

    Where images are streamed, the workers of torch's DataLoader (`stream`) call loader[i] for image i: the loader is
    also their data set, since it knows the seed and the epoch that the crops depend on. An image that cannot be read is
    replaced by another; five in a row raise an OSError.
    """

    def __init__(self, data, batch, crops, size, scale=(0.2, 1.0), seed=0, rank=0, world=1, device="cpu", workers=0):
        self.data, self.batch, self.crops, self.size, self.scale = data, batch, crops, size, scale
        self.seed, self.rank, self.world, self.device, self.workers = seed, rank, world, device, workers
        self.resident = data.images.to(device) if torch.is_tensor(data.images) else None
        self.set_epoch(0)

    def __len__(self):
        return len(self.data.images) // self.batch

    def set_epoch(self, epoch):
        order = torch.randperm(len(self.data.images), generator=generator(self.seed, epoch))[: len(self) * self.batch]
        order = rearrange(order, "(step rank b) -> step rank b", step=len(self), rank=self.world)[:, self.rank]
        self.epoch, self.order = epoch, order.tolist()  # order: this rank's images, step by step

    def __getitem__(self, i):
        """In a worker: the crops of image i, which is decoded once, and its label."""
        g = generator(self.seed, self.epoch, i)
        for _ in range(5):
            if image := attempt(read_image, self.data.images[i]):
                break
            i = torch.randint(len(self.data.images), (), generator=g).item()
        else:
            raise OSError("five images in a row cannot be read: the warnings above name each")
        image, crops = pil_to_tensor(image)[None], []
        for x, y, w, h in crop_boxes(self.crops, *image.shape[2:], self.scale, generator=g).tolist():
            box = image[..., y : y + h, x : x + w]  # resized within a level of Pillow's, and three times as fast
            crops.append(F.interpolate(box, (self.size, self.size), mode="bilinear", antialias=True))
        return torch.cat(crops), 0 if self.data.labels is None else int(self.data.labels[i])

    def __iter__(self):
        if self.resident is None:
            yield from stream(self)
            return
        for step, row in enumerate(self.order):
            index, g = torch.tensor(row), generator(self.seed, self.epoch, step, self.rank)
            x = self.resident[send(index, self.resident)]
            crops = torch.stack([random_resized_crop(x, self.size, self.scale, g) for _ in range(self.crops)], 1)
            yield crops, send(torch.zeros_like(index) if self.data.labels is None else self.data.labels[index], x)


class EvalLoader:
    """This rank's share of a labelled data set: uint8 (b, 3, size, size) and labels (b,), both on the device.

    Every image comes once, on one rank. A label of -1 says that there is no image to count: it cannot be read (an
    OSError, if they are many), or its number is past the last image's, so that all ranks have equally many.
    """

    def __init__(self, data, batch, size, rank=0, world=1, device="cpu", workers=0):
        self.data, self.size, self.device, self.workers = data, size, device, workers
        mine = list(range(rank, math.ceil(len(data.images) / world) * world, world))  # the last may be past the images
        batch = min(batch, max(1, 256 * 224**2 // size**2))  # no more memory for larger images
        self.order = [mine[i : i + batch] for i in range(0, len(mine), batch)]

    def __getitem__(self, i):  # in a worker, as TrainLoader's
        image = attempt(read_centre, self.data.images[i], self.size) if i < len(self.data.images) else None
        if image is None:
            return torch.zeros(3, self.size, self.size, dtype=torch.uint8), -1
        return image, int(self.data.labels[i])

    def __iter__(self):
        n = len(self.data.images)
        if torch.is_tensor(self.data.images):
            for row in self.order:
                index = torch.tensor(row)
                labels = self.data.labels[index % n].where(index < n, -1)  # past the last, any image will do
                yield self.data.images[index % n].to(self.device), labels.to(self.device)
            return
        unread = 0
        for row, (x, labels) in zip(self.order, stream(self)):
            unread += (labels < 0).sum() - sum(i >= n for i in row)
            yield x, labels
        tolerate(int(unread), sum(map(len, self.order)))


def stream(loader):
    """The batches that loader.order asks for, read as loader[i] by other processes, ahead of time, onto the device."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # that we may use
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or 1) or 1  # that share them
    batches = torch.utils.data.DataLoader(
        loader, batch_sampler=loader.order, num_workers=min(loader.workers, max(1, cores // ranks)),
        pin_memory=torch.device(loader.device).type == "cuda")
    for batch in batches:  # copied also on the CPU: each tensor from a worker holds an open file as long as it lives
        yield [t.to(loader.device, non_blocking=True, copy=True) for t in batch]


def glyphs(n, size, seed):
    """n letters and digits, warped, tinted and noisy, drawn in memory: a data set that every machine has.

    36 classes. The ground says nothing about the class; only the figure does, and the warps hide its pixels well enough
    that an untrained network finds few of them. Images of a class differ in how they are turned and sheared, which
    heavy views can teach a network to ignore, and standard views cannot.
    """
    g = torch.Generator().manual_seed(seed)
    classes, font = list("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"), ImageFont.load_default(44)
    stencils = []
    for character in classes:
        image = Image.new("L", (64, 64))
        ImageDraw.Draw(image).text((32, 32), character, fill=255, font=font, anchor="mm")
        stencils.append(pil_to_tensor(image) / 255)
    labels = torch.randint(len(classes), (n,), generator=g)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(n, *shape, generator=g)

    turn, zoom, shear = uniform(-0.4, 0.4), uniform(0.6, 0.95), uniform(-0.35, 0.35)
    warp = torch.stack([turn.cos() * zoom, (shear - turn.sin()) * zoom, uniform(-0.25, 0.25),
                        turn.sin() * zoom, turn.cos() * zoom, uniform(-0.25, 0.25)], 1).view(n, 2, 3)
    grid = F.affine_grid(warp, (n, 1, 2 * size, 2 * size), align_corners=False)
    ink = F.avg_pool2d(F.grid_sample(torch.stack(stencils)[labels], grid, align_corners=False), 2)
    # faint tints: with stronger ones an image can be told by its colour alone, and then nothing else is learnt
    paper = uniform(0.7, 0.9, 1, 1, 1) + uniform(-0.04, 0.04, 3, 1, 1)
    images = torch.lerp(paper, uniform(0, 0.3, 1, 1, 1), ink) + 0.1 * torch.randn(n, 3, size, size, generator=g)
    return Data((images.clamp(0, 1) * 255).round().to(torch.uint8), labels, classes)


# =====================================================================================================================
# python augment.py: look at the views
# =====================================================================================================================

def draw_views(rows, path, scale=1):
    """Save [(caption, (n, 3, h, w) in [0, 1])] as one picture, a row each with its caption above it."""
    strips = []
    for caption, x in rows:
        x = F.interpolate(x.float().cpu(), scale_factor=scale)
        strip = utils.make_grid(x, nrow=len(x), padding=2, pad_value=1)
        label = Image.new("RGB", (strip.shape[2], 16), "white")
        ImageDraw.Draw(label).text((3, 1), caption, fill="black", font=ImageFont.load_default(12))
        strips += [pil_to_tensor(label) / 255, strip]
    utils.save_image(torch.cat(strips, 1), path)


def main():
    parser = argparse.ArgumentParser(description="Draw standard and heavy views: Figure 7 of the paper.")
    parser.error = lambda message: sys.exit(f"augment.py: {message}")
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="image files; without any, glyphs are drawn")
    parser.add_argument("--size", type=int, help="pixels a side (default 224, glyphs 24)")
    parser.add_argument("--heavy", nargs="+", metavar="POLICY", default=["ra(2,5)+jigsaw(4)", "ra(8,16)", "ua"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default=PICTURE)
    args = parser.parse_args()
    size = args.size if args.size is not None else 224 if args.images else 24
    if size < 8 or not 0 <= args.seed < 2**32:
        parser.error("--size must be 8 or more, --seed of 32 bits and not below 0")
    if not args.out.endswith(PICTURE):
        parser.error(f"--out must end in {PICTURE}, or a run that reads this folder would take the picture for data")
    try:
        torch.manual_seed(args.seed)
        policies = {text: parse_policy(text, size) for text in args.heavy}
        x = [read_centre(path, size, size) for path in args.images] or glyphs(10, size, args.seed).images.unbind()
        x = torch.stack(x)
        crops = random_resized_crop(x, size, scale=(0.2 if args.images else 0.8, 1))  # as in the recipes
        sv = standard(crops, flips=bool(args.images), blur=size > SMALL)
        rows = [("Original image", x / 255), ("Standard view", sv)]
        rows += [(f"+ {text}", heavy(sv)) for text, heavy in policies.items()]
        draw_views(rows, args.out, scale=max(1, 96 // size))
    except (ValueError, OSError) as error:
        parser.error(error)
    print(f"{args.out!a}: {len(rows)} rows of {len(x)}")


if __name__ == "__main__":
    main()

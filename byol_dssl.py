"""BYOL, and what DSSL makes of it: heavy augmentations help, even those that break it.

Two standard views (SV) of an image learn from each other, SV ↔ SV. A heavy view (HV, marked `hat`) is derived from
one SV, only ever learns from that SV, and is never a target itself: SV ← HV (arrows point at what is learnt from).

    python byol_dssl.py                                               letters and digits, on any machine, in minutes
    python byol_dssl.py --data cifar10 --weights 1 0 0 0              plain BYOL on CIFAR-10
    torchrun --nproc_per_node=8 byol_dssl.py --data imagenet          DSSL on ImageNet

BYOL: arXiv 2006.07733.   DSSL: "Directional Self-supervised Learning for Heavy Image Augmentations", CVPR 2022.
Dimensions: b images on this rank, v views, c channels, h × w pixels, d features.
"""
import argparse
import copy
import io
import json
import math
import os
import re
import shlex
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torchvision import models

import augment

# ------------------------------------------------------------------------------------------------- loss

def D(p, z):
    """Negative cosine similarity, (b, d) and (b, d) → scalar in [-1, 1]. The target z gets no gradient."""
    return -F.cosine_similarity(p.float(), z.detach().float(), dim=-1).mean()


def dssl_loss(p, z, p_hat=None, z_hat=None, weights=(1, 0, 1, 0)):
    """Eq. 6 of the DSSL paper: alpha SV ↔ SV + beta HV ↔ HV + gamma SV ← HV + delta HV ← SV.

    SV ← HV: the HV learns from the SV, which gets no gradient from it.

    p, z: online predictions and EMA targets of two SVs, a pair of (b, d) each; p_hat, z_hat: those of the two HVs, each
    derived from the SV at its own place. A pair that no weight needs may be None. The default weights are DSSL (Eq. 5),
    (1, 0, 0, 0) is plain BYOL. Each term is the mean over its pair, the form and the scale of the authors' released
    code: a perfect DSSL loss is -2. (BYOL's own 2 - 2 cos, summed over the pair, has four times the gradient.)
    """
    alpha, beta, gamma, delta = weights
    loss = 0
    if alpha:
        loss = loss + alpha * (D(p[0], z[1]) + D(p[1], z[0])) / 2  # SV ↔ SV
    if beta:
        loss = loss + beta * (D(p_hat[0], z_hat[1]) + D(p_hat[1], z_hat[0])) / 2  # HV ↔ HV
    if gamma:
        loss = loss + gamma * (D(p_hat[0], z[0]) + D(p_hat[1], z[1])) / 2  # SV ← HV
    if delta:
        loss = loss + delta * (D(p[0], z_hat[0]) + D(p[1], z_hat[1])) / 2  # HV ← SV
    return loss


# the weights that leave one term alone
TERMS = {"SV ↔ SV": (1, 0, 0, 0), "HV ↔ HV": (0, 1, 0, 0), "SV ← HV": (0, 0, 1, 0), "HV ← SV": (0, 0, 0, 1)}

# ------------------------------------------------------------------------------------------------- model

def make_backbone(arch, stem):
    """torchvision's ResNet without fc, (b, 3, h, w) → (b, d), and its d. Key names are torchvision's.

    stem "cifar", for images of 32 px or so: the first convolution is 3 × 3 with stride 1, and there is no max-pool.
    "small" is our own: four basic blocks of 32 to 256 channels behind a 3 × 3 convolution with stride 2, for CPUs.
    """
    if arch == "small":
        net = models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1])
        net.conv1, net.bn1, net.maxpool = nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.Identity()
        net.inplanes, d = 32, 256
        net.layer1, net.layer2, net.layer3, net.layer4 = (
            net._make_layer(models.resnet.BasicBlock, c, 1, s) for c, s in ((32, 1), (64, 2), (128, 2), (256, 2)))
    else:
        net = getattr(models, arch)(zero_init_residual=stem == "imagenet")  # there each block starts as the identity
        d = net.fc.in_features
        if stem == "cifar":
            net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    net.fc = nn.Identity()
    return net, d


class BYOL(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.backbone, d = make_backbone(args.arch, args.stem)
        self.projector, self.predictor = (
            nn.Sequential(nn.Linear(width, args.hidden), nn.BatchNorm1d(args.hidden), nn.ReLU(inplace=True),
                          nn.Linear(args.hidden, args.dim)) for width in (d, args.dim))
        self.target = copy.deepcopy(nn.Sequential(self.backbone, self.projector)).requires_grad_(False)
        if args.compile:
            self.target[0].compile(dynamic=False)
        alpha, beta, gamma, delta = args.weights
        self.targets_sv, self.targets_hat = bool(alpha or gamma), bool(beta or delta)

    def forward(self, v, v_hat):
        """Two tuples of views → what dssl_loss takes, and all online projections (v, b, d) for the collapse monitor.

        One view at a time, SVs first: BN statistics are those of one view, as in the original; the target network, too,
        uses those of its batch. All views in one call: DDP wants one forward for each backward.
        """
        y = [self.projector(self.backbone(x)) for x in v + v_hat]
        p = [self.predictor(x) for x in y]
        with torch.no_grad():  # only views that the loss has as targets
            z = [self.target(x) for x in v] if self.targets_sv else []
            z_hat = [self.target(x) for x in v_hat] if self.targets_hat else []
        n = len(v)
        return (p[:n], z, p[n:], z_hat), torch.stack(y).detach()

    @torch.no_grad()
    def update_target(self, ema):
        """After a step: target ← ema · target + (1 - ema) · online. Parameters alone: BN sees its batch."""
        for target, online in zip(self.target.parameters(), nn.Sequential(self.backbone, self.projector).parameters()):
            target.lerp_(online, 1 - ema)


# ------------------------------------------------------------------------------------------------- recipes
# --data names a column, any flag overrides its entry. Glyphs: found by trial, for a few minutes on two CPU cores.
# CIFAR-10 and ImageNet: optimizer and schedule are SimSiam's (§4.1 of DSSL), heads BYOL's, ema by released code.

MANY = 1e9  # and not infinity, which no flag may be
DATA = ("glyphs", "cifar10", "imagenet")
RECIPES = {  # flag: (glyphs, cifar10, imagenet, allowed: a list or (low, high), help)
    "arch": ("small", "resnet18", "resnet50", ["small", "resnet18", "resnet34", "resnet50", "resnet101"], "backbone"),
    "stem": ("cifar", "cifar", "imagenet", ["cifar", "imagenet"], "3 × 3 and no max-pool, or 7 × 7 and max-pool"),
    "size": (24, 32, 224, (8, 10_000), "pixels a side of a view"),
    "crop": (0.8, 0.2, 0.2, (0.01, 1), "smallest crop, as a share of the image's area"),
    "flip": (False, True, True, None, "mirror SVs at random"),
    "blur": (False, False, True, None, "blur SVs at random"),
    "heavy": ("ua", "ra(2,5)", "0.9*ra(2,5)|0.1*jigsaw(4)", None,
              "SV → HV: ra(n,m), ra(n,m,paper), ua, jigsaw(n); a+b: one, then the other; 0.9*a|0.1*b: either"),
    "batch": (32, 512, 512, (2, MANY), "images a step, over all ranks"),
    "epochs": (5, 800, 100, (1, MANY), "passes over the images"),
    "lr": (0.48, 0.03, 0.05, (0, MANY), "learning rate for a batch of 256; it scales with the batch"),
    "wd": (5e-4, 5e-4, 1e-4, (0, MANY), "weight decay"),
    "warmup": (0.5, 0.0, 0.0, (0, MANY), "epochs of linear warm-up before the cosine"),
    "k": (50, 200, 200, (1, MANY), "neighbours of the kNN monitor"),
    "knn_every": (1, 10, 5, (1, MANY), "epochs from one kNN monitor to the next"),
    "dim": (256, 256, 256, (1, MANY), "features of projections and predictions"),
    "hidden": (512, 4096, 4096, (1, MANY), "features inside the projector and the predictor"),
    "ema": (0.99, 0.99, 0.99, (0, 1), "momentum of the target network"),
    "ema_cosine": (False, False, False, None, "raise the momentum to 1, as the BYOL paper does"),
}
FREE = ("data", "root", "out", "workers", "compile", "k", "knn_every")  # what may change when a run goes on


def fail(message):
    """End with one line that says what to change, printed once a machine."""
    sys.exit(f"{Path(__file__).name}: {message}" if os.environ.get("LOCAL_RANK", "0") in ("", "0") else 1)


def place():
    """→ rank, world, local rank: torchrun's, or a world of one where it did not start this process."""
    keys = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    numbers = [os.environ.get(key, "") for key in keys[:3]]
    if any(numbers) and not (all(map(str.isdecimal, numbers)) and all(os.environ.get(key) for key in keys)):
        fail(f"{', '.join(keys)} are set in part, or not to numbers: start with torchrun, or unset them")
    if 0 < (gpus := torch.cuda.device_count()) < int(os.environ.get("LOCAL_WORLD_SIZE") or 1):
        fail(f"more processes than the {gpus} GPUs here: lower --nproc_per_node")
    return [int(number or default) for number, default in zip(numbers, (0, 1, 0))]


def parse_args(argv=None):
    """The complete settings, or an exit with one line that says what to change."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.error = fail  # one line, no usage
    add, boolean = parser.add_argument, argparse.BooleanOptionalAction
    add("--data", default="glyphs", help="glyphs (default), cifar10, imagenet, or the path of a folder of images")
    add("--recipe", choices=DATA, help="whose settings to take, where not those of --data; a folder needs it")
    add("--root", default="data", help="the folder with cifar10/ and imagenet/ in it (default: data)")
    add("--weights", nargs=4, type=float, default=[1.0, 0.0, 1.0, 0.0], help="of Eq. 6 (default: 1 0 1 0, DSSL)")
    add("--pairs", type=int, default=1, help="pairs of SVs an image, whose losses are summed; 2 cost what DSSL does")
    add("--hv-from", choices=["sv", "image"], default="sv", help="make HVs of the SVs they learn from or of fresh ones")
    add("--out", help="folder to write into, and to go on from (default: under runs/, named by the command)")
    add("--seed", type=int, default=0, help="of all that is random (default: 0)")
    add("--workers", type=int, default=8, help="processes a rank that read streamed images (default: 8)")
    add("--bf16", action=boolean, help="compute in bfloat16 (default: on GPUs that can)")
    add("--compile", action="store_true", help="torch.compile the backbone, for one GPU (SyncBN breaks the graph)")
    recipe = parser.add_argument_group("recipe", f"defaults for {', '.join(DATA)}")
    for key, (*defaults, allowed, meaning) in RECIPES.items():
        choices, kind = allowed if isinstance(allowed, list) else None, type(defaults[0])
        how = dict(action=boolean) if kind is bool else dict(type=kind, choices=choices)
        recipe.add_argument("--" + key.replace("_", "-"), help=f"{meaning} ({', '.join(map(str, defaults))})", **how)
    args = parser.parse_args(argv)

    args.recipe = args.recipe or args.data
    if args.recipe not in DATA:
        fail(f"--data {args.data} is none of {', '.join(DATA)}: for a folder, add --recipe with one of them")
    name = " ".join([Path(__file__).stem, *(sys.argv[1:] if argv is None else argv)])  # a folder for each command
    args.out = args.out or "runs/" + re.sub(r"[^\w.+]+", "-", name).strip("-")
    for key, row in RECIPES.items():
        if getattr(args, key) is None:
            setattr(args, key, row[DATA.index(args.recipe)])
    args.bf16 = torch.cuda.is_bf16_supported(including_emulation=False) if args.bf16 is None else args.bf16

    ranges = {key: row[3] for key, row in RECIPES.items() if isinstance(row[3], tuple)}
    for key, (low, high) in (ranges | dict(pairs=(1, 100), seed=(0, 2**63 - 1), workers=(0, 1000))).items():
        if not low <= getattr(args, key) <= high:
            fail(f"--{key.replace('_', '-')} must be from {low:g} to {high:g}, not {getattr(args, key)}")
    _, world, _ = place()
    if not any(args.weights) or not all(0 <= w < MANY for w in args.weights):
        fail("--weights must be 0 or more, and not all 0")
    if args.batch % world or args.batch < 2 * world:
        fail(f"--batch {args.batch} does not divide by the {world} ranks into 2 or more images each")
    if args.warmup >= args.epochs:
        fail(f"--warmup {args.warmup:g} is not shorter than --epochs {args.epochs}")
    try:
        augment.parse_policy(args.heavy, args.size)
    except ValueError as error:
        fail(f"--heavy: {error}")
    return args


# ------------------------------------------------------------------------------------------------- kNN monitor

def knn_predict(query, bank, labels, classes, k=200, t=0.1):
    """Weighted nearest-neighbour classification by cosine similarity (Wu et al., arXiv 1805.01978).

    query (q, d), bank (n, d), labels (n,) in [0, classes) → (q,) labels. The k nearest rows of the bank (all of them,
    where it has fewer) vote for their labels, each with weight exp(similarity / t).
    """
    bank, out = F.normalize(bank, dim=1, eps=1e-6), []  # half precision has no smaller eps
    for part in F.normalize(query, dim=1, eps=1e-6).split(256):  # so that no q × n similarities are in memory
        similarity, nearest = (part @ bank.T).float().topk(min(k, len(bank)))
        votes = torch.zeros(len(part), classes, device=part.device)
        out.append(votes.scatter_add_(1, labels[nearest], (similarity / t).exp()).argmax(1))
    return torch.cat(out)


@torch.no_grad()
def features(backbone, loader, bf16):
    """Features (n, d), BN in eval mode, and labels (n,) of this rank's share of the images."""
    out = []
    backbone.eval()
    for x, labels in loader:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            y = backbone(augment.normalize(x / 255))
        out.append((y.half() if y.is_cuda else y.float(), labels))  # ImageNet's bank takes 5 GB in half precision
    backbone.train()
    return [torch.cat(parts) for parts in zip(*out)]


def gather(x):
    """(b, …) on each rank → (world · b, …) on every rank, without gradient."""
    if dist.get_world_size() == 1:  # on CPU gloo would copy on a thread of its own, and slow torch's down for good
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x)
    return torch.cat(parts)


def knn_accuracy(backbone, bank_loader, query_loader, classes, k=200, bf16=False):
    """kNN top-1 in percent over the queries of all ranks, which must hold the same weights and BN statistics."""
    bank, labels = map(gather, features(backbone, bank_loader, bf16))
    bank, labels = bank[labels >= 0], labels[labels >= 0]  # below 0: no image
    query, truth = features(backbone, query_loader, bf16)
    right = knn_predict(query, bank, labels, classes, k) == truth
    count = torch.stack([right.sum(), (truth >= 0).sum()])
    dist.all_reduce(count)
    return 100 * count[0].item() / count[1].item()


# ------------------------------------------------------------------------------------------------- train

def join(rank, world, local):
    """→ this rank's device, once all have joined. A world of one goes the same way, and needs no port."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local)
        torch.backends.cudnn.benchmark = True  # nearly all batches have one shape: try what is fastest for it
    alone = dict(store=dist.HashStore(), rank=0, world_size=1) if world == 1 else {}
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda and dist.is_nccl_available() else "gloo", **alone)
    sys.stdout = sys.stdout if rank == 0 else None  # one rank prints for all
    return torch.device("cuda", local) if cuda else torch.device("cpu")


def write(path, content):
    """All or nothing: what torch.save takes, or text, goes into another file, which then replaces the old one."""
    part, data = path.with_name(f"{path.name}.{os.getpid()}.part"), io.BytesIO()
    data.write(content.encode()) if isinstance(content, str) else torch.save(content, data)
    try:
        with open(part, "wb") as file:
            file.write(data.getbuffer())
            file.flush()
            os.fsync(file.fileno())  # the content is on the disk before the name is
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise OSError(f"cannot write {path} ({error.strerror}); what was there before is still there") from None


def load_checkpoint(out, settings):
    """The state of the run in this folder, or None where there is none yet. Fails where it is another run's."""
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "checkpoint.pt").exists():
        return None
    try:
        state = torch.load(out / "checkpoint.pt", map_location="cpu", weights_only=True)
        there = {key: state["settings"].get(key) for key in settings}
    except Exception as error:  # garbage can make the unpickler raise anything
        fail(f"{out}/checkpoint.pt cannot be read ({type(error).__name__}): remove it, or take another --out")
    for key in settings:
        if settings[key] != there[key]:
            why = " (the learning rate falls to 0 with them: to train for longer, begin anew)" * (key == "epochs")
            fail(f"{out} holds a run with {key} {there[key]}, not {settings[key]}{why}: take that, or another --out")
    return state


def learning_rate(step, steps, warmup, base):
    """Linear warm-up over the first `warmup` steps, then half a cosine from base to 0."""
    if step < warmup:
        return base * min(1, (step + 1) / warmup)
    return base * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


def train(args):
    # data
    rank, world, local = place()
    train_set, test_set = augment.load_data(args.data, args.root, args.size, download=world == 1)
    counts = [len(data.images) if data else 0 for data in (train_set, test_set)]
    if args.batch > counts[0]:
        fail(f"--batch {args.batch} is larger than the {counts[0]} training images: lower it")

    # the run in --out, if there is one, goes on; rank 0 alone reads and writes there
    out, settings = Path(args.out).expanduser(), {"script": Path(__file__).stem, "images": counts}
    settings |= {key: value for key, value in vars(args).items() if key not in FREE}
    message = [load_checkpoint(out, settings) if rank == 0 else None, settings]
    device = join(rank, world, local)
    if world > 1:
        dist.broadcast_object_list(message, device=torch.device("cpu"))
    state, theirs = message
    if odd := [key for key in settings if settings[key] != theirs[key]]:
        fail(f"rank {rank} has other {', '.join(odd)} than rank 0: start all with the same flags and data")
    history = state["history"] if state else []  # an entry an epoch, the lines of log.jsonl

    # views
    alpha, beta, gamma, delta = args.weights
    use_sv, use_hv, n = bool(alpha or gamma or delta), bool(beta or gamma or delta), 2 * args.pairs
    crops = 2 * n if use_sv and use_hv and args.hv_from == "image" else n  # then HVs start from fresh SVs
    heavy = augment.parse_policy(args.heavy, args.size)
    share = dict(rank=rank, world=world, device=device, workers=args.workers)
    loader = augment.TrainLoader(train_set, args.batch, crops, args.size, (args.crop, 1), args.seed, **share)
    monitor = [augment.EvalLoader(data, 256, args.size, **share) for data in (train_set, test_set)] if test_set else []

    # model
    torch.manual_seed(args.seed)
    model = BYOL(args).to(device, memory_format=torch.channels_last)  # 1.5 times as fast on CPU
    if device.type == "cuda" and world > 1:  # SyncBatchNorm exists on GPUs alone
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if args.compile:
        model.backbone.compile(dynamic=False)  # static shapes, though the monitor's batches have others
    ddp = nn.parallel.DistributedDataParallel(model)
    ddp.broadcast_buffers = False  # once an epoch will do; the argument of this name is deprecated
    base_lr, steps = args.lr * args.batch / 256, len(loader)
    optimizer = torch.optim.SGD(model.parameters(), base_lr, momentum=0.9, weight_decay=args.wd)
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])

    used = {term: weight for term, weight in zip(TERMS, args.weights) if weight}
    words = " + ".join(f"{weight:g} {term}" for term, weight in used.items())
    print(f"{settings['script']} on {args.data} ({counts[0]:,} images): {words}, pairs {args.pairs}",
          f"heavy {args.heavy}" if use_hv else "no HVs", "with kNN" if monitor else "no labels, so no kNN", sep=", ")
    print(f"{args.arch} at {args.size} px, batch {args.batch}, lr {base_lr:g}, {args.epochs} epochs of {steps} steps, "
          f"{world} × {device.type}, into {out}", f"after epoch {len(history) - 1}" if history else "")
    for epoch in range(len(history), args.epochs + 1):  # epoch 0 trains nothing: it measures the untrained network
        loader.set_epoch(epoch - 1)
        sums, start = torch.zeros(2 + len(used), dtype=torch.float64, device=device), time.time()  # loss, std, terms
        for i, (batch, _) in enumerate(loader if epoch else (), 1):
            step = (epoch - 1) * steps + i - 1
            torch.manual_seed(hash((args.seed, step, rank)))  # so that nothing random has to be saved
            lr = learning_rate(step, args.epochs * steps, args.warmup * steps, base_lr)
            optimizer.param_groups[0]["lr"] = lr

            # SVs are the first m; HVs come from the last m, which are the first m unless there are fresh ones for them
            sv = augment.standard(rearrange(batch, "b v c h w -> (v b) c h w"), args.flip, args.blur)
            m = n * len(batch)
            v = augment.normalize(sv[:m]).chunk(n) if use_sv else ()
            hv = heavy(sv[-m:]).chunk(n) if use_hv else ()
            v_hat = tuple(augment.normalize(x) for x in hv)
            if step == 0 and rank == 0:
                rows = [("SV", x[:10]) for x in sv.chunk(crops)] + [("HV", x[:10]) for x in hv]
                augment.draw_views(rows, out / "views.png", scale=max(1, 96 // args.size))

            with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
                outputs, z = ddp(v, v_hat)
            pairs = [[o[k : k + 2] for o in outputs] for k in range(0, n, 2)]  # what dssl_loss takes
            terms = [  # each alone, for the log
                sum(dssl_loss(*pair, weights=TERMS[term]) for pair in pairs) for term in used]
            loss = sum(weight * term for weight, term in zip(used.values(), terms))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rise = (1 + math.cos(math.pi * step / (args.epochs * steps))) / 2 if args.ema_cosine else 1
            model.update_target(1 - (1 - args.ema) * rise)

            with torch.no_grad():  # std, of normalised projections, times √d: 1 in health, 0 in collapse
                std = F.normalize(z.float(), dim=-1).std(1).mean() * z.shape[-1] ** 0.5
                sums += torch.stack([loss, std, *terms])
            if i % 10 == 0 and sys.stdout and sys.stdout.isatty():
                rate = i * args.batch / (time.time() - start)
                left = (args.epochs * steps - step) * args.batch / rate / 60
                print(f"epoch {epoch:3d}  step {i}/{steps}  {rate:,.0f} images/s  {left:.0f} min left     ", end="\r")

        dist.all_reduce(sums)
        loss, std, *terms = (sums / (steps * world)).tolist()
        seconds = time.time() - start
        for buffer in model.buffers():  # without SyncBN each rank has BN statistics of its own: rank 0's for everybody
            dist.broadcast(buffer, 0)
        if not all(x.isfinite().all() for x in (sums, *model.state_dict().values())):
            fail(f"the loss or a weight is not finite in epoch {epoch}: lower --lr; {out} has the epoch before")
        entry, line = dict(epoch=epoch), f"epoch {epoch:3d}/{args.epochs}"
        if epoch:
            rate = steps * args.batch / seconds
            entry |= dict(loss=loss, terms=dict(zip(used, terms)), std=std, lr=lr, images_per_s=rate, seconds=seconds)
            line += f"  loss {loss:.4f}  std {std:.2f}  {rate:,.0f} images/s  {seconds:.0f} s"
        if monitor and (epoch % args.knn_every == 0 or epoch == args.epochs):
            entry["knn"] = knn_accuracy(model.backbone, *monitor, len(train_set.classes), args.k, args.bf16)
            line += f"  kNN {entry['knn']:.2f} %" + " (untrained)" * (epoch == 0)
        history.append(entry)
        print(line)
        if epoch and std < 0.2:
            print("WARNING: the std is low: all images are being projected to one point (collapse)")
        if epoch >= max(1, args.epochs / 10) and entry.get("knn", math.inf) < history[0].get("knn", 0) + 2:
            print("WARNING: kNN is not clearly above the untrained network's: nothing useful is being learnt")
        if rank == 0:  # the checkpoint last: what it does not know has not happened
            backbone = {key: value.cpu().contiguous() for key, value in model.backbone.state_dict().items()}
            write(out / "backbone.pt", backbone)
            write(out / "log.jsonl", "".join(json.dumps(entry) + "\n" for entry in history))
            write(out / "checkpoint.pt", dict(
                settings=settings, history=history, model=model.state_dict(), optimizer=optimizer.state_dict()))

    print(f"the backbone is in {out}/backbone.pt")
    if monitor:
        print("its linear evaluation:", shlex.join([
            "python", str(Path(__file__).with_name("linear_eval.py")), f"{out}/backbone.pt", "--data", args.data,
            "--root", args.root, "--recipe", args.recipe, "--size", f"{args.size}"]))


def main():
    """Train, and end with one line where it is not this code's fault: no traceback, no process group left behind."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C just ends, and costs the epoch under way
    if sys.stdout:  # what a terminal cannot show must not end a run
        sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    try:
        end = train(parse_args())
    except SystemExit as error:
        end = error.code
    except OSError as error:  # no such data, a full disk; the last line, since a worker's error brings its traceback
        end = f"{Path(__file__).name}: {(str(error) or repr(error)).splitlines()[-1]}"
    if dist.is_initialized():
        if end:  # at once: the others may be waiting for this rank, and the end of NCCL's group would wait for them
            if isinstance(end, str):
                print(end, file=sys.stderr, flush=True)
            os._exit(1)
        dist.destroy_process_group()  # train()'s DDP is gone by now: with torch 2.11 the other order can wait for ever
    sys.exit(end)


if __name__ == "__main__":
    main()

"""SimSiam, and what DSSL makes of it: heavy views that learn from standard views, and never teach them.

Two standard views (SV) of an image learn from each other, SV ↔ SV. A heavy view (HV, marked `hat`) is derived from
one SV, only ever learns from that SV, and is never a target itself: SV ← HV (arrows point at what is learnt from).

    python simsiam_dssl.py                                            letters and digits, on any machine, in minutes
    python simsiam_dssl.py --data cifar10 --weights 1 0 0 0           plain SimSiam on CIFAR-10
    torchrun --nproc_per_node=8 simsiam_dssl.py --data imagenet       DSSL on ImageNet

SimSiam: arXiv 2011.10566.   DSSL: "Directional Self-supervised Learning for Heavy Image Augmentations", CVPR 2022.
Dimensions: v views, b images on this rank, c channels, h × w pixels, d features.
"""
import argparse
import atexit
import gc
import io
import json
import math
import os
import sys
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torchvision import models
from torchvision.models.resnet import BasicBlock, ResNet

import augment

# ------------------------------------------------------------ loss

def D(p, z):
    """Negative cosine similarity in float32, (b, d) and (b, d) → scalar in [-1, 1]. The target z gets no gradient."""
    return -F.cosine_similarity(p.float(), z.detach().float(), dim=1).mean()


def dssl_loss(p, z, p_hat=None, z_hat=None, weights=(1, 0, 1, 0)):
    """Eq. 6 of the DSSL paper: alpha SV ↔ SV + beta HV ↔ HV + gamma SV ← HV + delta HV ← SV.

    Arrows point at what is learnt from: in SV ← HV the HV learns, and the SV gets no gradient.
    p, z: predictions and projections of two SVs, a pair of (b, d) each; p_hat, z_hat: those of the two HVs, each
    derived from the SV at its own place. A pair that no weight needs may be None. The default weights are DSSL (Eq. 5),
    (1, 0, 0, 0) is plain SimSiam. Each term is the mean over its pair, the scale of the authors' released code: a
    perfect DSSL loss is -2 (Algorithm 1 prints half of it).
    """
    alpha, beta, gamma, delta = weights
    loss = 0
    if alpha:
        loss += alpha * (D(p[0], z[1]) + D(p[1], z[0])) / 2  # SV ↔ SV
    if beta:
        loss += beta * (D(p_hat[0], z_hat[1]) + D(p_hat[1], z_hat[0])) / 2  # HV ↔ HV
    if gamma:
        loss += gamma * (D(p_hat[0], z[0]) + D(p_hat[1], z[1])) / 2  # SV ← HV
    if delta:
        loss += delta * (D(p[0], z_hat[0]) + D(p[1], z_hat[1])) / 2  # HV ← SV
    return loss


# ------------------------------------------------------------ model

def make_backbone(arch, stem):
    """torchvision's ResNet without fc, (b, 3, h, w) → (b, d), and its d. Key names are torchvision's.

    stem "cifar", for images of 32 px or so: the first convolution is 3 × 3 with stride 1, and there is no max-pool.
    "small" is our own: four basic blocks of 32 to 256 channels behind a 3 × 3 convolution with stride 2, for CPUs.
    """
    if arch == "small":
        net, d = ResNet(BasicBlock, [1, 1, 1, 1]), 256
        net.conv1 = nn.Conv2d(3, 32, 3, stride=2, padding=1, bias=False)
        net.bn1 = nn.BatchNorm2d(32)
        net.maxpool = nn.Identity()
        net.layer1 = nn.Sequential(BasicBlock(32, 32))
        for name, inputs, outputs in (("layer2", 32, 64), ("layer3", 64, 128), ("layer4", 128, 256)):
            shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=2, bias=False), nn.BatchNorm2d(outputs))
            setattr(net, name, nn.Sequential(BasicBlock(inputs, outputs, stride=2, downsample=shortcut)))
    else:
        net = getattr(models, arch)(zero_init_residual=stem == "imagenet")  # there each block starts as the identity
        d = net.fc.in_features
        if stem == "cifar":
            net.conv1 = nn.Conv2d(3, 64, 3, stride=1, padding=1, bias=False)
            net.maxpool = nn.Identity()
    net.fc = nn.Identity()
    return net, d


class SimSiam(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.backbone, d = make_backbone(args.arch, args.stem)
        layers = []
        for _ in range(args.layers - 1):
            layers += [nn.Linear(d, args.dim, bias=False), nn.BatchNorm1d(args.dim), nn.ReLU(inplace=True)]
            d = args.dim
        layers += [nn.Linear(d, args.dim, bias=False), nn.BatchNorm1d(args.dim, affine=False)]
        self.projector = nn.Sequential(*layers)
        narrow = max(1, args.dim // 4)  # the predictor is a bottleneck
        self.predictor = nn.Sequential(
            nn.Linear(args.dim, narrow, bias=False), nn.BatchNorm1d(narrow), nn.ReLU(inplace=True),
            nn.Linear(narrow, args.dim))

    def forward(self, sv, hv):
        """SVs and HVs, (v, b, c, h, w) each → p, z of the SVs, p_hat, z_hat of the HVs: lists of (b, d), one a view.

        One view at a time, SVs first: BN statistics are those of one view. All views in one call: DDP wants one forward
        for each backward. On one GPU these lines run only to be recorded (`record_graphs`): a print then stays silent.
        """
        z = [self.projector(self.backbone(x)) for x in [*sv, *hv]]
        p = [self.predictor(x) for x in z]
        n = len(sv)
        return p[:n], z[:n], p[n:], z[n:]


# ------------------------------------------------------------ loop

def learning_rate(step, steps, warmup, base):
    """Linear warm-up over the first `warmup` steps, then half a cosine from base to 0."""
    if step < warmup:
        return base * min(1, (step + 1) / warmup)  # of 2.5 steps the third would be above base
    return base * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


def make_views(loader, args, epoch):
    """Yield each step's SVs and HVs in [0, 1], (2 · pairs, b, c, h, w) each, none where no weight needs them.

    With --hv-from image the loader gives twice as many crops, and HVs are made of SVs of their own, the second half.
    All that is random comes from the seed, the step and the rank: so no generator's state has to be saved.
    """
    alpha, beta, gamma, delta = args.weights
    heavy = augment.parse_policy(args.heavy, args.size)
    loader.set_epoch(epoch - 1)
    for step, (crops, _) in enumerate(loader, (epoch - 1) * len(loader)):
        torch.manual_seed(hash((args.seed, step, dist.get_rank())))  # integers have the same hash in every process
        x = augment.standard(rearrange(crops, "b v c h w -> (v b) c h w"), args.flip, args.blur)
        sv, source = (x, x) if args.hv_from == "sv" else x.chunk(2)
        hv = heavy(source) if beta or gamma or delta else source[:0]
        sv = sv if alpha or gamma or delta else sv[:0]
        yield [rearrange(x, "(v b) c h w -> v b c h w", b=len(crops)) for x in (sv, hv)]


def record_graphs(model, args, device):
    """Record the kernels of forward and of backward: on a GPU, launching them one by one takes longer than they do.

    Each step then repeats these CUDA graphs: forward()'s lines run no more, outputs and gradients last for one step.
    """
    gc.collect()  # or the graphs of an earlier run in this process keep their memory
    alpha, beta, gamma, delta = args.weights
    n, shape = 2 * args.pairs, (args.batch, 3, args.size, args.size)
    sv = torch.zeros(n if alpha or gamma or delta else 0, *shape, device=device)  # as many as make_views gives
    hv = torch.zeros(n if beta or gamma or delta else 0, *shape, device=device)
    before = {key: x.clone() for key, x in model.state_dict().items()}
    warnings.filterwarnings("ignore", "Attempting to run cuBLAS|The AccumulateGrad node's stream")  # neither does harm
    with torch.autocast("cuda", torch.bfloat16, enabled=args.bf16, cache_enabled=False):  # graphs allow no cache
        torch.cuda.make_graphed_callables(model, (sv, hv))
    model.load_state_dict(before)  # passes before the recording have changed BN's statistics


def train_epoch(epoch, ddp, optimizer, loader, args, out):
    """One pass over the images, the first is epoch 1 → what the log says of it."""
    steps = len(loader)
    pairs = [slice(v, v + 2) for v in range(0, 2 * args.pairs, 2)]
    totals = torch.zeros(2, dtype=torch.float64, device=loader.device)  # of loss and std
    start = time.time()
    for i, (sv, hv) in enumerate(make_views(loader, args, epoch)):
        step = (epoch - 1) * steps + i  # of all epochs
        lr = learning_rate(step, args.epochs * steps, args.warmup * steps, args.lr * args.batch / 256)
        optimizer.param_groups[0]["lr"] = lr

        with torch.autocast(sv.device.type, torch.bfloat16, enabled=args.bf16):
            p, z, p_hat, z_hat = ddp(augment.normalize(sv), augment.normalize(hv))
        loss = sum(dssl_loss(p[pair], z[pair], p_hat[pair], z_hat[pair], args.weights) for pair in pairs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        totals += torch.stack([loss.detach(), spread(torch.stack(z + z_hat))])
        if step == 0 and dist.get_rank() == 0:
            rows = [("SV", x[:10]) for x in sv] + [("HV", x[:10]) for x in hv]
            augment.draw_views(rows, out / augment.PICTURE, scale=max(1, 96 // args.size))
        if i % 50 == 0:  # seldom, since item() waits for the GPU
            rate = (i + 1) * args.batch / (time.time() - start)
            say(f"epoch {epoch:3d}  step {i + 1}/{steps}  {rate:,.0f} images/s  loss {loss.item():.4f}", live=True)

    dist.all_reduce(totals)
    loss, std = (totals / (steps * dist.get_world_size())).tolist()
    seconds = time.time() - start
    for buffer in ddp.module.buffers():  # without SyncBN each rank has BN statistics of its own: now all have rank 0's
        dist.broadcast(buffer, 0)
    if not all(x.isfinite().all() for x in (totals, *ddp.module.state_dict().values())):
        sys.exit(f"the loss or a weight is not finite in epoch {epoch}, which is not saved: lower --lr")
    return dict(loss=loss, std=std, lr=lr, images_per_s=steps * args.batch / seconds, seconds=seconds)


# ------------------------------------------------------------ monitors

@torch.no_grad()
def spread(z):
    """√d times the std over b of normalised projections (v, b, d): 0 is collapse to a point, unrelated ones have 1."""
    return F.normalize(z.float(), dim=-1).std(1).mean() * z.shape[-1] ** 0.5


def knn_predict(query, bank, labels, classes, k=200, t=0.1):
    """Weighted nearest-neighbour classification by cosine similarity (Wu et al., arXiv 1805.01978).

    query (q, d), bank (n, d), labels (n,) in [0, classes) → (q,) labels. The k nearest rows of the bank, or all of a
    smaller one, vote with weight exp(similarity / t). Rows with a label of -1, which are no images, do not vote.
    """
    # Similarities are divided by the bank's norms, since a normalised bank would be a second one in memory.
    norms = torch.linalg.vector_norm(bank, dim=1, dtype=torch.float).clamp(min=1e-6)
    out = []
    for part in F.normalize(query, dim=1, eps=1e-6).split(32):  # so that no q × n similarities are in memory
        similarity = (part @ bank.T).float().div_(norms).masked_fill_(labels < 0, -torch.inf)
        similarity, nearest = similarity.topk(min(k, len(bank)))
        votes = torch.zeros(len(part), classes, device=part.device)
        votes.scatter_add_(1, labels[nearest].clamp(min=0), (similarity / t).exp())
        out.append(votes.argmax(1))
    return torch.cat(out)


@torch.no_grad()
def features(backbone, loader, bf16):
    """Features (n, d), BN in eval mode, and labels (n,) of this rank's share of the images."""
    out, labels = [], []
    backbone.eval()
    for x, label in loader:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            y = backbone(augment.normalize(x / 255))
        out.append(y.half() if y.is_cuda else y.float())  # in half precision ImageNet's take 5 GB
        labels.append(label)
    backbone.train()
    return torch.cat(out), torch.cat(labels)


def gather(x):
    """(n, …) on each rank → (world · n, …) on every rank, without gradient."""
    if dist.get_world_size() == 1:  # a bank need not be in memory twice
        return x
    parts = x.new_empty(dist.get_world_size(), *x.shape)
    parts[dist.get_rank()] = x
    for rank, part in enumerate(parts):  # all_gather of so much would, on CPU, start threads that slow torch's for good
        dist.broadcast(part, rank)
    return parts.flatten(0, 1)


def knn_accuracy(backbone, bank_loader, query_loader, classes, k=200, bf16=False):
    """kNN top-1 in percent over the queries of all ranks, which must hold the same weights and BN statistics."""
    bank, labels = map(gather, features(backbone, bank_loader, bf16))
    query, truth = features(backbone, query_loader, bf16)
    right = knn_predict(query, bank, labels, classes, k) == truth
    totals = torch.stack([right.sum(), (truth >= 0).sum()]).double()  # below 0: no image
    dist.all_reduce(totals)
    return (100 * totals[0] / totals[1]).item()


# ------------------------------------------------------------ recipes
# --data names one, any flag overrides its entry. lr is for a batch of 256 and scales with --batch: glyphs' 32 images a
# step have 0.06. Glyphs: found by trial, for a few minutes on two CPU cores.
# CIFAR-10 and ImageNet: SimSiam's, but its predictor's lr is not fixed (§4.1 of DSSL); HVs by DSSL's released code.

RECIPES = {
    "glyphs": dict(
        arch="small", stem="cifar", size=24, crop=0.8, flip=False, blur=False, heavy="ra(2,9,paper)",
        batch=32, epochs=5, k=50, knn_every=1,
        lr=0.48, wd=5e-4, warmup=0.0, dim=512, layers=3),
    "cifar10": dict(
        arch="resnet18", stem="cifar", size=32, crop=0.2, flip=True, blur=False, heavy="ra(2,5)",
        batch=512, epochs=800, k=200, knn_every=10,
        lr=0.03, wd=5e-4, warmup=0.0, dim=2048, layers=2),
    "imagenet": dict(
        arch="resnet50", stem="imagenet", size=224, crop=0.2, flip=True, blur=True, heavy="0.9*ra(2,5)|0.1*jigsaw(4)",
        batch=512, epochs=100, k=200, knn_every=5,
        lr=0.05, wd=1e-4, warmup=0.0, dim=2048, layers=3),
}
MAY_CHANGE = ("data", "root", "out", "workers", "bf16", "k", "knn_every")  # when a run goes on; all else must agree


def positive(text):
    """An integer from 1 on. argparse puts the name of its type, this function's, into its messages."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def count(text):
    """An integer of 32 bits, from 0 on: no two have the same hash(), of which steps make their seeds."""
    if not 0 <= int(text) < 2**32:
        raise ValueError
    return int(text)


def nonnegative(text):
    """A finite number from 0 on."""
    if not 0 <= float(text) < math.inf:
        raise ValueError
    return float(text)


def parse_args(argv=None):
    """The complete settings, or an exit that says what to change."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], usage="%(prog)s [--FLAG VALUE ...]", allow_abbrev=False,
        add_help=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add, boolean = parser.add_argument, argparse.BooleanOptionalAction
    add("--data", default="glyphs", help="glyphs, cifar10, imagenet, or a folder of images")
    add("--recipe", choices=RECIPES, help="whose settings to take; a folder needs it")
    add("--root", default="data", help="the folder with cifar10/ and imagenet/ in it")
    add("--weights", nargs=4, metavar="W", type=nonnegative, default=[1.0, 0.0, 1.0, 0.0], help="alpha to delta, Eq. 6")
    add("--pairs", type=positive, default=1, help="pairs of SVs, their losses summed; 2 cost what DSSL does")
    add("--hv-from", choices=["sv", "image"], default="sv", help="make HVs of the SVs they learn from or of new ones")
    add("--out", help="folder to write into and to go on from; without it, a new one under runs/")
    add("--seed", type=count, default=0, help="seed of all that is random")
    add("--workers", type=count, default=8, help="processes that read images, for each rank")
    add("--bf16", action=boolean, default=torch.cuda.is_bf16_supported(including_emulation=False), help="train in bf16")

    add("--arch", choices=["small", "resnet18", "resnet34", "resnet50", "resnet101"], help="backbone")
    add("--stem", choices=["cifar", "imagenet"], help="3 x 3 and no max-pool, or 7 x 7 and max-pool")
    add("--size", type=positive, help="pixels of a view's side")
    add("--crop", type=nonnegative, help="smallest crop, as a share of the image's area")
    add("--flip", action=boolean, help="mirror SVs at random")
    add("--blur", action=boolean, help="blur SVs at random")
    add("--heavy", help="SV to HV: ra(n,m), ra(n,m,paper), ua, jigsaw(n); a+b: a, then b; 0.9*a|0.1*b: either")
    add("--batch", type=positive, help="images per step, over all ranks")
    add("--epochs", type=positive, help="passes over the images")
    add("--lr", type=nonnegative, help="learning rate for a batch of 256; it scales with the batch")
    add("--wd", type=nonnegative, help="weight decay")
    add("--warmup", type=nonnegative, help="epochs of linear warm-up before the cosine")
    add("--k", type=positive, help="neighbours of the kNN monitor")
    add("--knn-every", type=positive, help="epochs from one kNN monitor to the next")
    add("--dim", type=positive, help="features of the projections")
    add("--layers", type=positive, help="layers of the projector")
    known, _ = parser.parse_known_args(argv)  # a first time, for --data: its recipe gives the defaults of the rest
    recipe = known.recipe or known.data
    if recipe not in RECIPES:
        parser.error(f"--data {known.data} is none of {', '.join(RECIPES)}: for a folder, add --recipe and one of them")
    parser.set_defaults(recipe=recipe, **RECIPES[recipe])
    add("-h", "--help", action="help", help="show this, with the recipe of --data")
    args = parser.parse_args(argv)

    if not any(args.weights) or args.size < 8 or args.crop > 1 or args.warmup >= args.epochs:
        parser.error("--weights must not all be 0, --size must be 8 or more, --crop 1 or less, --warmup below --epochs")
    try:
        augment.parse_policy(args.heavy, args.size)
    except ValueError as error:
        parser.error(f"--heavy: {error}")
    return args


# ------------------------------------------------------------ run

def join():
    """Join torchrun's ranks or, where it did not start this process, a world of one → this rank's device."""
    cuda = torch.cuda.is_available()
    if not dist.is_initialized():  # as it is in a notebook that trains for the second time
        alone = {} if os.environ.get("WORLD_SIZE") else dict(store=dist.HashStore(), rank=0, world_size=1)
        dist.init_process_group("nccl" if cuda and dist.is_nccl_available() else "gloo", **alone)
    if not cuda:
        return torch.device("cpu")
    device = torch.device("cuda", dist.get_node_local_rank(0))
    torch.cuda.set_device(device)  # where processes are more than GPUs, torch says so here
    torch.backends.cudnn.benchmark = True  # nearly all batches have one shape: try what is fastest for it
    return device


def say(text, live=False):
    """Rank 0 prints for all, in ASCII. A live line is for terminals alone, where the next one takes its place."""
    terminal = os.isatty(1)
    if dist.get_rank() == 0 and (terminal or not live):
        print(f"{text:79}" if terminal else text, end="\r" if live else "\n", flush=True)


def report(history, epochs):
    """Print the last epoch's line, and warnings in words."""
    first, last = history[0], history[-1]
    line = f"epoch {last['epoch']:3d}/{epochs}"
    if "loss" in last:
        line += "  loss {loss:.4f}  std {std:.2f}  {images_per_s:,.0f} images/s  {seconds:.0f} s".format(**last)
    if "knn" in last:
        line += f"  kNN {last['knn']:.2f} %"
    say(line)
    if last.get("std", 1) < 0.2:
        say("WARNING: std is low: all images are being projected to one point (collapse)")
    late = last["epoch"] >= max(1, epochs / 10)
    if late and "knn" in last and 100 - last["knn"] > 0.95 * (100 - first["knn"]):  # less than 1/20 of the way is done
        say("WARNING: kNN is hardly above the untrained network's: nothing useful is being learnt")


def save(content, path):
    """All or nothing: into another file, which then replaces the old one."""
    data, part = io.BytesIO(), path.with_suffix(".part")
    torch.save(content, data)  # into memory: writing a file itself, torch does not say that the disk is full
    part.write_bytes(data.getbuffer())
    part.replace(path)


def load(path, settings, model, optimizer):
    """Take up what a run with these settings has saved there → its history, [] if there is none. Rank 0 reads it."""
    state = [dict(settings=settings, history=[])]  # of a run that begins
    if dist.get_rank() == 0 and path.exists():
        try:
            found = torch.load(path, map_location="cpu", weights_only=True)
            state = [{key: found[key] for key in ("settings", "history", "model", "optimizer")}]
        except Exception as error:  # a damaged file can make torch raise anything
            sys.exit(f"{path} is damaged, or not a checkpoint of ours ({type(error).__name__}): take another --out")
    dist.broadcast_object_list(state)
    state = state[0]
    saved = state["settings"]
    odd = [f"{key} {saved.get(key)}, not {value}" for key, value in settings.items() if value != saved.get(key)]
    if odd:
        sys.exit(f"{path} is of a run with {'; '.join(odd)}: take that, or another --out")
    if state["history"]:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    return state["history"]


def train(args):
    device = join()
    rank, world, script = dist.get_rank(), dist.get_world_size(), Path(__file__).stem
    out = Path(args.out or f"runs/{script}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}").expanduser()

    # data
    train_set, test_set = augment.load_data(args.data, args.root, args.size, download=world == 1)
    counts = [len(data.images) if data else 0 for data in (train_set, test_set)]
    if args.batch % world or not 2 * world <= args.batch <= counts[0]:
        sys.exit(f"--batch must divide by {world} ranks into 2 or more each, and be at most the {counts[0]} images")
    crops = 4 * args.pairs if args.hv_from == "image" else 2 * args.pairs
    share = dict(rank=rank, world=world, device=device, workers=args.workers)
    loader = augment.TrainLoader(train_set, args.batch, crops, args.size, (args.crop, 1), args.seed, **share)
    monitor = [augment.EvalLoader(data, 256, args.size, **share) for data in (train_set, test_set)] if test_set else []
    classes = max(1, len(train_set.classes))
    k = min(args.k, max(1, counts[0] // classes // 4))  # or images of a small class find too few of their own

    # model
    torch.manual_seed(args.seed)
    model = SimSiam(args).to(device, memory_format=torch.channels_last)  # 1.5 times as fast on CPU
    if device.type == "cuda" and world > 1:  # SyncBatchNorm exists on GPUs alone
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    elif device.type == "cuda":  # to debug the model, leave this out
        record_graphs(model, args, device)
    ddp = nn.parallel.DistributedDataParallel(model)
    ddp.broadcast_buffers = False  # once an epoch will do; the argument of this name is deprecated
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9, weight_decay=args.wd)

    # the run in --out, if there is one, goes on
    settings = {key: value for key, value in vars(args).items() if key not in MAY_CHANGE}
    settings |= dict(script=script, images=counts)
    history = load(out / "checkpoint.pt", settings, model, optimizer)  # an entry an epoch, the lines of log.jsonl
    if rank == 0:
        out.mkdir(parents=True, exist_ok=bool(args.out))  # a new folder must not be another run's
        (out / "settings.json").write_text(json.dumps(vars(args) | settings, indent=2))
    say(f"{script} on {args.data!a}: {counts[0]:,} images, {f'kNN with k {k}' if monitor else 'no labels, so no kNN'}")
    terms = zip(args.weights, ("SV <-> SV", "HV <-> HV", "SV <- HV", "HV <- SV"))
    loss = " + ".join(f"{weight:g} ({term})" for weight, term in terms if weight)
    say(f"loss {loss}, pairs {args.pairs}, heavy views {args.heavy if any(args.weights[1:]) else 'none'}")
    say(f"{args.arch} at {args.size} px, batch {args.batch}, lr {args.lr * args.batch / 256:g}, "
        f"{args.epochs} epochs of {len(loader)} steps, {world} x {device.type}")
    say(f"if it is interrupted, the same command with --out {str(out)!a} goes on")

    for epoch in range(len(history), args.epochs + 1):  # epoch 0 trains nothing: it measures the untrained network
        entry = dict(epoch=epoch)
        if epoch > 0:
            entry |= train_epoch(epoch, ddp, optimizer, loader, args, out)
        if monitor and (epoch % args.knn_every == 0 or epoch == args.epochs):
            say(f"epoch {epoch:3d}  the kNN monitor reads {sum(counts):,} images", live=epoch > 0)  # 0: also in logs
            entry["knn"] = knn_accuracy(model.backbone, *monitor, classes, k, args.bf16)
        history.append(entry)
        if rank == 0:
            report(history, args.epochs)
            backbone = {key: x.cpu().contiguous() for key, x in model.backbone.state_dict().items()}
            save(backbone, out / "backbone.pt")  # contiguous, not in channels_last
            (out / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in history))
            state = dict(settings=settings, history=history, model=model.state_dict(), optimizer=optimizer.state_dict())
            save(state, out / "checkpoint.pt")  # comes last: a run goes on after the epochs that this file knows

    say(f"complete: {str(out / 'backbone.pt')!a}")
    if monitor:
        say(f"python {str(Path(__file__).with_name('linear_eval.py'))!a} {str(out / 'backbone.pt')!a} "
            f"--data {args.data!a} --root {args.root!a} --recipe {args.recipe} --size {args.size}")


def main():
    args = parse_args()
    atexit.register(os._exit, 1)  # once an error is printed, this rank ends: NCCL's group would wait for the others
    try:
        train(args)
    except OSError as error:  # no data, a full disk; a worker's message is a traceback, whose last line says why
        sys.exit(f"{Path(__file__).name}: {(str(error) or repr(error)).splitlines()[-1]}")
    atexit.unregister(os._exit)
    dist.destroy_process_group()  # train()'s DDP is gone by now: with torch 2.11 the other order can wait for ever


if __name__ == "__main__":
    main()

"""SimSiam, and what DSSL makes of it: heavy augmentations help instead of wrecking it.

Two standard views (SV) of an image learn from each other, SV ↔ SV. A heavy view (HV, marked `hat`) is derived from
one SV, only ever learns from that SV, and is never a target itself: SV ← HV.

    python simsiam_dssl.py                                            letters and digits, on any machine, in minutes
    python simsiam_dssl.py --data cifar10 --weights 1 0 0 0           plain SimSiam on CIFAR-10
    torchrun --nproc_per_node=8 simsiam_dssl.py --data imagenet       DSSL on ImageNet

SimSiam: arXiv 2011.10566.   DSSL: "Directional Self-supervised Learning for Heavy Image Augmentations", CVPR 2022.
Dimensions: b images on this rank, v views, c channels, h × w pixels, d features, q queries, n bank, k neighbours.
"""
import argparse
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

    p, z: predictions and projections of two SVs, a pair of (b, d) each; p_hat, z_hat: those of the two HVs, each
    derived from the SV at its own place. A pair that no weight needs may be None. The default weights are DSSL (Eq. 5),
    (1, 0, 0, 0) is plain SimSiam. Each term is the mean over its pair, the scale of the authors' released code: a
    perfect DSSL loss is -2 (Algorithm 1 prints half of it).
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


# ------------------------------------------------------------------------------------------------- model


def make_backbone(arch, stem):
    """torchvision's ResNet without fc, (b, 3, h, w) → (b, d), and its d. Key names and shapes are torchvision's.

    stem "cifar", for images of 32 px or so: the first convolution is 3 × 3 with stride 1, and there is no max-pool.
    "small" is our own: four basic blocks of 32 to 256 channels behind a 3 × 3 convolution with stride 2, for CPUs.
    """
    if arch == "small":
        net = models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1])
        net.conv1, net.bn1, net.maxpool = nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.Identity()
        net.inplanes, d = 32, 256
        for i, width in enumerate((32, 64, 128, 256)):
            layer = net._make_layer(models.resnet.BasicBlock, width, 1, stride=1 if i == 0 else 2)
            setattr(net, f"layer{i + 1}", layer)
    else:
        net = getattr(models, arch)(zero_init_residual=stem == "imagenet")  # each block starts as the identity
        d = net.fc.in_features
        if stem == "cifar":
            net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    net.fc = nn.Identity()
    return net, d


class SimSiam(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.backbone, d = make_backbone(args.arch, args.stem)
        dim, narrow = args.dim, args.dim // 4  # the predictor is a bottleneck
        widths, layers = [d] + [dim] * args.layers, []
        for i in range(args.layers):
            layers += [nn.Linear(widths[i], dim, bias=False), nn.BatchNorm1d(dim), nn.ReLU(inplace=True)]
        self.projector = nn.Sequential(*layers[:-2], nn.BatchNorm1d(dim, affine=False))
        self.predictor = nn.Sequential(
            nn.Linear(dim, narrow, bias=False), nn.BatchNorm1d(narrow), nn.ReLU(inplace=True), nn.Linear(narrow, dim))

    def forward(self, v, v_hat):
        """Two tuples of views → what dssl_loss takes, and all projections (v, b, d) for the collapse monitor.

        One view at a time, SVs first: BN statistics are those of one view, as in the original. All views in one call:
        DDP wants one forward for each backward.
        """
        z = [self.projector(self.backbone(x)) for x in v + v_hat]
        p = [self.predictor(x) for x in z]
        n = len(v)
        return (p[:n], z[:n], p[n:], z[n:]), torch.stack(z).detach()


# ------------------------------------------------------------------------------------------------- recipes
# --data NAME brings its row, any flag overrides its entry. lr is for 256 images and scales with the batch. dim and
# layers are the projector's, k and knn_every (epochs) the monitor's. CIFAR-10 and ImageNet: the SimSiam paper's, which
# DSSL keeps; heavy views by DSSL's released code. Glyphs: found by trial, for a few minutes on two CPU cores.

RECIPES = {
    "glyphs": dict(
        arch="small", stem="cifar", size=24, crop=0.2, flip=False, blur=False, heavy="ra(2,5)",
        batch=64, epochs=6, lr=0.12, wd=5e-4, warmup=0.5, k=50, knn_every=1, dim=512, layers=2),
    "cifar10": dict(
        arch="resnet18", stem="cifar", size=32, crop=0.2, flip=True, blur=False, heavy="ra(2,5)",
        batch=512, epochs=800, lr=0.03, wd=5e-4, warmup=0, k=200, knn_every=10, dim=2048, layers=2),
    "imagenet": dict(
        arch="resnet50", stem="imagenet", size=224, crop=0.2, flip=True, blur=True, heavy="0.9*ra(2,5)|0.1*jigsaw(4)",
        batch=512, epochs=100, lr=0.05, wd=1e-4, warmup=0, k=200, knn_every=5, dim=2048, layers=3),
}

# ------------------------------------------------------------------------------------------------- kNN monitor


def nearest(query, bank, labels, k):
    """Similarities and labels of the k bank rows nearest to each query, (q, k) each; -inf where the bank is short.

    query (q, d) and bank (n, d) are ℓ2-normalised, labels (n,).
    """
    similarity, index = (query @ bank.T).float().topk(min(k, len(bank)))
    short = (0, k - similarity.shape[1])
    return F.pad(similarity, short, value=-torch.inf), F.pad(labels[index], short)


def vote(similarity, label, classes, t):
    """Each neighbour votes for its label with weight exp(similarity / t): (q, k) and (q, k) → (q,) labels."""
    votes = torch.zeros(len(label), classes, device=label.device)
    return votes.scatter_add_(1, label, (similarity / t).exp()).argmax(1)


def knn_predict(query, bank, labels, classes, k=200, t=0.1):
    """Weighted nearest-neighbour classification by cosine similarity (Wu et al., arXiv 1805.01978).

    query (q, d), bank (n, d), labels (n,) in [0, classes) → (q,) labels. k is clamped to the bank. Works in slices,
    so that the full q × n similarities are never in memory.
    """
    bank, k = F.normalize(bank, dim=1), min(k, len(bank))
    return torch.cat([vote(*nearest(q, bank, labels, k), classes, t) for q in F.normalize(query, dim=1).split(256)])


def all_rows(x):
    """(b, …) on each rank, b up to the rank → (sum of all b, …) on every rank, without gradient."""
    sizes = [torch.zeros(1, dtype=torch.long, device=x.device) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([len(x)], device=x.device))
    longest = max(sizes).item()
    parts = [x.new_empty(longest, *x.shape[1:]) for _ in sizes]
    dist.all_gather(parts, torch.cat([x, x.new_zeros(longest - len(x), *x.shape[1:])]))
    return torch.cat([part[:size] for part, size in zip(parts, sizes)])


@torch.no_grad()
def features(backbone, loader, bf16=False):
    """ℓ2-normalised features and labels of this rank's share of the images, (n, d) and (n,), with BN in eval mode."""
    device, was_training, out = next(backbone.parameters()).device, backbone.training, []
    backbone.eval()
    for x, y in loader:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            x = F.normalize(backbone(augment.normalize(x / 255)).float(), dim=1)
        out.append((x.half() if x.is_cuda else x, y))  # a bank of ImageNet's size takes 5 GB in half precision
    backbone.train(was_training)
    return [torch.cat(part) for part in zip(*out)]


@torch.no_grad()
def knn_accuracy(backbone, bank_loader, query_loader, classes, k=200, t=0.1, bf16=False):
    """kNN top-1 in percent over all queries of all ranks, the same number on every rank.

    Each rank keeps its share of the bank, finds its own k nearest for everyone's queries, and the best k of these
    world × k candidates vote. Every rank must hold the same weights and BN buffers (see sync_buffers).
    """
    (bank, labels), (mine, truth) = (features(backbone, loader, bf16) for loader in (bank_loader, query_loader))
    k = min(k, len(all_rows(labels)))
    query, truth = all_rows(mine), all_rows(truth)
    right = 0
    for q, y in zip(query.split(256), truth.split(256)):
        similarity, label = (
            rearrange(all_rows(x[None]), "rank q k -> q (rank k)") for x in nearest(q, bank, labels, k))
        similarity, best = similarity.topk(k)
        right += (vote(similarity, label.gather(1, best), classes, t) == y).sum()
    return 100 * right.item() / len(truth)


def sync_buffers(model):
    """Rank 0's BN statistics for everybody: without SyncBN each rank has its own, and would be another network."""
    for buffer in model.buffers():
        dist.broadcast(buffer, 0)


# ------------------------------------------------------------------------------------------------- train


class Parser(argparse.ArgumentParser):
    def error(self, message):  # one line, and under torchrun from one rank
        self.exit(2, f"{self.prog}: {message}\n" if os.environ.get("RANK", "0") == "0" else None)


def number(kind, low, high=math.inf):
    """A parser of one int or float from low to high."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high or value == math.inf:
            raise argparse.ArgumentTypeError(f"must be from {low} to {high}, not {text}")
        return value
    parse.__name__ = kind.__name__  # argparse names it where the text is no number
    return parse


def fail(message):
    """End with exit code 1 and one line, printed by the first rank of each machine."""
    sys.exit(f"{Path(__file__).name}: {message}" if os.environ.get("LOCAL_RANK", "0") == "0" else 1)


def parse_args(argv=None):
    """The complete settings, recipe filled in, or an exit with one line that says what to change."""
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    recipe = parser.add_argument_group("recipe", "the defaults are those of --data").add_argument
    add("--data", default="glyphs", help="glyphs (default), cifar10, imagenet, or the path of a folder of images")
    add("--recipe", choices=RECIPES, help="whose settings to take, where not those of --data; a folder needs it")
    add("--root", default="data", help="the folder with cifar10/ and imagenet/ in it (default: data)")
    add("--weights", nargs=4, type=number(float, 0), default=[1.0, 0.0, 1.0, 0.0], metavar=tuple("ABCD"),
        help="alpha, beta, gamma, delta of Eq. 6 (default: 1 0 1 0, DSSL)")
    add("--pairs", type=number(int, 1), default=1, help="pairs of SVs an image; 2 with 1 0 0 0 costs what DSSL does")
    add("--hv-from", choices=["sv", "image"], default="sv", help="make HVs of their own SVs (default) or of fresh ones")
    add("--out", help="folder to write into, and to go on from (default: under runs/, named by the settings)")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="of all that is random (default: 0)")
    add("--workers", type=number(int, 0), default=8, help="processes a rank that read streamed images (default: 8)")
    add("--bf16", action=argparse.BooleanOptionalAction,
        default=torch.cuda.is_bf16_supported(including_emulation=False),
        help="compute in bfloat16 (default: on GPUs that can)")
    add("--compile", action="store_true", help="torch.compile the backbone, for one GPU (SyncBN breaks the graph)")
    recipe("--arch", choices=["small", "resnet18", "resnet34", "resnet50", "resnet101"], help="backbone")
    recipe("--stem", choices=["cifar", "imagenet"], help="3 × 3 convolution and no max-pool, or 7 × 7 and max-pool")
    recipe("--size", type=number(int, 8), help="pixels a side of a view")
    recipe("--crop", type=number(float, 0.01, 1), help="smallest crop, as a share of the image's area")
    recipe("--batch", type=number(int, 2), help="images a step, over all ranks")
    recipe("--epochs", type=number(int, 1), help="passes over the images")
    recipe("--lr", type=number(float, 0), help="learning rate for a batch of 256; it scales with the batch")
    recipe("--wd", type=number(float, 0), help="weight decay")
    recipe("--warmup", type=number(float, 0), help="epochs of linear warm-up before the cosine")
    recipe("--flip", action=argparse.BooleanOptionalAction, help="mirror SVs at random")
    recipe("--blur", action=argparse.BooleanOptionalAction, help="blur SVs at random")
    recipe("--heavy", metavar="POLICY", help="ra(n,m), ra(n,m,paper), ua, jigsaw(n), a+b (both), 0.9*a|0.1*b (either)")
    recipe("--k", type=number(int, 1), help="neighbours of the kNN monitor")
    recipe("--knn-every", type=number(int, 1), help="epochs from one kNN monitor to the next")
    recipe("--dim", type=number(int, 4), help="features of the projector")
    recipe("--layers", type=number(int, 1), help="layers of the projector")
    args = parser.parse_args(argv)

    args.recipe = args.recipe or args.data
    if args.recipe not in RECIPES:
        parser.error(f"--data {args.data} is none of {', '.join(RECIPES)}: for a folder, add --recipe with one of them")
    given = [f"{key}{value}" for key, value in vars(args).items() if value != parser.get_default(key)
             and key not in ("data", "recipe", "root", "weights", "heavy", "workers", "compile")]
    for key, value in RECIPES[args.recipe].items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    world = int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ else 1
    if not any(args.weights):
        parser.error("--weights are all 0: there is nothing to learn; DSSL is 1 0 1 0")
    if args.batch % world or args.batch < 2 * world:
        parser.error(f"--batch {args.batch} does not divide by the {world} ranks into 2 or more images each")
    if args.warmup >= args.epochs:
        parser.error(f"--warmup {args.warmup:g} is not shorter than --epochs {args.epochs}")
    try:
        augment.parse_policy(args.heavy, args.size)
    except ValueError as error:
        parser.error(f"--heavy: {error}")
    if not args.out:  # a folder of its own for every setting that was given
        heavy = args.heavy.replace("+", "-then-").replace("|", "-or-") if any(args.weights[1:]) else ""
        name = [Path(__file__).stem, Path(args.data).name, *(f"{w:g}" for w in args.weights), heavy, *given]
        args.out = "runs/" + re.sub(r"[^\w.]+", "-", "-".join(name)).strip("-")
    return args


TERMS = ("SV ↔ SV", "HV ↔ HV", "SV ← HV", "HV ← SV")  # of Eq. 6, in the order of its weights


def in_words(args):
    """What the weights amount to, such as "DSSL: SV ↔ SV, SV ← HV"."""
    names = {(1, 0, 1, 0): "DSSL: ", (1, 0, 0, 0): "plain: ", (0, 1, 0, 0): "all heavy: ", (1, 1, 1, 1): "all alike: "}
    terms = ", ".join(("" if w == 1 else f"{w:g} ") + term for w, term in zip(args.weights, TERMS) if w)
    heavy = f", heavy {args.heavy}" * any(args.weights[1:])
    return names.get(tuple(args.weights), "") + terms + f", {args.pairs} pairs" * (args.pairs > 1) + heavy


def write(path, content):
    """All or nothing: text, or what torch.save takes, goes into another file, which then replaces the old one."""
    part, data = path.with_name(path.name + ".part"), io.BytesIO()
    data.write(content.encode()) if isinstance(content, str) else torch.save(content, data)
    try:
        with open(part, "wb") as file:
            file.write(data.getbuffer())
            file.flush()
            os.fsync(file.fileno())  # the content is on the disk before the name is
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise OSError(f"cannot write {path} ({error.strerror}); what was there before is still there") from None


def on_signal(action):
    """What SIGTERM (a cluster, torchrun) and SIGINT (Ctrl-C) do from here on."""
    for sent in (signal.SIGTERM, signal.SIGINT):
        signal.signal(sent, action)


def join():
    """→ rank, world, device. One process is a world of one: the same path on CPU, on one GPU and under torchrun."""
    torchrun = "RANK" in os.environ
    rank, world, local = (int(os.environ[k]) for k in ("RANK", "WORLD_SIZE", "LOCAL_RANK")) if torchrun else (0, 1, 0)
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    cuda = device.type == "cuda"
    if cuda and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > torch.cuda.device_count():
        fail(f"more processes than the {torch.cuda.device_count()} GPUs here: lower --nproc_per_node")
    if cuda:
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True  # nearly all batches have one shape: try what is fastest for it
    store = next(dist.rendezvous("env://"))[0] if torchrun else dist.HashStore()
    if os.environ.get("LOCAL_WORLD_SIZE") == str(world):  # one machine, where torchrun keeps its store when it restarts
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)  # ranks: hide the dead ones'
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, rank=rank, world_size=world)
    return rank, world, device


def claim(out, settings):
    """Make and lock the run's folder → the state saved there or None, and the lock, to keep for as long as the run lasts.

    Fails where another process has the lock, where the folder holds a run with other settings, or its state is broken.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / ".lock", "w")
    except OSError as error:
        fail(f"cannot write into --out {out}: {error.strerror}")
    if os.name == "posix":  # the system frees the lock however this process ends
        import fcntl
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            fail(f"another run is writing into {out}: wait for its end, or take another --out")
        except OSError:  # a file system without locks
            pass
    if not (out / "checkpoint.pt").exists():
        return None, lock
    try:
        state = torch.load(out / "checkpoint.pt", map_location="cpu", weights_only=True)
        there = {key: state["settings"].get(key) for key in settings}
    except Exception as error:  # garbage can make the unpickler raise anything
        fail(f"{out}/checkpoint.pt cannot be read ({type(error).__name__}): remove it, or take another --out")
    for key in settings:
        if settings[key] != there[key]:
            fail(f"{out} holds a run with {key} {there[key]}, not {settings[key]}: take that, or another --out")
    return state, lock


def train(args):
    rank, world, device = join()
    cuda, say = device.type == "cuda", print if rank == 0 else lambda *_, **__: None
    on_signal(signal.SIG_DFL)  # until the first step, just end

    # output: a folder that holds this very run, or none yet; rank 0 alone reads and writes it
    out, settings = Path(args.out), {"script": Path(__file__).stem} | vars(args)
    for key in ("root", "out", "workers", "compile"):  # these change nothing, or no more than rounding
        del settings[key]
    state, lock = claim(out, settings) if rank == 0 else (None, None)
    everyone = [state]
    dist.broadcast_object_list(everyone, device=torch.device("cpu"))

    # data
    try:
        train_set, test_set = augment.load_data(args.data, args.root, args.size, download=world == 1)
    except (ValueError, OSError) as error:
        fail(error)
    sizes = torch.tensor([[len(s.images) if s else 0 for s in (train_set, test_set)]])
    if (all_rows(sizes) != sizes).any():
        fail(f"the ranks have different images, here {sizes.tolist()[0]}: give every machine the same data")
    if args.batch > len(train_set.images):
        fail(f"--batch {args.batch} is larger than the {len(train_set.images)} training images: lower it")
    if test_set and len(test_set.images) < world:
        fail(f"{world} ranks, but {len(test_set.images)} test images: use fewer ranks")
    alpha, beta, gamma, delta = args.weights
    use_sv, use_hv, n = bool(alpha or gamma or delta), bool(beta or gamma or delta), 2 * args.pairs
    crops = 2 * n if use_sv and use_hv and args.hv_from == "image" else n  # then HVs start from SVs of their own
    heavy = augment.parse_policy(args.heavy, args.size)
    share = dict(rank=rank, world=world, device=device, workers=args.workers)
    loader = augment.TrainLoader(train_set, args.batch, crops, args.size, (args.crop, 1), args.seed, **share)
    if test_set:
        monitor = [augment.EvalLoader(s, 256, args.size, **share) for s in (train_set, test_set)]

    # model
    torch.manual_seed(args.seed)
    model = SimSiam(args).to(device, memory_format=torch.channels_last)  # 1.5 times as fast on CPU
    if cuda and world > 1:  # SyncBatchNorm exists on GPUs alone
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for net in model.modules():
        if args.compile and isinstance(net, models.ResNet):
            net.compile()
    ddp = nn.parallel.DistributedDataParallel(model)
    ddp.broadcast_buffers = False  # at every forward; sync_buffers does it before anyone looks
    base_lr = args.lr * args.batch / 256
    optimizer = torch.optim.SGD(model.parameters(), base_lr, momentum=0.9, weight_decay=args.wd)

    # progress: with the model and the optimizer, all that a run needs to go on
    used = {term: unit for term, unit, weight in zip(TERMS, torch.eye(4).tolist(), args.weights) if weight}
    meters = torch.zeros(2 + len(used), dtype=torch.float64, device=device)  # loss, std and terms, summed over an epoch
    steps = len(loader)
    total_steps, warm_steps = steps * args.epochs, args.warmup * steps
    step, history, saved_at, stop = 0, [], time.time(), []  # stop: the signals that have come
    if state := everyone.pop():
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, history = state["step"], state["history"]
        meters += state["meters"].to(device)  # a mean over the ranks, however many there were
        del state

    def require_finite(what, tensors):
        if not all(x.isfinite().all() for x in tensors):
            lr = optimizer.param_groups[0]["lr"]
            fail(f"{what} is not finite by step {step}, lr {lr:g}: lower --lr; {out} has the last good state")

    def totals():
        dist.all_reduce(total := meters.clone())
        require_finite("the loss", [total])
        return total

    def checkpoint():
        nonlocal saved_at
        total, saved_at = totals(), time.time()
        sync_buffers(model)
        if rank == 0:
            state = model.state_dict()
            require_finite("a weight", state.values())
            backbone = {key: value.cpu().contiguous() for key, value in model.backbone.state_dict().items()}
            write(out / "backbone.pt", backbone)
            write(out / "checkpoint.pt", dict(
                settings=settings, step=step, history=history, meters=total / world, model=state,
                optimizer=optimizer.state_dict()))

    def asked():
        """Has any rank got a signal, and does rank 0 want a checkpoint? On the host: nothing waits for the GPU."""
        due = rank == 0 and time.time() - saved_at > 600
        dist.all_reduce(both := torch.tensor([stop[0] if stop else 0, due]), dist.ReduceOp.MAX)
        return both.tolist()

    def end(signal_number):
        say(f"stopped after step {step} of {total_steps}; the same command goes on from here")
        sys.exit(128 + signal_number)

    def report(epoch, **entry):
        line = f"epoch {epoch:3d}/{args.epochs}"
        if epoch:
            line += "  loss {loss:.4f}  std {std:.2f}  {images_per_s:,.0f} images/s  {seconds:.0f} s".format(**entry)
        measure = epoch % args.knn_every == 0 or epoch == args.epochs
        if measure:
            checkpoint()
        if measure and test_set:
            on_signal(signal.SIG_DFL)  # the monitor may take minutes, and a signal need not wait for it
            if sent := asked()[0]:
                end(sent)
            entry["knn"] = knn_accuracy(model.backbone, *monitor, len(train_set.classes), args.k, bf16=args.bf16)
            line += f"  kNN {entry['knn']:.2f} %" + " (untrained)" * (epoch == 0)
        history.append(dict(epoch=epoch, **entry))
        if entry.get("unreadable"):
            line += f"  {entry['unreadable']} images cannot be read"
        if epoch or test_set:
            say(line, flush=True)
        if entry.get("std", 1) < 0.2:
            say("WARNING: the std is low: all images are being projected to one point (collapse)")
        if epoch >= max(1, args.epochs / 10) and entry.get("knn", math.inf) < history[0].get("knn", 0) + 2:
            say("WARNING: kNN is not clearly above the untrained network's: nothing useful is being learnt")
        if rank == 0:
            write(out / "log.jsonl", "".join(json.dumps(entry) + "\n" for entry in history))

    say(f"{settings['script']} on {args.data} ({len(train_set.images):,} images), recipe {args.recipe}, {in_words(args)}\n"
        f"{args.arch} at {args.size} px, batch {args.batch}, lr {base_lr:g}, wd {args.wd:g}, {args.epochs} epochs of "
        f"{steps} steps, {world} × {device.type}, writing into {out}", flush=True)
    if not test_set:
        say("no labels: no kNN monitor")
    if step:
        say(f"going on after step {step} of {total_steps}")
    if not history:
        report(epoch=0)

    for epoch in range(len(history) - 1, args.epochs):
        on_signal(lambda number, _: stop.append(number))  # the step under way ends first
        loader.set_epoch(epoch, first=step - epoch * steps)
        start, first, rate = time.time(), step, 0
        for batch, _ in loader:
            torch.manual_seed(hash((args.seed, step, rank)))  # so that nothing random has to be saved
            lr = base_lr * min(1, (step + 1) / max(1, warm_steps))
            lr *= (1 + math.cos(math.pi * max(0, step - warm_steps) / (total_steps - warm_steps))) / 2
            for group in optimizer.param_groups:
                group["lr"] = lr

            # the first m SVs are forwarded, the last m made heavy: the same ones, unless crops were made for both
            sv = augment.standard(rearrange(batch, "b v c h w -> (v b) c h w"), args.flip, args.blur)
            m = n * len(batch)
            v = augment.normalize(sv[:m]).chunk(n) if use_sv else ()
            hv = heavy(sv[-m:]).chunk(n) if use_hv else ()
            v_hat = tuple(augment.normalize(x) for x in hv)
            if step == 0 and rank == 0:
                rows = {f"SV {i}": x[:10] for i, x in enumerate(sv.chunk(crops), 1)}
                rows |= {f"HV {i}": x[:10] for i, x in enumerate(hv, 1)}
                augment.draw_views(rows, out / "views.png", scale=max(1, 96 // args.size))

            with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
                outputs, z = ddp(v, v_hat)
            pairs = [[o[k : k + 2] for o in outputs] for k in range(0, n, 2)]  # of each pair what dssl_loss takes
            loss = sum(dssl_loss(*pair, weights=args.weights) for pair in pairs)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

            step += 1
            with torch.no_grad():  # for the log: std is 1 in health and 0 in collapse; each term by itself
                std = F.normalize(z.float(), dim=-1).std(1).mean() * z.shape[-1] ** 0.5
                terms = [sum(dssl_loss(*pair, weights=unit) for pair in pairs) for unit in used.values()]
                meters += torch.stack([loss, std, *terms])
            rate = (step - first) * args.batch / (time.time() - start)
            if sys.stdout.isatty() and step % 10 == 0:
                minutes = (total_steps - step) * args.batch / rate / 60
                say(f"epoch {epoch + 1:3d}/{args.epochs}  step {step % steps}/{steps}  {rate:,.0f} images/s  "
                    f"{minutes:.0f} min left    ", end="\r", flush=True)
            if step % 50 == 0:
                totals()
            sent, due = asked()
            if sent or due:
                checkpoint()
            if sent:
                end(sent)

        dist.all_reduce(unreadable := torch.tensor(loader.unreadable))
        loss, std, *terms = (totals() / (steps * world)).tolist()
        report(epoch + 1, loss=loss, terms=dict(zip(used, terms)), std=std,
               lr=optimizer.param_groups[0]["lr"], images_per_s=rate, seconds=time.time() - start,
               unreadable=unreadable.item())
        meters.zero_()

    checkpoint()
    say(f"the backbone is in {out}/backbone.pt")
    if test_set:
        say("its linear evaluation:", shlex.join([
            "python", "linear_eval.py", f"{out}/backbone.pt", "--data", args.data, "--root", args.root,
            "--recipe", args.recipe, "--size", f"{args.size}"]))
    del ddp  # before its process group: with torch 2.11 the other order can wait for ever
    dist.destroy_process_group()


if __name__ == "__main__":
    try:
        train(parse_args())
    except OSError as error:  # a disk that is full or gone; the last line, since a worker's error brings its traceback
        sys.exit(f"{Path(__file__).name}: {(str(error) or repr(error)).splitlines()[-1]}")

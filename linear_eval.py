"""Linear evaluation: a linear classifier on a frozen backbone, whatever trained it.

    python linear_eval.py runs/.../backbone.pt --data cifar10
    torchrun --nproc_per_node=8 linear_eval.py runs/.../backbone.pt --data imagenet

The backbone is any state dict with torchvision's ResNet keys, with or without fc; which ResNet it is and which stem it
has are read off its shapes. It is in eval mode throughout, and checked at the end to be what it was. The last line
printed is the result as JSON: top-1 and top-5 in percent over all test images, after the last epoch.
"""
import argparse
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torchvision import models

import augment

# --protocol names an optimizer and its settings; any flag overrides its entry. lr is for a batch of 256.
#   sgd:  CIFAR-10 by DSSL's released code: SGD at 30, a tenth of it after 60 % and after 80 % of the epochs
#   lars: ImageNet by the paper's App. A.3: LARS at 0.1 (1.6 for a batch of 4096), cosine
#   sgd-linear: the same for SimCLR: SGD, lr falling linearly to 0
PROTOCOLS = {
    "sgd": dict(batch=256, epochs=100, lr=30.0),
    "lars": dict(batch=4096, epochs=90, lr=0.1),
    "sgd-linear": dict(batch=4096, epochs=90, lr=0.1),
}
RECIPES = {  # size of the images, smallest crop of them to train on, mirrored or not, and the protocol
    "glyphs": dict(size=24, scale=0.8, flip=False, protocol="sgd", epochs=30, lr=0.3),
    "cifar10": dict(size=32, scale=0.8, flip=True, protocol="sgd"),
    "imagenet": dict(size=224, scale=0.08, flip=True, protocol="lars"),
}


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


class LARS(torch.optim.SGD):
    """SGD with steps in proportion to the weights: lr · 0.001 · ‖w‖ / ‖g‖ for each tensor (arXiv 1708.03888).

    g is the gradient with weight decay. Tensors with fewer than two dimensions (biases, BN) get neither.
    """

    def __init__(self, params, lr, momentum, weight_decay):
        super().__init__(params, lr, momentum=momentum)
        self.decay = weight_decay

    @torch.no_grad()
    def step(self):
        for w in (w for group in self.param_groups for w in group["params"] if w.grad is not None and w.ndim > 1):
            g = w.grad.add_(w, alpha=self.decay)
            trust = 0.001 * w.norm() / g.norm()
            g.mul_(torch.where(trust.isfinite() & (trust > 0), trust, 1))
        super().step()


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


def load_backbone(path):
    """A state dict's file → (network in eval mode, features d). Raises ValueError naming what does not fit."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except Exception as error:  # garbage can make the unpickler raise anything
        raise ValueError(f"{path} is no file of weights ({type(error).__name__})") from None
    if not isinstance(state, dict) or not all(torch.is_tensor(value) for value in state.values()):
        raise ValueError(f"{path} is no state dict of a backbone; a run writes one as backbone.pt")
    def shapes(tensors):  # num_batches_tracked, which some weights lack, counts for nothing in eval mode
        return {key: x.shape for key, x in tensors.items() if not str(key).endswith("num_batches_tracked")}

    state = {key: value for key, value in state.items() if not str(key).startswith("fc.")}
    for arch in ("small", "resnet18", "resnet34", "resnet50", "resnet101"):
        for stem in ("cifar", "imagenet"):
            with torch.device("meta"):  # shapes alone
                fits = shapes(make_backbone(arch, stem)[0].state_dict()) == shapes(state)
            if fits:
                net, d = make_backbone(arch, stem)
                net.load_state_dict(state, strict=False)
                return net.eval().requires_grad_(False), d
    raise ValueError(f"{path} fits no ResNet-18, 34, 50 or 101 with torchvision's keys, with or without the CIFAR stem")


def parse_args(argv=None):
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("backbone", help="the file of its weights: backbone.pt of a run, or any with torchvision's keys")
    add("--data", default="glyphs", help="glyphs (default), cifar10, imagenet, or the path of a folder of images")
    add("--recipe", choices=RECIPES, help="whose size and crops to take, where not those of --data; a folder needs it")
    add("--root", default="data", help="the folder with cifar10/ and imagenet/ in it (default: data)")
    add("--protocol", choices=PROTOCOLS, help="optimizer and schedule (default: sgd, for ImageNet lars)")
    add("--size", type=number(int, 8), help="pixels a side (default: the recipe's)")
    add("--batch", type=number(int, 1), help="images a step, over all ranks (default: the protocol's)")
    add("--epochs", type=number(int, 1), help="passes over the images (default: the protocol's)")
    add("--lr", type=number(float, 0), help="learning rate for a batch of 256; it scales with the batch")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="of all that is random (default: 0)")
    add("--workers", type=number(int, 0), default=8, help="processes a rank that read streamed images (default: 8)")
    add("--bf16", action=argparse.BooleanOptionalAction,
        default=torch.cuda.is_bf16_supported(including_emulation=False),
        help="compute in bfloat16 (default: on GPUs that can)")
    args = parser.parse_args(argv)
    if (args.recipe or args.data) not in RECIPES:
        parser.error(f"--data {args.data} is none of {', '.join(RECIPES)}: for a folder, add --recipe with one of them")
    recipe = RECIPES[args.recipe or args.data]
    protocol = PROTOCOLS[args.protocol or recipe["protocol"]]
    for key, value in (recipe | protocol if args.protocol else protocol | recipe).items():  # what was asked for wins
        if getattr(args, key, None) is None:
            setattr(args, key, value)
    world = int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ else 1
    if args.batch % world:
        parser.error(f"--batch {args.batch} does not divide by the {world} ranks")
    return args


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


def train(args):
    rank, world, device = join()
    say = print if rank == 0 else lambda *_, **__: None
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C just ends

    try:
        backbone, d = load_backbone(args.backbone)
        train_set, test_set = augment.load_data(args.data, args.root, args.size, download=world == 1)
    except (ValueError, OSError) as error:
        fail(error)
    if not test_set:
        fail(f"--data {args.data} has no labels: linear evaluation needs train/<class>/ and val/<class>/")
    if args.batch > len(train_set.images):
        fail(f"--batch {args.batch} is larger than the {len(train_set.images)} training images: lower it")
    share = dict(rank=rank, world=world, device=device, workers=args.workers)
    loader = augment.TrainLoader(train_set, args.batch, 1, args.size, scale=(args.scale, 1), seed=args.seed, **share)
    test_loader = augment.EvalLoader(test_set, 256, args.size, **share)
    steps, classes = len(loader), len(train_set.classes)

    torch.manual_seed(args.seed)
    backbone = backbone.to(device, memory_format=torch.channels_last)
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    linear = nn.Linear(d, classes).to(device)
    nn.init.normal_(linear.weight, std=0.01)
    nn.init.zeros_(linear.bias)
    ddp = nn.parallel.DistributedDataParallel(linear)
    lr = args.lr * args.batch / 256
    optimizer = LARS if args.protocol == "lars" else torch.optim.SGD
    optimizer = optimizer(linear.parameters(), lr, momentum=0.9, weight_decay=0)
    schedule = {
        "sgd": lambda t: 0.1 ** ((t >= 0.6) + (t >= 0.8)),
        "lars": lambda t: (1 + math.cos(math.pi * t)) / 2,
        "sgd-linear": lambda t: 1 - t,
    }[args.protocol]

    @torch.no_grad()
    def features(x):
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            parts = augment.normalize(x).split(256)  # in eval mode they give what the whole batch would, in less memory
            return torch.cat([backbone(part).float() for part in parts])

    say(f"{args.backbone} ({d} features) on {args.data}: {len(train_set.images):,} images, {len(test_set.images):,} to "
        f"test, {args.protocol}, {world} × {device.type}, batch {args.batch}, lr {lr:g}, {args.epochs} epochs", flush=True)
    best = 0
    for epoch in range(args.epochs):
        loader.set_epoch(epoch)
        start, total = time.time(), torch.zeros((), device=device)
        for step, (crops, labels) in enumerate(loader, epoch * steps):
            torch.manual_seed(hash((args.seed, step, rank)))
            for group in optimizer.param_groups:
                group["lr"] = lr * schedule(step / (args.epochs * steps))
            x = crops[:, 0] / 255
            loss = F.cross_entropy(ddp(features(augment.flip(x) if args.flip else x)), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach()

        right = torch.zeros(3, dtype=torch.float64, device=device)  # among the first 1, among the first 5, all
        with torch.no_grad():
            for x, labels in test_loader:
                hit = linear(features(x / 255)).topk(min(5, classes)).indices == labels[:, None]
                right += torch.stack([hit[:, 0].sum(), hit.sum(), torch.tensor(len(hit), device=device)])
        dist.all_reduce(right)
        dist.all_reduce(total)
        top1, top5, _ = (100 * right / right[2]).tolist()
        best = max(best, top1)
        say(f"epoch {epoch + 1:3d}/{args.epochs}  loss {total.item() / steps / world:.4f}  top-1 {top1:.2f} %  "
            f"top-5 {top5:.2f} %  {time.time() - start:.0f} s", flush=True)
        if not math.isfinite(total.item()):
            fail(f"the loss is {total.item()}: lower --lr")

    if not all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items()):
        fail("the backbone has changed: this result is not a linear evaluation")
    result = dict(top1=round(top1, 3), top5=round(top5, 3), best_top1=round(best, 3), images=int(right[2]))
    say(json.dumps(result | {key: value for key, value in vars(args).items() if key not in ("root", "recipe", "workers")}))
    del ddp  # before its process group: with torch 2.11 the other order can wait for ever
    dist.destroy_process_group()


if __name__ == "__main__":
    try:
        train(parse_args())
    except OSError as error:  # a disk that is full or gone; the last line, since a worker's error brings its traceback
        sys.exit(f"{Path(__file__).name}: {(str(error) or repr(error)).splitlines()[-1]}")

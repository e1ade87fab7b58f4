"""Linear evaluation: a linear classifier on a frozen backbone, whatever trained it.

    python linear_eval.py runs/.../backbone.pt --data cifar10
    torchrun --nproc_per_node=8 linear_eval.py runs/.../backbone.pt --data imagenet

The backbone is a state dict with torchvision's ResNet keys; its shapes tell which ResNet and which stem. The last line
printed is the result as JSON: top-1 and top-5 in percent over all test images, after the last epoch.
"""
import argparse
import atexit
import json
import math
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torchvision import models
from torchvision.models.resnet import BasicBlock, ResNet

import augment

RECIPES = {  # size of the images, smallest crop of them to train on, mirrored or not
    "glyphs": dict(size=24, crop=0.8, flip=False),
    "cifar10": dict(size=32, crop=0.8, flip=True),
    "imagenet": dict(size=224, crop=0.08, flip=True),
}
PROTOCOLS = {  # an optimizer, its schedule and their settings; lr is for a batch of 256
    "sgd": dict(batch=256, epochs=100, lr=30.0),  # CIFAR-10, DSSL's released code: a tenth after 60 %, again after 80 %
    "lars": dict(batch=4096, epochs=90, lr=0.1),  # ImageNet, the paper's App. A.3: 1.6 for a batch of 4096, cosine
    "sgd-linear": dict(batch=4096, epochs=90, lr=0.1),  # the same for SimCLR, falling linearly to 0
}
OWN = {"glyphs": dict(epochs=30, lr=100.0), "cifar10": {}}  # data whose default is sgd, and what differs from it there


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


class LARS(torch.optim.SGD):
    """SGD with steps in proportion to the weights: lr · 0.001 · ‖w‖ / ‖g‖ for each tensor (arXiv 1708.03888).

    g is the gradient with weight decay. Tensors with fewer than two dimensions (biases, BN) get neither.
    """

    def __init__(self, params, lr, momentum, weight_decay):
        super().__init__(params, lr, momentum=momentum)
        self.decay = weight_decay

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for w in group["params"]:
                if w.grad is not None and w.ndim > 1:
                    g = w.grad.add_(w, alpha=self.decay)
                    trust = 0.001 * w.norm() / g.norm()
                    g.mul_(torch.where(trust.isfinite() & (trust > 0), trust, 1))
        super().step()


def shapes(state):
    """What tells one ResNet from another, without fc, and without counters, which some weights lack."""
    return {key: x.shape for key, x in state.items() if not key.startswith("fc.") and not key.endswith("_tracked")}


def load_backbone(path):
    """A state dict's file → (network in eval mode, features d). Raises OSError naming what does not fit."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        found = shapes(state)
    except Exception as error:  # garbage can make the unpickler raise anything
        raise OSError(f"{path} is no backbone's weights ({type(error).__name__}): give a run's backbone.pt") from None
    for arch in ("small", "resnet18", "resnet34", "resnet50", "resnet101"):  # whichever has these shapes it is
        for stem in ("cifar", "imagenet"):
            net, d = make_backbone(arch, stem)
            if found == shapes(net.state_dict()):
                net.load_state_dict(state, strict=False)
                return net.eval().requires_grad_(False), d
    raise OSError(f"{path} fits neither our small net nor a ResNet-18, 34, 50 or 101, with or without the CIFAR stem")


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
    """The settings, or an exit that says what to change. What goes by the number of images is settled by `choose`."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s BACKBONE [--FLAG VALUE ...]", description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    add, boolean = parser.add_argument, argparse.BooleanOptionalAction
    add("backbone", help="the file of its weights: backbone.pt of a run, or any with torchvision's keys")
    add("--data", default="glyphs", help="glyphs (the default), cifar10, imagenet, or a folder of images")
    add("--recipe", choices=RECIPES, help="whose size and crops to take (default: --data's); a folder needs it")
    add("--root", default="data", help="the folder with cifar10/ and imagenet/ in it (default: %(default)s)")
    add("--size", type=positive, help="pixels of a side (default: glyphs 24, cifar10 32, imagenet 224)")
    add("--protocol", choices=PROTOCOLS, help="optimizer and schedule (default: sgd, for 409,600 images or more lars)")
    add("--batch", type=positive, help="images per step, over all ranks (default: the protocol's, less for few images)")
    add("--epochs", type=positive, help="passes over the images (default: the protocol's, for glyphs 30)")
    add("--lr", type=nonnegative, help="learning rate for a batch of 256, with which it scales (default: output says)")
    add("--seed", type=count, default=0, help="seed of all that is random (default: %(default)s)")
    add("--workers", type=count, default=8, help="processes that read images, for each rank (default: %(default)s)")
    add("--bf16", action=boolean, default=torch.cuda.is_bf16_supported(including_emulation=False), help="in bf16")
    args = parser.parse_args(argv)
    args.recipe = args.recipe or args.data
    if args.recipe not in RECIPES:
        parser.error(f"--data {args.data} is none of {', '.join(RECIPES)}: for a folder, add --recipe with one of them")
    vars(args).update(RECIPES[args.recipe] | ({"size": args.size} if args.size else {}))
    if args.size < 8:
        parser.error("--size must be 8 or more")
    return args


def choose(args, images, world):
    """Settle protocol, batch, epochs and lr, and the norm that divides the features (None: their own).

    Flags come first, then the data's OWN, then the protocol. LARS moves weights by a thousandth a step, and so takes
    thousands of steps. Too few images for it get SGD, 10 steps an epoch or more, and features of norm 1, for lr 30.
    """
    own, args.norm = {}, 1
    if args.protocol is None and args.data in OWN:
        args.protocol, own = "sgd", OWN[args.data]
    elif args.protocol is None and images >= 100 * PROTOCOLS["lars"]["batch"]:
        args.protocol = "lars"
    elif args.protocol is None:
        batch = max(world, min(256, images // 10))
        args.protocol, args.norm, own = "sgd", None, dict(batch=batch, lr=30 * 256 / batch)
    for key, value in (PROTOCOLS[args.protocol] | own).items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    args.batch = min(args.batch, images) // world * world
    if args.batch == 0:
        sys.exit(f"--batch or the {images} training images are fewer than the {world} ranks")


def learning_rate(protocol, done, base):
    """The learning rate once that share of the steps is done."""
    if protocol == "sgd":
        return base * 0.1 ** ((done >= 0.6) + (done >= 0.8))
    return base * (1 - done if protocol == "sgd-linear" else (1 + math.cos(math.pi * done)) / 2)


@torch.no_grad()
def features(backbone, x, bf16):
    """(b, 3, h, w) in [0, 1] → (b, d), in parts: in eval mode they give what the whole would, in less memory."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
        return torch.cat([backbone(part).float() for part in augment.normalize(x).split(256)])


@torch.no_grad()
def evaluate(linear, tests):
    """Top-1 and top-5 in percent over all images, and how many these are; tests: features (b, d) and labels (b,)."""
    totals = torch.zeros(3, dtype=torch.float64, device=linear.weight.device)  # right at first, in five; images
    for x, labels in tests:
        hit = linear(x).topk(min(5, linear.out_features)).indices == labels[:, None]
        totals += torch.stack([hit[:, 0].sum(), hit.sum(), (labels >= 0).sum()])  # a label below 0: no image
    dist.all_reduce(totals)
    return *(100 * totals[:2] / totals[2]).tolist(), int(totals[2])


def say(text, live=False):
    """Rank 0 prints for all, in ASCII. A live line is for terminals alone, where the next one takes its place."""
    terminal = os.isatty(1)
    if dist.get_rank() == 0 and (terminal or not live):
        print(f"{text:79}" if terminal else text, end="\r" if live else "\n", flush=True)


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


def train(args):
    device = join()
    rank, world = dist.get_rank(), dist.get_world_size()
    backbone, d = load_backbone(Path(args.backbone).expanduser())
    backbone = backbone.to(device, memory_format=torch.channels_last)

    train_set, test_set = augment.load_data(args.data, args.root, args.size, download=world == 1)
    if not test_set:
        sys.exit(f"--data {args.data} has no labels: linear evaluation needs train/<class>/ and val/<class>/")
    images = len(train_set.images)
    choose(args, images, world)
    share = dict(rank=rank, world=world, device=device, workers=args.workers)
    loader = augment.TrainLoader(train_set, args.batch, 1, args.size, scale=(args.crop, 1), seed=args.seed, **share)
    steps = len(loader)
    if args.norm is None:  # backbones differ a hundredfold in it
        crops, _ = next(iter(loader))
        square = features(backbone, crops[:, 0] / 255, args.bf16).square().sum(1).mean()
        dist.all_reduce(square)
        args.norm = (square / world).sqrt().item()
    base_lr = args.lr * args.batch / 256
    say(f"{args.backbone!a} ({d} features) on {args.data!a}: {images:,} images, {len(test_set.images):,} to test")
    say(f"protocol {args.protocol}: batch {args.batch}, lr {base_lr:g}, features / {args.norm:.3g}, "
        f"{args.epochs} epochs of {steps} steps, {world} x {device.type}")

    torch.manual_seed(args.seed)
    linear = nn.Linear(d, len(train_set.classes)).to(device)
    nn.init.normal_(linear.weight, std=0.01)
    nn.init.zeros_(linear.bias)
    ddp = nn.parallel.DistributedDataParallel(linear)
    Optimizer = LARS if args.protocol == "lars" else torch.optim.SGD
    optimizer = Optimizer(linear.parameters(), base_lr, momentum=0.9, weight_decay=0)

    tests = [(features(backbone, x / 255, args.bf16) / args.norm, labels)  # the same after every epoch
             for x, labels in augment.EvalLoader(test_set, 256, args.size, **share)]
    best = 0
    for epoch in range(1, args.epochs + 1):
        start, total = time.time(), torch.zeros((), device=device)
        loader.set_epoch(epoch - 1)
        for step, (crops, labels) in enumerate(loader, (epoch - 1) * steps):
            torch.manual_seed(hash((args.seed, step, rank)))
            optimizer.param_groups[0]["lr"] = learning_rate(args.protocol, step / (args.epochs * steps), base_lr)
            x = augment.flip(crops[:, 0] / 255) if args.flip else crops[:, 0] / 255
            loss = F.cross_entropy(ddp(features(backbone, x, args.bf16) / args.norm), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach()
            say(f"epoch {epoch:3d}  step {step % steps + 1}/{steps}", live=True)
        dist.all_reduce(total)
        if not total.isfinite():
            sys.exit(f"the loss is {total.item()} in epoch {epoch}: lower --lr")
        top1, top5, tested = evaluate(linear, tests)
        best = max(best, top1)
        say(f"epoch {epoch:3d}/{args.epochs}  loss {total.item() / steps / world:.4f}  top-1 {top1:.2f} %  "
            f"top-5 {top5:.2f} %  {time.time() - start:.0f} s")

    say(json.dumps(dict(top1=top1, top5=top5, best_top1=best, images=tested) | vars(args)))


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

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

DATA = {  # size of the images, smallest crop of them to train on, mirrored or not, and the protocol
    "glyphs": dict(size=24, scale=0.8, flip=False, protocol="sgd", epochs=30, lr=0.3),
    "cifar10": dict(size=32, scale=0.8, flip=True, protocol="sgd"),
    "imagenet": dict(size=224, scale=0.08, flip=True, protocol="lars"),
}
PROTOCOLS = {  # an optimizer, its schedule and their settings; lr is for a batch of 256
    "sgd": dict(batch=256, epochs=100, lr=30.0),  # CIFAR-10, DSSL's released code: a tenth after 60 %, again after 80 %
    "lars": dict(batch=4096, epochs=90, lr=0.1),  # ImageNet, the paper's App. A.3: 1.6 for a batch of 4096, cosine
    "sgd-linear": dict(batch=4096, epochs=90, lr=0.1),  # the same for SimCLR, falling linearly to 0
}


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


def load_backbone(path):
    """A state dict's file → (network in eval mode, features d). Raises OSError naming what does not fit."""
    if not Path(path).is_file():
        raise OSError(f"no file {path}: the backbone of a run is backbone.pt in its folder")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # garbage can make the unpickler raise anything
        raise OSError(f"{path} is no file of weights ({type(error).__name__})") from None
    if not isinstance(state, dict) or not all(torch.is_tensor(value) for value in state.values()):
        raise OSError(f"{path} is no state dict of a backbone; a run writes one as backbone.pt")
    # fc is not the backbone's, and num_batches_tracked, which some weights lack, counts for nothing in eval mode
    state = {key: value for key, value in state.items() if not str(key).startswith("fc.")}
    shapes = {key: value.shape for key, value in state.items() if not str(key).endswith("num_batches_tracked")}
    for arch in ("small", "resnet18", "resnet34", "resnet50", "resnet101"):
        for stem in ("cifar", "imagenet"):
            with torch.device("meta"):  # shapes alone
                ours = make_backbone(arch, stem)[0].state_dict()
            if shapes == {key: value.shape for key, value in ours.items() if not key.endswith("num_batches_tracked")}:
                net, d = make_backbone(arch, stem)
                net.load_state_dict(state, strict=False)
                return net.eval().requires_grad_(False), d
    raise OSError(f"{path} fits no ResNet-18, 34, 50 or 101 with torchvision's keys, with or without the CIFAR stem")


def parse_args(argv=None):
    """The complete settings, or an exit with one line that says what to change."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.error, add = fail, parser.add_argument
    add("backbone", help="the file of its weights: backbone.pt of a run, or any with torchvision's keys")
    add("--data", default="glyphs", help="glyphs (default), cifar10, imagenet, or the path of a folder of images")
    add("--recipe", choices=DATA, help="whose size and crops to take, where not those of --data; a folder needs it")
    add("--root", default="data", help="the folder with cifar10/ and imagenet/ in it (default: data)")
    add("--protocol", choices=PROTOCOLS, help="optimizer and schedule (default: sgd, for ImageNet lars)")
    add("--size", type=int, help="pixels a side (default: that of --data)")
    add("--batch", type=int, help="images a step, over all ranks (default: the protocol's, or all images if fewer)")
    add("--epochs", type=int, help="passes over the images (default: the protocol's)")
    add("--lr", type=float, help="learning rate for a batch of 256; it scales with the batch")
    add("--seed", type=int, default=0, help="of all that is random (default: 0)")
    add("--workers", type=int, default=8, help="processes a rank that read streamed images (default: 8)")
    add("--bf16", action=argparse.BooleanOptionalAction, help="compute in bfloat16 (default: on GPUs that can)")
    args = parser.parse_args(argv)
    args.recipe = args.recipe or args.data
    if args.recipe not in DATA:
        fail(f"--data {args.data} is none of {', '.join(DATA)}: for a folder, add --recipe with one of them")
    defaults = PROTOCOLS[args.protocol or DATA[args.recipe]["protocol"]] | DATA[args.recipe]
    if args.protocol:  # then its own batch, epochs and lr, also where the data would have others
        defaults |= PROTOCOLS[args.protocol]
    vars(args).update({key: value for key, value in defaults.items() if getattr(args, key, None) is None})
    args.bf16 = torch.cuda.is_bf16_supported(including_emulation=False) if args.bf16 is None else args.bf16
    for key, low in dict(size=8, batch=1, epochs=1, lr=0, seed=0, workers=0).items():
        if not low <= getattr(args, key) < 2**63:
            fail(f"--{key} must be {low} or more, not {getattr(args, key)}")
    return args


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
def evaluate(backbone, linear, loader, bf16):
    """Top-1 and top-5 in percent over all images, and how many these are."""
    right = torch.zeros(3, dtype=torch.float64, device=linear.weight.device)  # among the first, the first 5, all
    for x, labels in loader:
        hit = linear(features(backbone, x / 255, bf16)).topk(min(5, linear.out_features)).indices == labels[:, None]
        right += torch.stack([hit[:, 0].sum(), hit.sum(), (labels >= 0).sum()])  # a label below 0: no image
    dist.all_reduce(right)
    return *(100 * right[:2] / right[2]).tolist(), int(right[2])


def train(args):
    rank, world, local = place()
    backbone, d = load_backbone(Path(args.backbone).expanduser())
    train_set, test_set = augment.load_data(args.data, args.root, args.size, download=world == 1)
    if not test_set:
        fail(f"--data {args.data} has no labels: linear evaluation needs train/<class>/ and val/<class>/")
    args.batch = min(args.batch, len(train_set.images)) // world * world  # a folder may be smaller than a batch
    if not args.batch:
        fail(f"--batch or the {len(train_set.images)} training images are fewer than the {world} ranks")
    device = join(rank, world, local)
    share = dict(rank=rank, world=world, device=device, workers=args.workers)
    loader = augment.TrainLoader(train_set, args.batch, 1, args.size, scale=(args.scale, 1), seed=args.seed, **share)
    test_loader = augment.EvalLoader(test_set, 256, args.size, **share)

    torch.manual_seed(args.seed)
    backbone = backbone.to(device, memory_format=torch.channels_last)
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    linear = nn.Linear(d, len(train_set.classes)).to(device)
    nn.init.normal_(linear.weight, std=0.01)
    nn.init.zeros_(linear.bias)
    ddp = nn.parallel.DistributedDataParallel(linear)
    base_lr, steps, best = args.lr * args.batch / 256, len(loader), 0
    optimizer = LARS if args.protocol == "lars" else torch.optim.SGD
    optimizer = optimizer(linear.parameters(), base_lr, momentum=0.9, weight_decay=0)
    print(f"{args.backbone} ({d} features) on {args.data}: {len(train_set.images):,} images, {len(test_set.images):,} "
          f"to test; {args.protocol}, {world} × {device.type}, batch {args.batch}, lr {base_lr:g}, {args.epochs} epochs")
    for epoch in range(1, args.epochs + 1):
        loader.set_epoch(epoch - 1)
        start, total = time.time(), torch.zeros((), device=device)
        for step, (crops, labels) in enumerate(loader, (epoch - 1) * steps):
            torch.manual_seed(hash((args.seed, step, rank)))
            optimizer.param_groups[0]["lr"] = learning_rate(args.protocol, step / (args.epochs * steps), base_lr)
            x = augment.flip(crops[:, 0] / 255) if args.flip else crops[:, 0] / 255
            loss = F.cross_entropy(ddp(features(backbone, x, args.bf16)), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach()
        dist.all_reduce(total)
        if not total.isfinite():
            fail(f"the loss is {total.item()} in epoch {epoch}: lower --lr")
        top1, top5, images = evaluate(backbone, linear, test_loader, args.bf16)
        best = max(best, top1)
        print(f"epoch {epoch:3d}/{args.epochs}  loss {total.item() / steps / world:.4f}  top-1 {top1:.2f} %  "
              f"top-5 {top5:.2f} %  {time.time() - start:.0f} s")

    if not all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items()):
        fail("the backbone has changed: this result is not a linear evaluation")
    result = dict(top1=round(top1, 3), top5=round(top5, 3), best_top1=round(best, 3), images=images)
    settings = {key: value for key, value in vars(args).items() if key not in ("root", "recipe", "workers")}
    print(json.dumps(result | settings))


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

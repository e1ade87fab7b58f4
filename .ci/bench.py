"""Timings behind the README's figures, each as a ratio to its peers in the same run: medians, real or random pixels.

    python .ci/bench.py views                  views from pixels in memory, against Pillow + torchvision and kornia
    python .ci/bench.py stream --images DIR    reading image files, against the four-view Pillow pipeline and decoding
    python .ci/bench.py step                   the training step: share of data, views and log; and of the matrix peak
                                               (a GPU by itself; under torchrun each has that batch, and SyncBN)
    python .ci/bench.py knn                    the kNN monitor's search
    python .ci/bench.py memory                 peak on a GPU; anywhere, what the four views' activations must take

kornia is compared with where it is installed (pip install kornia).
"""
import argparse
import importlib.util
import os
import random
import resource
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageFilter
from torchvision import transforms as T
from torchvision.transforms.functional import to_pil_image

sys.path.insert(0, str(Path(__file__).parents[1]))
import augment  # noqa: E402
import simsiam_dssl  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")


def wait():
    if CUDA:
        torch.cuda.synchronize()


def seconds(function, repeats=1):
    wait()
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    wait()
    return (time.perf_counter() - start) / repeats


def compare(functions, rounds):
    """{name: median seconds}, the functions taking turns so that a slow minute hits all of them."""
    for function in functions.values():
        function()  # warm up
    times = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            times[name].append(seconds(function))
    return {name: statistics.median(ts) for name, ts in times.items()}


def show(title, times, work, unit, against):
    print(f"\n{title}")
    for name, t in times.items():
        print(f"  {name:34} {work / t:12,.0f} {unit}/s   {times[name] / times[against]:6.2f} × the time of '{against}'")


# ------------------------------------------------------------------------------------------------- peers


def pil_jigsaw(image, n=4):
    """Tiles of one Pillow image in random order."""
    side, out = image.width // n, image.copy()
    for k, source in enumerate(random.sample(range(n * n), n * n)):
        x, y = source % n * side, source // n * side
        out.paste(image.crop((x, y, x + side, y + side)), (k % n * side, k // n * side))
    return out


def blur(image):
    return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2)))


class FourViews(torch.utils.data.Dataset):
    """The usual pipeline: two SVs and, of each, one HV, image by image with Pillow."""

    def __init__(self, images, size, blurred):
        self.images = images
        self.sv = T.Compose([
            T.RandomResizedCrop(size, scale=(0.2, 1)), T.RandomHorizontalFlip(),
            T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8), T.RandomGrayscale(0.2),
            *[T.RandomApply([blur], 0.5)] * blurred])
        self.hv = T.Compose([T.RandAugment(2, 5), pil_jigsaw])

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        image = self.images[i]
        image = Image.open(image).convert("RGB") if isinstance(image, (str, Path)) else image
        svs = [self.sv(image) for _ in range(2)]
        return torch.stack([T.functional.to_tensor(x) for x in svs + [self.hv(x) for x in svs]])


def with_pillow(images, size, blurred, workers):
    loader = torch.utils.data.DataLoader(
        FourViews(images, size, blurred), batch_size=64, num_workers=workers, persistent_workers=workers > 0)
    return lambda: sum(len(batch) for batch in loader)


def with_kornia(x, size, blurred):
    import kornia.augmentation as K
    from kornia.augmentation.auto import RandAugment
    sv = K.AugmentationSequential(
        K.RandomResizedCrop((size, size), scale=(0.2, 1.0)), K.RandomHorizontalFlip(),
        K.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8), K.RandomGrayscale(p=0.2),
        *[K.RandomGaussianBlur((23, 23), (0.1, 2.0), p=0.5)] * blurred, same_on_batch=False)
    hv = [RandAugment(n=2, m=5), K.RandomJigsaw((4, 4), p=1.0)]

    def run():
        pixels = torch.cat([x, x]) / 255
        standard = sv(pixels)
        heavy = standard
        for operation in hv:
            heavy = operation(heavy)
        return standard, heavy

    return run


# ------------------------------------------------------------------------------------------------- ours


def ours(x, size, blurred, policy="ra(2,5)+jigsaw(4)"):
    heavy = augment.parse_policy(policy)

    def run():
        crops = torch.cat([augment.random_resized_crop(x, size) for _ in range(2)])
        sv = augment.standard(crops, True, blurred)
        return sv, heavy(sv)

    return run


def pixels(n, size, folder):
    """n images of that size, real ones if there is a folder of them, else random; never constant ones."""
    if not folder:
        return torch.randint(256, (n, 3, size, size), dtype=torch.uint8)
    paths = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
    paths = random.Random(0).sample(paths, min(n, len(paths)))
    x, _ = augment.read_all(paths, size)
    return x.repeat(-(-n // len(x)), 1, 1, 1)[:n]


def views(args):
    cores = args.threads
    for size, n, blurred in ((32, 512, False), (224, 64, True)):
        x = pixels(n, size, args.images)
        functions = {"ours": ours(x.to(DEVICE), size, blurred),
                     f"Pillow + torchvision, {cores} workers": with_pillow([to_pil_image(i) for i in x], size, blurred, cores)}
        if importlib.util.find_spec("kornia"):
            functions["kornia"] = with_kornia(x.to(DEVICE), size, blurred)
        times = compare(functions, args.rounds)
        show(f"four views of {n} images at {size} px, {DEVICE.type}, {cores} threads", times, n, "images", "ours")


def stream(args):
    torch.set_num_threads(1)  # as in a worker
    paths = [str(p) for p in sorted(Path(args.images).rglob("*")) if p.suffix.lower() in (".jpg", ".jpeg")][:200]
    loader = augment.TrainLoader(augment.Data(paths, None, []), len(paths), 2, 224)
    pillow = FourViews(paths, 224, True)
    everything = range(len(paths))
    times = compare({
        "ours: decode once, crop twice": lambda: [loader[i] for i in everything],
        "Pillow, four views": lambda: [pillow[i] for i in everything],
        "decode alone": lambda: [Image.open(path).convert("RGB") for path in paths],
    }, args.rounds)
    show(f"{len(paths)} image files, one core", times, len(paths), "images", "ours: decode once, crop twice")


def knn(args):
    for n, q, d, k in ((50_000, 10_000, 512, 200),):
        bank, query = (F.normalize(torch.randn(m, d, device=DEVICE), dim=1) for m in (n, q))
        labels = torch.randint(10, (n,), device=DEVICE)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if CUDA:
            bank, query = bank.half(), query.half()
            torch.cuda.reset_peak_memory_stats()
            base = torch.cuda.memory_allocated()
        t = statistics.median(seconds(lambda: simsiam_dssl.knn_predict(query, bank, labels, 10, k)) for _ in range(3))
        extra = (torch.cuda.max_memory_allocated() - base) / 2**20 if CUDA else (
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10
        print(f"kNN: {q:,} queries, bank {n:,} × {d}, k {k}: {t:.2f} s on {DEVICE.type}, {extra:,.0f} MiB beyond the features")


def model_and_views(recipe, batch):
    args = simsiam_dssl.parse_args(["--data", recipe, "--batch", str(batch)])
    torch.manual_seed(0)
    model = simsiam_dssl.SimSiam(args).to(DEVICE, memory_format=torch.channels_last)
    return args, model


def step(args):
    rank, world, _ = simsiam_dssl.join()
    sys.stdout = sys.stdout if rank == 0 else open(os.devnull, "w")
    for recipe, batch in (("cifar10", 512), ("imagenet", 64)) if CUDA else (("glyphs", 64),):
        settings, model = model_and_views(recipe, batch)
        if CUDA and world > 1:
            model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
        if args.compile:
            model.backbone.compile()
        ddp = torch.nn.parallel.DistributedDataParallel(model)
        ddp.broadcast_buffers = False
        optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=settings.wd)
        heavy, size = augment.parse_policy(settings.heavy), settings.size
        data = augment.Data(pixels(4 * batch, size, args.images), None, [])
        loader = augment.TrainLoader(data, batch, 2, size, (0.2, 1), device=DEVICE)
        meters = torch.zeros(4, dtype=torch.float64, device=DEVICE)

        def make(crops):
            sv = augment.standard(rearrange(crops, "b v c h w -> (v b) c h w"), settings.flip, settings.blur)
            return augment.normalize(sv).chunk(2), tuple(augment.normalize(x) for x in heavy(sv).chunk(2))

        def learn(v, v_hat):
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=CUDA):
                outputs, z = ddp(v, v_hat)
            loss = simsiam_dssl.dssl_loss(*outputs)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return outputs, loss, z

        def whole():
            for crops, _ in loader:
                outputs, loss, z = learn(*make(crops))
                with torch.no_grad():
                    std = F.normalize(z.float(), dim=-1).std(1).mean() * z.shape[-1] ** 0.5
                    terms = [simsiam_dssl.dssl_loss(*outputs, weights=w) for w in ((1, 0, 0, 0), (0, 0, 1, 0))]
                    meters.add_(torch.stack([loss, std, *terms]))
                dist.all_reduce(torch.tensor([0, 0]))

        ready = make(next(iter(loader))[0])

        def bare():
            for _ in range(len(loader)):
                learn(*ready)

        times = compare({"step on ready tensors": bare, "data + views + step + log": whole}, args.rounds)
        show(f"{recipe}: {settings.arch} at {size} px, batch {batch}, four views, {DEVICE.type}"
             + ", compiled" * args.compile, times, batch * len(loader), "images", "step on ready tensors")
        if CUDA:
            a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
            peak = 2 * 8192**3 / statistics.median(seconds(lambda: a @ b, 20) for _ in range(5))
            forward = {"cifar10": 1.11e9, "imagenet": 8.2e9}[recipe]
            for name, t in times.items():
                used = 3 * forward * 4 * batch * len(loader) / t
                print(f"  {name:34} {100 * used / peak:.1f} % of {peak / 1e12:,.0f} Tflop/s")


def memory(args):
    for recipe, batch in (("cifar10", 512), ("imagenet", 64)):
        settings, model = model_and_views(recipe, batch)
        n = batch if CUDA else 4
        x = tuple(torch.rand(n, 3, settings.size, settings.size, device=DEVICE).to(memory_format=torch.channels_last)
                  for _ in range(4))
        saved = {}

        def pack(t):
            if t.data_ptr() not in parameters:
                saved[t.untyped_storage().data_ptr()] = t
            return t

        parameters = {p.data_ptr() for p in model.parameters()}
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast(DEVICE.type, torch.bfloat16):
            outputs, _ = model(x[:2], x[2:])
            loss = simsiam_dssl.dssl_loss(*outputs)
        size = sum(t.untyped_storage().nbytes() for t in saved.values()) / n * batch / 2**30
        print(f"{recipe}: batch {batch}, four views, bf16: {size:.1f} GiB kept for the backward pass")
        if CUDA:
            saved.clear()
            loss.backward()
            print(f"  peak on the device {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["views", "stream", "step", "knn", "memory"])
    parser.add_argument("--images", help="a folder of real images")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    random.seed(0)
    torch.manual_seed(0)
    globals()[args.what](args)


if __name__ == "__main__":
    main()

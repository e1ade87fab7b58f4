"""Timings behind the README's figures, each as a ratio to its peers in the same run: medians, real or random pixels.

    python .ci/bench.py views                  views from pixels in memory, against Pillow + torchvision and kornia
    python .ci/bench.py stream --images DIR    reading image files, against the four-view Pillow pipeline and decoding
    python .ci/bench.py step                   a real run's logged rate against its step on ready tensors, in turns; on a
                                               GPU the share of the matrix peak (under torchrun each rank has that batch)
    python .ci/bench.py knn                    the kNN monitor's search
    python .ci/bench.py memory                 peak on a GPU; anywhere, what the four views' activations must take

kornia is compared with where it is installed (pip install kornia).
"""
import argparse
import importlib.util
import json
import os
import random
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
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


def real(_, flags, images, out):
    """What the user runs: train(), its monitor before the first step. Writes its log into out."""
    if images is not None:
        augment.load_data = lambda *_, **__: (augment.Data(images, torch.arange(len(images)) % 10, list("0123456789")),) * 2
    simsiam_dssl.train(simsiam_dssl.parse_args([*flags, "--out", out]))
    dist.destroy_process_group()


def bare(flags, steps):
    """Images a second of the training step alone, on views that are ready."""
    settings = simsiam_dssl.parse_args(flags)
    model = simsiam_dssl.SimSiam(settings).to(DEVICE, memory_format=torch.channels_last)
    if CUDA:
        simsiam_dssl.record_graphs(model, settings, DEVICE)
    ddp = torch.nn.parallel.DistributedDataParallel(model)
    ddp.broadcast_buffers = False
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=settings.wd)
    sv, hv = torch.rand(2, 2, settings.batch, 3, settings.size, settings.size, device=DEVICE)

    def learn():
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=settings.bf16):
            outputs = ddp(sv, hv)
        loss = simsiam_dssl.dssl_loss(*outputs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    seconds(learn, 10)
    return settings.batch / seconds(learn, steps)


def step(args):
    world = int(os.environ.get("WORLD_SIZE") or 1)
    if world == 1:
        simsiam_dssl.join()
    for recipe, batch in (("cifar10", 512), ("imagenet", 64)) if CUDA else (("glyphs", None),):
        if args.recipe not in (None, recipe):
            continue
        flags = ["--data", recipe, "--epochs", "2" if CUDA else "1", "--warmup", "0"]
        flags += ["--batch", str(batch * world)] if batch else []
        size = simsiam_dssl.parse_args(flags).size
        images = pixels(40 * batch * world, size, args.images) if batch else None  # glyphs: as they are
        rates = {"a real run, as it logs": [], "its step on ready tensors": []}
        for _ in range(args.rounds if world == 1 else 1):  # in turns
            with tempfile.TemporaryDirectory() as out:
                if world == 1:  # in a process of its own, so that what it does to this one's threads is not shared
                    torch.multiprocessing.spawn(real, (flags, images, out))
                else:
                    out = f"runs/bench-{recipe}"
                    real(0, flags, images, out)
                log = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
                rates["a real run, as it logs"].append(log[-1]["images_per_s"])
            if world == 1:
                rates["its step on ready tensors"].append(bare(flags, 40))
        print(f"\n{' '.join(flags)}: {DEVICE.type}, {world} ranks, {args.threads} threads")
        for name, values in rates.items():
            if values:
                print(f"  {name:34} {statistics.median(values):10,.0f} images/s")
        if CUDA:
            a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
            peak = 2 * 8192**3 / statistics.median(seconds(lambda: a @ b, 20) for _ in range(5))
            forward = {"cifar10": 1.11e9, "imagenet": 8.2e9}[recipe]
            for name, values in rates.items():
                if values:
                    print(f"  {name:34} {100 * 12 * forward * statistics.median(values) / world / peak:.1f} % of {peak / 1e12:,.0f} Tflop/s")
        else:
            print(f"  share {statistics.median(a / b for a, b in zip(*rates.values())):.2f}")


def memory(args):
    for recipe, batch in (("cifar10", 512), ("imagenet", 64)):
        settings = simsiam_dssl.parse_args(["--data", recipe, "--batch", str(batch)])
        model = simsiam_dssl.SimSiam(settings).to(DEVICE, memory_format=torch.channels_last)
        n = batch if CUDA else 4
        sv, hv = torch.rand(2, 2, n, 3, settings.size, settings.size, device=DEVICE)
        saved = {}

        def pack(t):
            if t.data_ptr() not in parameters:
                saved[t.untyped_storage().data_ptr()] = t
            return t

        parameters = {p.data_ptr() for p in model.parameters()}
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast(DEVICE.type, torch.bfloat16):
            loss = simsiam_dssl.dssl_loss(*model(sv, hv))
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
    parser.add_argument("--recipe", choices=["cifar10", "imagenet"], help="of step on a GPU: this one alone")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    random.seed(0)
    torch.manual_seed(0)
    globals()[args.what](args)


if __name__ == "__main__":
    main()

"""Forms of a step that hide its launches on a GPU: the scripts have "graph", and each is shown beside the first named.

    python .ci/forms.py [--script byol_dssl] [--recipe imagenet] [--forms launched graph ...]

Each form is a real run, train() in a process of its own, of two epochs of 60 steps on pixels in memory; the second
epoch's rate, as the log has it, counts. The loss of a form must be the first form's up to rounding. On a CPU only what
needs no GPU can be tried.
"""
import argparse
import contextlib
import importlib
import json
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))
import augment  # noqa: E402

STEPS = 60
BATCH = {"cifar10": 512, "imagenet": 64, "glyphs": 32}


def launched(m, args):
    """Kernel by kernel, without the graphs that the scripts record."""
    m.record_graphs = lambda *_: None


def ahead(m, args):
    """A thread makes the next step's views while this step trains."""
    make = m.make_views

    def made_ahead(loader, *rest):
        views = make(loader, *rest)
        cuda = loader.device.type == "cuda"
        with ThreadPoolExecutor(1, initializer=lambda: cuda and torch.cuda.set_device(loader.device)) as pool:
            following = pool.submit(next, views, None)
            while (batch := following.result()) is not None:
                following = pool.submit(next, views, None)
                yield batch

    m.make_views = made_ahead


def compiled(m, args):
    """torch.compile of the backbone."""
    make = m.make_backbone

    def made(*rest):
        net, d = make(*rest)
        net.forward = torch.compile(net.forward)
        return net, d

    m.make_backbone = made


class Bare(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.module = model

    def forward(self, *views):
        return self.module(*views)


def no_ddp(m, args):
    """No DDP in a world of one."""
    torch.nn.parallel.DistributedDataParallel = Bare


def no_views(m, args):
    """The first step's views in every step: no form, but what a step would take if views cost nothing."""
    make = m.make_views

    def once(loader, *rest):
        first = next(iter(make(loader, *rest)))
        for _ in range(len(loader)):
            yield first

    m.make_views = once


def no_cache(m, args):
    """autocast without its cache, as a graph needs it: each view casts the weights for itself."""
    real = torch.autocast

    def uncached(*rest, **kwargs):
        return real(*rest, **kwargs, cache_enabled=False)

    torch.autocast = uncached


FORMS = {
    "launched": (launched,), "graph": (), "ahead": (launched, ahead), "graph+ahead": (ahead,),
    "no-ddp": (launched, no_ddp), "no-cache": (launched, no_cache), "no-views": (launched, no_views),
    "graph+no-views": (no_views,), "compiled": (launched, compiled), "graph+compiled": (compiled,),
}


def train(_, form, script, flags, images, out, table):
    """What the user runs, with the form's changes."""
    m = importlib.import_module(script)
    args = m.parse_args([*flags, "--out", out])
    augment.load_data = lambda *_, **__: (augment.Data(images, torch.arange(len(images)) % 10, list("0123456789")),) * 2
    for change in FORMS[form]:
        change(m, args)
    profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) if table else None
    with contextlib.redirect_stdout(None), profile or contextlib.nullcontext():
        m.train(args)
    peak = torch.cuda.max_memory_reserved() / 2**30 if torch.cuda.is_available() else 0
    if table:
        print(profile.key_averages().table(sort_by="self_cuda_time_total", row_limit=40, max_name_column_width=90))
    Path(out, "peak").write_text(str(peak))
    dist.destroy_process_group()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--script", default="simsiam_dssl")
    parser.add_argument("--recipe", choices=BATCH, default="cifar10")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--flags", default="", help="more of the script's, such as '--weights 1 0 0 0 --pairs 2'")
    parser.add_argument("--profile", action="store_true", help="print which kernels take how long")
    args = parser.parse_args()
    batch = BATCH[args.recipe]
    flags = ["--data", args.recipe, "--batch", str(batch), "--epochs", "2", "--warmup", "0", "--knn-every", "9"]
    flags += args.flags.split()
    size = importlib.import_module(args.script).parse_args(flags).size
    torch.manual_seed(0)
    images = torch.randint(256, (args.steps * batch, 3, size, size), dtype=torch.uint8)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    print(f"{args.script} {' '.join(flags)}, {args.steps} steps an epoch, {device}, torch {torch.__version__}")
    first = None
    for form in args.forms:
        with tempfile.TemporaryDirectory() as out:
            try:
                torch.multiprocessing.spawn(train, (form, args.script, flags, images, out, args.profile))
            except Exception as error:  # the other forms are still worth their time
                print(f"  {form:14} fails: {str(error).strip().splitlines()[-1][:150]}", flush=True)
                continue
            last = json.loads(Path(out, "log.jsonl").read_text().splitlines()[-1])
            first = first or last
            rate, loss, peak = last["images_per_s"], last["loss"], float(Path(out, "peak").read_text())
            print(f"  {form:14} {rate:8,.0f} images/s  {rate / first['images_per_s']:.2f} ×  "
                  f"loss {loss:.4f} ({loss - first['loss']:+.4f})  peak {peak:.1f} GiB", flush=True)


if __name__ == "__main__":
    main()

"""kNN curves over training from raw logs, as a small SVG that reads on white and on dark pages.

    python .ci/plot.py OUT.svg "title" LABEL=LOG[,LOG...] [LABEL=LOG[,LOG...] ...] [--share]

A log is a run's log.jsonl: one object a line with "epoch" and, where it was measured, "knn". Several logs of one label
are seeds: a thin line each and, unless they end far apart, a thick one for their mean at the epochs that all of them
have. On the right stand each label and its last value, or the range of the seeds'. --share: x is the share of training,
where a log's last epoch is all of it, so that runs of different lengths can be compared. The same logs give the same
bytes. It needs matplotlib, as nothing else here does:

    pip install matplotlib && python .ci/plot.py glyphs.svg "SimSiam on letters and digits" \\
        DSSL=$(echo .results/glyphs/5-epochs/simsiam-dssl-lr0.48-seed[01289].jsonl | tr " " ,) ...
"""
import argparse
import json
import re
import sys
from pathlib import Path

import matplotlib
matplotlib.use("svg")
from matplotlib import pyplot  # noqa: E402

COLOURS = "#227ac9", "#cd4f11", "#118868", "#b635ec", "#927403", "#777777"  # a contrast of 4.2 or more on white and on dark
GREY = "#777777"
FONT = "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"
LINE = 0.065  # a label's height, as a share of the axis


def read(path, share):
    """{x: kNN in percent} of one log."""
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    last = max(row["epoch"] for row in rows) if share else 100
    points = {100 * row["epoch"] / last: row["knn"] for row in rows if row.get("knn") is not None}
    if not points:
        raise ValueError(f"no kNN in {path}")
    return points


def spread(ys, gap):
    """The heights ys moved apart, as little as need be, until neighbours are a gap away from each other."""
    order, ys = sorted(range(len(ys)), key=ys.__getitem__), list(ys)
    for _ in range(200):
        for low, high in zip(order, order[1:]):
            push = max(0, gap - (ys[high] - ys[low])) / 2
            ys[low], ys[high] = ys[low] - push, ys[high] + push
    return ys


def draw(out, title, curves, share):
    """curves: {label: [path, ...]}"""
    pyplot.rcParams.update({
        "svg.fonttype": "none", "svg.hashsalt": "dssl", "font.sans-serif": "DejaVu Sans", "font.size": 11,
        "text.color": GREY, "axes.labelcolor": GREY, "axes.edgecolor": GREY, "xtick.color": GREY, "ytick.color": GREY,
        "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = pyplot.subplots(figsize=(7, 3.8))
    ends = []
    for colour, (label, paths) in zip(COLOURS, curves.items()):
        seeds = [read(path, share) for path in paths]
        xs = sorted(set.intersection(*map(set, seeds)))
        mean = [sum(seed[x] for seed in seeds) / len(seeds) for x in xs]
        for seed in seeds if len(seeds) > 1 else ():
            axes.plot(*zip(*sorted(seed.items())), color=colour, linewidth=1.2, alpha=0.7)
        low, high = (extreme(seed[xs[-1]] for seed in seeds) for extreme in (min, max))
        if high - low > 20:  # their mean would look like none of them
            ends.append((xs[-1], low, f"{label}: {low:.1f} to {high:.1f}", colour))
            continue
        axes.plot(xs, mean, color=colour, linewidth=2.4, marker="o", markersize=4, zorder=9 - len(ends))
        ends.append((xs[-1], mean[-1], f"{label}: {mean[-1]:.1f}", colour))
    (low, high), right = axes.get_ylim(), max(x for x, *_ in ends)
    for (x, end, text, colour), y in zip(ends, spread([end for _, end, *_ in ends], LINE * (high - low))):
        axes.annotate(text, (right, y), (8, 0), textcoords="offset points", va="center", color=colour, weight="bold",
                      annotation_clip=False)  # also where it was moved above the axis
        if x < right:  # a shorter run: dots lead to its label
            axes.plot((x, right), (end, y), color=colour, linewidth=1.2, linestyle=":")
    axes.set_title(title, loc="left", weight="bold", size=12, pad=12)
    axes.set(xlabel="share of training (%)" if share else "epoch", ylabel="kNN top-1 (%)", ylim=(low, high))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(axis="y", color=GREY, alpha=0.2)
    figure.savefig(out, transparent=True, bbox_inches="tight", metadata={"Date": None, "Creator": None})
    svg = Path(out).read_text().replace("'DejaVu Sans'", FONT)
    Path(out).write_text(re.sub(r"(\.\d\d)\d{3,}", r"\1", svg))  # a hundredth of a point is enough


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", metavar="OUT.svg")
    parser.add_argument("title")
    parser.add_argument("curves", nargs="+", metavar="LABEL=LOG[,LOG...]", help=f"at most {len(COLOURS)}")
    parser.add_argument("--share", action="store_true", help="x is the share of training, not epochs")
    args = parser.parse_args()
    if odd := [curve for curve in args.curves if "=" not in curve]:
        parser.error(f"{odd[0]!r} is not LABEL=LOG")
    curves = {label: paths.split(",") for label, _, paths in (curve.partition("=") for curve in args.curves)}
    if len(curves) > len(COLOURS):
        parser.error(f"{len(curves)} lines, but only {len(COLOURS)} colours")
    try:
        draw(args.out, args.title, curves, args.share)
    except (ValueError, OSError) as error:
        sys.exit(f"plot.py: {error}")


if __name__ == "__main__":
    main()

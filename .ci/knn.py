"""kNN of the backbones of finished runs, by the number of neighbours: does the order of arms hang on k?

    python .ci/knn.py RUN [RUN ...] [--k 1 5 20 50 200] [--root data]

RUN is a run's folder. A line each: its name, and top-1 in percent for each k.
"""
import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import augment
import linear_eval
import simsiam_dssl

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
parser.add_argument("--k", nargs="+", type=int, default=[1, 5, 20, 50, 200])
parser.add_argument("--root")
args = parser.parse_args()

device, data = simsiam_dssl.join(), {}
print("k", *args.k)
for run in args.runs:
    told = json.loads((run / "settings.json").read_text())
    where = told["data"], args.root or told["root"], told["size"]
    if where not in data:
        sets = augment.load_data(*where)
        data[where] = sets, [augment.EvalLoader(x, 256, told["size"], device=device) for x in sets]
    (bank_set, _), loaders = data[where]
    net = linear_eval.load_backbone(run / "backbone.pt")[0].to(device)
    (bank, labels), (query, truth) = [simsiam_dssl.features(net, x, told["bf16"]) for x in loaders]
    found = [simsiam_dssl.knn_predict(query, bank, labels, len(bank_set.classes), k) == truth for k in args.k]
    print(run.name, *[f"{100 * right.float().mean():.2f}" for right in found], flush=True)

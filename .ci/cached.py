"""A script with its flags, but the images of --data are read once and kept in FILE as they are in memory.

    python .ci/cached.py FILE SCRIPT FLAGS...  # one FILE for each data set and size
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import augment  # noqa: E402


def load_data(*args, read=augment.load_data, **kwargs):
    if file.exists():
        return [augment.Data(*part) for part in torch.load(file)]
    data = read(*args, **kwargs)
    part = file.with_suffix(".part")
    torch.save([tuple(part) for part in data], part)
    part.rename(file)
    return data


if __name__ == "__main__":
    file, script, *sys.argv[1:] = Path(sys.argv[1]), *sys.argv[2:]
    augment.load_data = load_data
    __import__(Path(script).stem).main()

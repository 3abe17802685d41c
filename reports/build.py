"""Tables and plots of the benchmarks: `make report`, or `python reports/build.py`.

A pure function of reports/data: no measuring, no GPU, and nothing of this project outside of this folder is imported.
For each kind of data file (JSON; *_peers_h100.csv, measured elsewhere, stand beside those of their kind) there are
tables/<kind>.csv and tables/<kind>.md, and for each file plots, named plots/<file>_<what>.png:

* "attention" (`pytest bench`): time, memory and roofline of the main batch, speed and memory against resolution, batch
  and density. Head dims beside 64 have plots of their own, named <file>_<what>_d128.png;
* "attention_profile" (`python -m bench.profile_attention`): what the attention kernels are busy with, how near they are
  to the times that units and memory need at least, instructions, and the tiles tried (data of kind "hopper_tiles");
  plots/<file>_units.png;
* "generation" (`python -m bench.generation`): images a second and memory against the batch, and time by scale; in the
  tables beside the published code, measured elsewhere (data/generation_peers_h100.csv);
* "loss_curve" (`python -m bench.loss_curve`): losses of the engine and of a plain loop, and how far they are apart
  beside the spread of seeds (plots/<file>.png);
* "operators" (`python -m bench.operators`): time of the fused operators beside torch.compile and eager torch;
* "sampling" (`python -m bench.sampling`): time of drawing codes beside a sort in torch (plots/<file>.png);
* "scaling" (`python -m bench.scaling`): speed and memory on several GPUs beside one (no plot);
* "training" (`python -m bench.training`): time and memory of a step.

Read next: the module named like the kind, over results.py, markdown.py and style.py.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from reports import attention, attention_profile, generation, loss_curve, operators, sampling, scaling, training

HERE = Path(__file__).resolve().parent
KINDS = (attention, attention_profile, generation, loss_curve, operators, sampling, scaling, training)


def build(data: Path, tables: Path, plots: Path) -> list[Path]:
    """Write all tables and plots; returns their paths."""
    tables.mkdir(parents=True, exist_ok=True)
    plots.mkdir(parents=True, exist_ok=True)
    written = [path for kind in KINDS for path in kind.build(data, tables, plots)]
    if not written:
        raise ValueError(f"no results in {data}; `pytest bench --benchmark-only` on a GPU writes those of attention")
    return written


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Tables and plots of the benchmarks.")
    parser.add_argument("--data", type=Path, default=HERE / "data", help="folder of raw results")
    parser.add_argument("--out", type=Path, default=HERE, help="folder that gets tables/ and plots/")
    options = parser.parse_args(arguments)
    try:
        written = build(options.data, options.out / "tables", options.out / "plots")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for path in written:
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())

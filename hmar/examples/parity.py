"""Outputs against those that the published code gave, from Python: python -m hmar.examples.parity FOLDER"""

import argparse

from hmar.parity import measure_folder

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("folder", help="golden files: weights, inputs and outputs, with their configuration as metadata")
parser.add_argument("--device", default="cpu")
parser.add_argument("--dtype", default="float32", help="in bfloat16 and float16 agreement is reported, not judged")
options = parser.parse_args()

# `python -m hmar.parity FOLDER` prints the same as a table, and fails when something differs.
rows = list(measure_folder(options.folder, device=options.device, dtype=options.dtype))
for row in rows:
    agreement = "" if row.equal is None else f", {row.equal:.1%} of the codes equal"
    print(f"{row.file}, {row.quantity}: largest error {row.largest:.1e}{agreement}")
failed = [row for row in rows if row.passed is False]
print(f"{len(rows) - len(failed)} of {len(rows)} quantities agree")

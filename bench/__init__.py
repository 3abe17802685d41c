"""Benchmarks of the operators: `pytest bench --benchmark-only` on a CUDA GPU.

The method, in one place:

* Same inputs. In one cell (pattern, resolution, batch, heads, head dim, dtype) all implementations run in one process
  on the same q, k, v, do: normal noise, stored as [B,L,H,D] and seen as [B,H,L,D], which is what a projection yields.
* Checked first. Output and gradients are compared with the float64 reference before anything is timed (`check.py`).
  What fails is recorded as failed and has no time. Non-finite values never pass.
* Device time. Each round is one call between two device events. Before it a buffer several times larger than the L2
  cache is written, as often as it takes for the host to queue the whole call behind it: launch overhead of the host
  is not in the time. Warm-up rounds first; median, p10 and p90 of the rest.
* Host overhead, `host_us`: host time of a call among several queued one after another without waiting for the device.
* Forward is timed with gradients enabled, so that it stores what its backward needs. Backward is timed alone, on a
  fresh graph each round.
* Work is counted over unmasked pairs (`work.py`): a kernel that computes masked pairs gets no credit for them.
* Memory. `extra_bytes` is the largest amount that one forward, or one forward + backward, holds beside its inputs (what
  an implementation prepares for a mask is counted); `peak_bytes` adds the inputs, `fewest_extra_bytes` is the least.
* Nothing that one implementation does ends the run: what raises, runs out of memory, crashes or hangs is recorded with
  the reason (`supervisor.py`). Each result is in the file as soon as it is known; `--continue` goes on with the rest.
  The exit status tells at the end whether one of ours, or a rival given by a file, failed.

The default run has the cells of `shapes.BATCH_HEADS` at head dims 64 and 128 (heads halved) with every rival, but those
that take a minute to compile at head dim 64 only: 8 to 9 minutes on an H100, estimated. `--full` has batches 8 and 1,
two densities in between, and slow rivals everywhere. A rival of your own is a file, `--rival FILE.py` (`rivals.py`).
FlashAttention-4 takes part where it is installed, `pip install flash-attn-4 'nvidia-cutlass-dsl[cu13]'` (CUDA 13), and
is recorded as unavailable elsewhere.

Read `shapes.py` (what is measured), `rivals.py` (who takes part), `test_attention.py` (how), `conftest.py` (options),
`results.py` and `attention_results.py` (the raw JSON that `reports/build.py` turns into tables and plots), `compare.py`
(one commit against another).

Beside the attention benchmark, each with its method in its docstring: `training.py` (steps), `loss_curve.py` (fast
training learns like plain training), `scaling.py` (several GPUs), `loader.py` (training data), `generation.py` (images,
from classes to pixels), `sampling.py` (drawing codes), `operators.py` with `operator_rivals.py` (what stands beside
attention), `profile_attention.py` (what the attention kernels are busy with); `tune_attention.py` and
`tune_operators.py` find tiles.
"""

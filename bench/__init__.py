"""Benchmarks of the operators: `pytest bench --benchmark-only` on a CUDA GPU.

The method, in one place:

* Same inputs. In one cell (pattern, resolution, batch, heads, head dim, dtype) all implementations run in one process
  on the same q, k, v, do: normal noise, stored as [B,L,H,D] and seen as [B,H,L,D], which is what a projection yields.
* Checked first. Output and gradients are compared with the float64 reference before anything is timed (`check.py`).
  What fails is recorded as failed and has no time. Non-finite values never pass.
* Device time. Each round is one call between two device events. Before it a buffer several times larger than the L2
  cache is written, as often as it takes for the host to queue the whole call behind it: launch overhead of the host
  is not in the time, but recorded beside it as `host_ms`. Warm-up rounds first; median, p10 and p90 of the rest.
* Forward is timed with gradients enabled, so that it stores what its backward needs. Backward is timed alone, on a
  fresh graph each round.
* Work is counted over unmasked pairs (`work.py`): a kernel that computes masked pairs gets no credit for them.
* Memory is the largest amount allocated during one forward, or one forward + backward, tensors of the caller included.

Read `shapes.py` (what is measured), `rivals.py` (who takes part), `test_attention.py` (how), `conftest.py` (options and
the raw JSON that `reports/build.py` turns into tables and plots).
"""

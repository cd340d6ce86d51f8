"""``bench.py``: how fast each stage is, as ratios against what a user would pick instead, measured in one run.

    timing.py, memory.py, child.py   seconds of several sides in turn; peak memory of one side in a process of its own
    cases.py, pairs.py               what is compared with what, and the measurement of it
    generator.py … accounting.py     the pairs, a file per stage; both sides are first shown to compute the same
    peer_*.py                        the other sides: libraries (Opacus), and straightforward implementations
    curves.py                        time and memory against N, K, batch, parameters, resolution
    processes.py, rank_worker.py     throughput against the number of processes
    suite.py, bounds.py, table.py    everything in order; what --quick holds; what is printed

The package imports nothing of it: no stage depends on a peer.
"""

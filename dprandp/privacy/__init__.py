"""All code that privacy depends on, in small independent modules; only ``mechanism`` couples them.

===============  ==============================================================================================
``accounting``   events -> (lower, estimate, upper) bound on epsilon; the smallest noise for a budget
``gaussian_dp``  the exact closed form of the Gaussian mechanism (full batches)
``pld``          privacy loss distributions (sampled batches), both directions, by dp-accounting
``analytic``     bounds that need no grid, such as Rényi DP
``opinions``     prv-accountant and Opacus on the same ε; a contradiction is an error
``adaptive``     several stages, each planned after the results of those before it were seen
``neighbours``   the best attacker; ε for replaced records and for groups
``randomness``   randomness from the operating system, Poisson batches, Gaussian and discrete Gaussian noise
``clipping``     sums of clipped gradients whose sensitivity is ``clip_norm``, for records of one or several images
``ledger``       the append-only record of charges, written before they are used
``tuning``       the cost of the best of a random number of private trials, in Rényi DP
``mechanism``    one plan that couples them: what runs is what was accounted; ``selection``: for such trials
===============  ==============================================================================================

The one-letter notation of the papers, used in formulas only: N examples (public), q sample_rate, B expected_batch (q N,
the public divisor), T steps, C clip_norm (largest L2 norm of one record's contribution to a step's sum), σ
noise_multiplier (std of the noise in one coordinate, divided by C), K views of one record, averaged before the clip,
ε δ the guarantee under zero-out of one record, μ the parameter of Gaussian differential privacy.

This package imports nothing of dprandp but ``errors`` and ``threads``, so that it can be read, tested and trusted
alone. It re-exports nothing, and accounting needs no torch. ``dprandp.audit`` attacks it.
"""

"""An audit of the mechanism: what attacks on it show, held against what was promised.

===============  =================================================================================================
``two_world``    the lower bound on μ of Gaussian DP that two samples of scores prove
``one_run``      the lower bound on ε that guesses about many canaries of one run prove (Steinke et al. 2023)
``controls``     mechanisms with one known fault each, which an audit worth its name must flag
``canaries``     scores of Dirac canaries that went through the real clip, noise and divisor
``replay``       D against D with one record zeroed out, with the same indices and the same random bits
===============  =================================================================================================

Lower bounds hold at a stated significance: a sound mechanism is accused at most that often. A clean audit is no proof
of privacy, since it sees only faults that its canaries meet and that are large enough for its number of trials; the
proof is in the accounting. The controls say what this audit would have seen.

Like all of ``privacy/``, this package imports nothing of dprandp but ``errors`` and its neighbours here.
"""

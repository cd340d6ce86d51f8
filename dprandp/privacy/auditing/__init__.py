"""An audit of the mechanism: what attacks on it show, held against what was promised.

===============  =================================================================================================
``games``        lower bounds that scores prove: of a distinguishing game, of one run with many canaries (Mahloujifar et
                 al. 2025), of any mechanism; how many trials a claim needs, and what they would see
``controls``     scores of canaries that went through the real sampler, clip and noise; mechanisms with one known fault
                 each, which an audit worth its name must flag
``replay``       D against D with one record zeroed out, with the same indices and the same random bits
===============  =================================================================================================

Lower bounds hold at a stated significance: a sound mechanism is accused at most that often. A clean audit is no proof
of privacy, since it sees only faults that its canaries meet and that are large enough for its number of trials; the
proof is in the accounting. The controls say what this audit would have seen.

Like all of ``privacy/``, this package imports nothing of dprandp but ``errors`` and its neighbours here.
"""

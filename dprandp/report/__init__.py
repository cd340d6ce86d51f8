"""The report and the model card of a run, from its files alone.

==============  ========================================================================================
``run``         reads a run directory; never ``private/``
``disclosure``  every fact that a privacy claim needs, as (label, value); shared by page and card
``page``        report.html: the numbers first, and what they mean
``card``        MODEL_CARD.md
``figures``     learning curves and large confusion matrices as inline SVG
``markup``      HTML whose text is escaped by construction
==============  ========================================================================================
"""

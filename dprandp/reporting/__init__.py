"""What a run says about itself, from its files alone: the parts of report.html and of the model card.

==============  ========================================================================================
``disclosure``  every fact that a privacy claim needs, as (label, value); shared by report and card
``runfiles``    reads a run directory; never ``private/``
``markup``      HTML whose text is escaped by construction
``headline``    the numbers first, and what they mean
``figures``     learning curves and large confusion matrices as inline SVG
``sections``    the rest of the page
``style``       the page's CSS
==============  ========================================================================================
"""

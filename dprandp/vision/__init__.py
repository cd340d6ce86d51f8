"""Images as network input, and evaluation metrics. Independent of privacy, data sets and runs.

=============  ==========================================================================================
``images``     uint8 images to a network's input; synthetic images by position, read from their files
``views``      two contrastive views of a public image; K crop-and-flip views of a private one; colour changes
``metrics``    metrics of a test split
=============  ==========================================================================================
"""

"""Images on their way into a network, and what is measured at its other end. Knows of no privacy, data set or run.

=============  ==========================================================================================
``images``     uint8 images to a network's input; synthetic images by position, left in their files
``views``      two contrastive views of a public image; K crop-and-flip views of a private one; colour changes
``metrics``    what is reported about a test split
=============  ==========================================================================================
"""

"""Learn PatchNet from synthetic images: whitening of patches, then a spherical k-means dictionary.

Source: Coates & Ng 2012, "Learning feature representations with k-means", with synthetic patches in place of real ones.
Only images of a random process come in here, so nothing in this file costs privacy.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from .patchnet import normalise_patches

PATCH_FLOOR = 0.1
"""Added to the eigenvalues of the patch covariance: directions with less energy are noise and stay small."""


def sample_patches(images: Tensor, count: int, patch_size: int, generator: torch.Generator) -> Tensor:
    """Contrast-normalised patches from random places of random images.

    Args:
        images: uint8 [N, C, H, W].
        count: how many patches.
        patch_size: side in pixels.
        generator: public randomness.

    Returns:
        [count, C * patch_size**2] float32.
    """
    per_image = -(-count // len(images))
    chunks = []
    for batch in images.split(512):
        unfolded = functional.unfold(batch.to(torch.float32) / 255, patch_size)
        chosen = torch.randint(unfolded.shape[2], (len(batch), 1, per_image), generator=generator)
        patches = unfolded.gather(2, chosen.expand(-1, unfolded.shape[1], -1))
        chunks.append(normalise_patches(patches).transpose(1, 2).flatten(0, 1))
    patches = torch.cat(chunks)
    return patches[torch.randperm(len(patches), generator=generator)[:count]]


def whitening(patches: Tensor, dims: int) -> tuple[Tensor, Tensor]:
    """PCA whitening of a set of vectors, to the axes with the most energy.

    Args:
        patches: [N, d] float32.
        dims: axes to keep, r, at most d.

    Returns:
        basis [r, d] = (Λ + ``PATCH_FLOOR``)^(-1/2) Vᵀ, float32, and centre [r] = basis @ mean, so that
        ``basis @ p - centre`` is the whitened patch. Eigenvectors' signs make their largest entry positive.
    """
    mean = patches.mean(dim=0)
    centred = (patches - mean).to(torch.float64)
    values, vectors = torch.linalg.eigh(centred.t() @ centred / len(patches))
    values, vectors = values[-dims:].flip(0), vectors[:, -dims:].flip(1)
    vectors = vectors * vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True)).sign()
    basis = (vectors / (values.clamp(min=0) + PATCH_FLOOR).sqrt()).t().to(torch.float32).contiguous()
    return basis, basis @ mean


def spherical_kmeans(
    vectors: Tensor,
    clusters: int,
    iterations: int,
    generator: torch.Generator,
    on_iteration: Callable[[int, float], None] = lambda iteration, similarity: None,
) -> Tensor:
    """Unit-norm atoms; a vector belongs to the atom with the largest |inner product|, with its sign.

    Args:
        vectors: [N, d] float32, whitened.
        clusters: number of atoms F.
        iterations: passes over the vectors.
        generator: public randomness (the starting atoms, and new ones where an atom lost all its vectors).
        on_iteration: called with the iteration and the mean |inner product| of a vector with its atom.

    Returns:
        [F, d] float32 with rows of norm 1.
    """
    chosen = torch.randint(len(vectors), (clusters,), generator=generator)
    atoms = functional.normalize(vectors[chosen] + 1e-3 * torch.randn(clusters, vectors.shape[1], generator=generator))
    for iteration in range(iterations):
        sums = torch.zeros_like(atoms)
        members = torch.zeros(clusters)
        similarity = 0.0
        for block in vectors.split(8192):
            products = block @ atoms.t()
            strength, nearest = products.abs().max(dim=1)
            signed = products.gather(1, nearest[:, None])  # the step of Coates & Ng: weight by the product itself
            sums.index_add_(0, nearest, signed * block)
            members.index_add_(0, nearest, torch.ones(len(block)))
            similarity += float(strength.sum())
        empty = members == 0
        if bool(empty.any()):
            fresh = torch.randint(len(vectors), (int(empty.sum()),), generator=generator)
            sums[empty] = vectors[fresh]
        atoms = functional.normalize(sums + 1e-12)
        on_iteration(iteration, similarity / len(vectors))
    return atoms

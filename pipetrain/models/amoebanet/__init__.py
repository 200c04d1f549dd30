"""AmoebaNet (Real et al. 2019), the image model of GPipe: `genotype` says what is computed, `model` is the network."""

from pipetrain.models.amoebanet.genotype import GENOTYPES
from pipetrain.models.amoebanet.model import amoebanet

__all__ = ["GENOTYPES", "amoebanet"]

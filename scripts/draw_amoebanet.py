"""Writes docs/amoebanet.svg: the cells of AmoebaNet-D, drawn from the genotype that the model is built from."""

from pathlib import Path

from pipetrain.models.amoebanet.draw import drawing
from pipetrain.models.amoebanet.genotype import AMOEBANET_D

PICTURE = Path(__file__).parent.parent / "docs" / "amoebanet.svg"

if __name__ == "__main__":
    PICTURE.write_text(drawing(AMOEBANET_D))

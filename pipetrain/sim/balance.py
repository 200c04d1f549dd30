"""How many layers each stage gets."""


def even(num_layers: int, num_stages: int) -> tuple[int, ...]:
    """The same number of layers for every stage; what is left over goes to the first ones.

    >>> even(8, 3)
    (3, 3, 2)
    """
    each, left = divmod(num_layers, num_stages)
    return tuple(each + (s < left) for s in range(num_stages))

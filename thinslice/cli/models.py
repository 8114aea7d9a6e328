"""thinslice pull, ls, show and rm: the model store."""


def pull(model: str, /) -> None:
    """Fetch a model into the store; an interrupted pull goes on where it stopped.

    Args:
        model: Name of the model.
    """

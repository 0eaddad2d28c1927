"""The bar of ``progress=True``."""

from collections.abc import Callable

from moesaic._core import Progress


def bar() -> Callable[[Progress], None] | None:
    """A callback that drives a tqdm bar; None, so no bar, where tqdm is not installed."""
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return None
    shown = tqdm(unit="B", unit_scale=True, leave=False)

    def show(progress: Progress) -> None:
        shown.total = progress.total_bytes
        shown.set_description(progress.what, refresh=False)
        if progress.done_bytes < shown.n:  # the next pass over the same bytes
            shown.reset(progress.total_bytes)
        shown.update(progress.done_bytes - shown.n)

    return show

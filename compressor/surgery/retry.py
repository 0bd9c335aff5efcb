"""Go around what refuses: a group whose cut is refused is frozen with the reason, and the rest is tried again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from compressor.errors import CutError
from compressor.graph import ChannelGraph

T = TypeVar("T")


def retry_without_refused(
    graph: ChannelGraph, attempt: Callable[[], T], on_refusal: Callable[[Sequence[str]], None] = lambda names: None
) -> T:
    """Call `attempt` until it is not refused; after each refusal its groups leave the graph, frozen with the reason.

    Every refusal freezes at least one group, so that this ends.

    Args:
        graph: the graph whose groups `attempt` cuts; groups that refuse are frozen in it.
        attempt: selects and cuts, looking at `graph` anew each time.
        on_refusal: called with the names of the groups that were just frozen.

    Returns:
        What `attempt` returned.

    Raises:
        CutError: a refusal that names no group, around which nobody can go.
    """
    while True:
        try:
            return attempt()
        except CutError as refusal:
            if not refusal.groups:
                raise
            graph.freeze(refusal.groups, refusal.reason)
            on_refusal(refusal.groups)

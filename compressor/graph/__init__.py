"""The channel graph: which channels of a network go together, derived from the operations that really ran."""

from compressor.graph.group import ChannelGraph, ConsumerInput, Frozen, Group, Member, Snapshot

__all__ = ["ChannelGraph", "ConsumerInput", "Frozen", "Group", "Member", "Snapshot"]

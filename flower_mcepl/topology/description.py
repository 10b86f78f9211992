"""Words for a person about the links of a round: ``Topology.describe``."""

from collections.abc import Iterable

from flower_mcepl.topology.schedules import FixedLinks


def describe_links(links: FixedLinks, components: int) -> str:
    """Number of links, degrees, and whether everyone is connected."""
    into, out = [len(row) for row in links.into], [len(row) for row in links.out]
    isolated = [i for i, degrees in enumerate(zip(into, out, strict=True)) if not any(degrees)]
    verdict = _verdict(components, isolated, directed=links.directed)
    if links.directed:
        count = counted(sum(out), "directed link")
        return f"{count}, in-degree {_spread(into)}, out-degree {_spread(out)}, {verdict}"
    count = f"{counted(sum(out) // 2, 'link')} (directed count {sum(out)})"
    return f"{count}, degree {_spread(out)}, {verdict}"


def describe_union(rounds: Iterable[FixedLinks], num_agents: int) -> str:
    """The round after which the links so far connect everyone; rounds count from 0."""
    import networkx as nx

    union, last = nx.DiGraph(), 0
    union.add_nodes_from(range(num_agents))
    for last, links in enumerate(rounds):
        union.add_edges_from(links.edges())
        if nx.is_strongly_connected(union):
            return f"union of rounds 0 to {last} strongly connected"
    return f"union of rounds 0 to {last} NOT strongly connected"


def counted(number: int, noun: str) -> str:
    """The number with its noun, in the plural where there is not one."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _spread(degrees: list[int]) -> str:
    return f"{min(degrees)} to {max(degrees)} (mean {sum(degrees) / len(degrees):.1f})"


def _verdict(components: int, isolated: list[int], *, directed: bool) -> str:
    connected = "strongly connected" if directed else "connected"
    if components == 1:
        return connected
    more = f" and {len(isolated) - 10} more" if isolated[10:] else ""
    named = ", ".join(map(str, isolated[:10])) + more
    alone = f", isolated agents {named}" if isolated else ""
    return f"NOT {connected}: {components} components{alone}"

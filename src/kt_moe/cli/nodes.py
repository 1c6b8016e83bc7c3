"""NUMA nodes as the commands print them."""

from __future__ import annotations

from typing import Any

from kt_moe.cli.text import count_text, ranges_text, size_text, table


def node_lines(nodes: list[dict[str, Any]]) -> list[str]:
    """A line a node, from `kt_moe.cpu_info()["nodes"]`; distances only where there are several."""
    rows = []
    for node in nodes:
        row = [
            f"node {node['id']}",
            count_text(len(node["cores"]), "core"),
            f"CPUs {_folded(node['cpus'])}" if node["cpus"] else "no CPUs",
            size_text(node["memory_bytes"]) if node["memory_bytes"] else "no memory",
            f"{size_text(node['free_bytes'])} free" if node["memory_bytes"] else "",
        ]
        if len(nodes) > 1:
            row.append("distances " + " ".join(map(str, node["distances"])))
        rows.append(row)
    return table(rows, right=(1, 3, 4)).splitlines()


def _folded(cpus: list[int]) -> str:
    """As ranges; of many, the first and the last: odd masks must not fill the screen."""
    parts = ranges_text(cpus).split(", ")
    return ", ".join(parts if len(parts) <= 4 else [*parts[:2], "...", parts[-1]])

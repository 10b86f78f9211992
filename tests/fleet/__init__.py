"""Make-believe fleets: agents, nodes, grids, apps and packages for tests."""

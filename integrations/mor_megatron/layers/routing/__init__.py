"""What follows from routing: losses that join the graph, statistics, and updates of the routers."""

"""What routing leaves behind: losses that join the graph, counts, and updates of routers."""

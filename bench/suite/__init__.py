"""Many cases on one model: the workbench, the order and cost of a grid, a cluster, and a baseline to hold on to."""

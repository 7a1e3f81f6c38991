"""One question a file; pytest parameters are the grid."""

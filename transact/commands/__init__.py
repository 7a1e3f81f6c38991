"""The command line, one file a subcommand: `add_command` states its options, `run` does what it says."""

"""What a model costs: speed, operations and bytes, memory, other engines, quantised weights."""

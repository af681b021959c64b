"""What is known of an FX graph, and changes of it that keep what it computes."""

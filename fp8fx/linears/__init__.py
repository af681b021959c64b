"""What a linear is, however it is written."""

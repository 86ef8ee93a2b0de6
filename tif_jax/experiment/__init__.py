"""What a config says, and the stages that it leads to."""

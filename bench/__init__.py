"""What the project claims about speed, measured."""

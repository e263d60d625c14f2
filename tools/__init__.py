"""What is used to make the package and is no part of it."""

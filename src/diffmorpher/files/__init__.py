"""What is read and written, and how nothing is left half-written."""

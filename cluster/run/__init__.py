"""What a run leaves behind and where it is kept, and what it says on the way."""

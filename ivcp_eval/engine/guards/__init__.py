"""What a block refuses, tries out, or shields: before it can go wrong, or before it is wrong in silence."""

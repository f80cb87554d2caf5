"""Everything that talks to other processes."""

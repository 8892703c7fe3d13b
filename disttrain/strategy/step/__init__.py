"""The arithmetic of one optimizer step, shared by every strategy."""

"""What programs cost: operations counted from what is traced, and what devices can do at most."""

"""What stands on torch.distributed alone: every function takes a process group, and none knows of sequences or states."""

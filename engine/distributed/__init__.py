"""Distributed training: DeepSpeed, processes, ZeRO shards, precision audit, signals."""

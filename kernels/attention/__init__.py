"""The parts of `rope_attention`: the prologue, the attentions that follow it, and the fused kernels."""

"""paged_kv: a paged-attention block manager whose KV blocks are quantized."""

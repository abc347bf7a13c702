"""The frozen Vision Transformer: loading, adapting, and the forward on kept patches."""

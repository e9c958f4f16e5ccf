"""The data room: what a token is, how text becomes token shards, how shards become batches.

In the order data flows: tokenizer -> sources (documents) -> prepare (shards + manifest) -> dataset (opened again,
checked) -> loader (sample i of one infinite order). Nothing here imports torch.
"""

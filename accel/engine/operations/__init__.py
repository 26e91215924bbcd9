"""The fused operations of a plan. Each has a specification, a function in torch, and a reference in numpy.

- `normalize`: norm of a row, and a residual that is added.
- `product`: [norm ->] products with weights [-> bias, activation, gate, residuals].
- `attention`: rotary embedding, write to a static cache, softmax over the cache.
- `choice`: logits -> [filters ->] the best id or a draw, and which rows have ended. It follows the graph, whose last
  output are the logits.
"""

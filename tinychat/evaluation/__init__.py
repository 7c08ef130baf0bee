"""How good a model is at predicting text, and what its quantization cost: `tinychat eval`, `tinychat.evaluate`.

`likelihood` has the arithmetic, on any backend's runner; `evaluate` one model, or a model against another, on a text;
`command` is the command line; `harness` lets lm-evaluation-harness run its tasks on our engine.
"""
